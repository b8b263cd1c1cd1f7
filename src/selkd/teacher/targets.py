"""The teacher's targets at chosen positions: one protocol for a live teacher and a cache.

``teacher.targets(batch)`` comes before the student's forward. Then positions are selected by the student's hidden
states, ``targets.at(index)`` gives the targets there, and the loss asks for one ``chunk(rows)`` after the other. So a
live teacher runs its body once over the batch, and its head at selected positions alone.

Shapes: B batch, T positions, N selected positions, n of a chunk, V classes, C distinct drawn classes.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

from torch import Tensor

from selkd.maths.finite import FiniteCheck
from selkd.maths.importance import TeacherDraws
from selkd.selection.host import Batch


@dataclass(frozen=True)
class FullDistribution:
    """The teacher's logits [n, V], float32 or float64."""

    logits: Tensor


@dataclass(frozen=True)
class DrawnClasses:
    """Classes drawn from the teacher: ``class_ids`` int64 and ``counts`` [n, C], rows padded with count 0.

    The target is counts / counts.sum(). Counts are integers, except that ``top_k`` has probabilities. ``entropy`` is
    the teacher's, H(p) in nats [n], where it is known and the draws are unbiased ones at temperature 1; else None.
    """

    class_ids: Tensor
    counts: Tensor
    entropy: Tensor | None = None


@dataclass(frozen=True)
class TruncatedDistribution:
    """The teacher's most probable classes: ``class_ids`` int64 and their ``log_probabilities`` [n, K], float.

    What their probabilities lack to 1 is the mass of all other classes together, the tail. Rows are padded with class 0
    and -inf.
    """

    class_ids: Tensor
    log_probabilities: Tensor


Target = FullDistribution | DrawnClasses | TruncatedDistribution


@dataclass(frozen=True)
class TeacherScalars:
    """What is known of the teacher at N positions beside classes: H(p) and -log p(y) at temperature 1, in nats.

    Attributes:
        entropy, cross_entropy: float32 [N].
        goes_with_draws: whether the classes beside it are unbiased draws at temperature 1.
    """

    entropy: Tensor
    cross_entropy: Tensor
    goes_with_draws: bool

    def at(self, index: Tensor) -> "TeacherScalars":
        return TeacherScalars(self.entropy[index], self.cross_entropy[index], self.goes_with_draws)


@dataclass(frozen=True)
class StoredTargets:
    """Targets that are in memory for every position of a batch, by class ids and numbers [N, C] of one ``kind``.

    Attributes:
        scalars: None where they are not known.
        scoring: the counts [N, C] of the draws that score positions, where these are not the draws in ``numbers``.
    """

    kind: type[DrawnClasses] | type[TruncatedDistribution]
    class_ids: Tensor
    numbers: Tensor
    scalars: TeacherScalars | None = None
    scoring: Tensor | None = None

    @property
    def checks(self) -> Sequence[FiniteCheck]:
        return ()

    def at(self, index: Tensor) -> "StoredTargets":
        return StoredTargets(
            self.kind,
            self.class_ids[index].long(),
            self.numbers[index],
            None if self.scalars is None else self.scalars.at(index),
            None if self.scoring is None else self.scoring[index],
        )

    @property
    def knows_kl(self) -> bool:
        return self.kind is DrawnClasses and self.scalars is not None and self.scalars.goes_with_draws

    def scored_by(self) -> TeacherDraws:
        assert self.scalars is not None, "a metric of the teacher is refused where its scalars are not known"
        counts = self.numbers if self.scoring is None else self.scoring
        return TeacherDraws(self.class_ids, counts, self.scalars.entropy, self.scalars.cross_entropy)

    def chunk(self, rows: slice) -> Target:
        if self.knows_kl and self.scalars is not None:
            return DrawnClasses(self.class_ids[rows], self.numbers[rows], self.scalars.entropy[rows])
        return self.kind(self.class_ids[rows], self.numbers[rows])


@dataclass(frozen=True)
class UnaskedTargets:
    """The targets of a teacher that nothing asks: the text alone teaches, at positions of the student's own choice."""

    checks: Sequence[FiniteCheck] = ()

    def at(self, index: Tensor) -> "UnaskedTargets":  # noqa: ARG002
        return self

    knows_kl = False

    def scored_by(self) -> TeacherDraws:
        raise AssertionError("the teacher was not asked")

    def chunk(self, rows: slice) -> Target:  # noqa: ARG002
        raise AssertionError("the teacher was not asked")


class PickedTargets(Protocol):
    @property
    def knows_kl(self) -> bool:
        """Whether KL(p || q) at temperature 1 can be had, or estimated without bias, from the chunks."""

    def chunk(self, rows: slice) -> Target:
        """The targets of some of the N selected positions."""

    def scored_by(self) -> Callable[[slice], Tensor] | TeacherDraws:
        """The teacher's side of a metric at them: a function to its logits [n, V], or draws and scalars of a cache."""


class TeacherTargets(Protocol):
    @property
    def checks(self) -> Sequence[FiniteCheck]:
        """Whether what classes were drawn from was finite, so far, at whichever positions."""

    def at(self, index: Tensor) -> PickedTargets:
        """The targets at flat positions ``index`` [N] into [B * T]."""


class Teacher(Protocol):
    """Turns a batch into targets.

    Attributes:
        is_live: whether it runs a model.
    """

    is_live: bool

    @property
    def has_kl(self) -> bool:
        """Whether KL(p || q) of all its positions can be had, or estimated without bias."""

    def targets(self, batch: Batch, step: int, *, for_loss: bool = True) -> TeacherTargets:
        """The targets of a batch of ``selkd.data.collate.collate`` at an optimiser step.

        Args:
            for_loss: whether a training's loss comes of them; False: its positions are measured.
        """
