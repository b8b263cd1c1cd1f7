"""The teacher's targets at chosen positions: one protocol for a live teacher and a cache.

``teacher.targets(batch)`` comes before the student's forward. Then positions are selected by the student's hidden
states, ``targets.at(index)`` gives the targets there, and the loss asks for one ``chunk(rows)`` after the other. So a
live teacher runs its body once over the batch, and its head at selected positions alone.

Shapes: B batch, T positions, N selected positions, n of a chunk, V classes, C distinct drawn classes.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from torch import Tensor

from selkd.maths.finite import FiniteCheck
from selkd.selection.host import Batch


@dataclass(frozen=True)
class FullDistribution:
    """The teacher's logits [n, V], float32 or float64."""

    logits: Tensor


@dataclass(frozen=True)
class DrawnClasses:
    """Classes drawn from the teacher: ``class_ids`` int64 and ``counts`` [n, C], rows padded with count 0.

    The target is counts / counts.sum(). Counts are integers, except that ``top_k`` has probabilities.
    """

    class_ids: Tensor
    counts: Tensor


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
class StoredTargets:
    """Targets that are in memory for every position of a batch, by class ids and numbers [N, C] of one ``kind``."""

    kind: type[DrawnClasses] | type[TruncatedDistribution]
    class_ids: Tensor
    numbers: Tensor

    @property
    def checks(self) -> Sequence[FiniteCheck]:
        return ()

    def at(self, index: Tensor) -> "StoredTargets":
        return StoredTargets(self.kind, self.class_ids[index].long(), self.numbers[index])

    def logits(self, rows: slice) -> Tensor:  # noqa: ARG002
        raise AssertionError("what needs the full distribution is refused before")

    def chunk(self, rows: slice) -> Target:
        return self.kind(self.class_ids[rows], self.numbers[rows])


@dataclass(frozen=True)
class UnaskedTargets:
    """The targets of a teacher that nothing asks: the text alone teaches, at positions of the student's own choice."""

    checks: Sequence[FiniteCheck] = ()

    def at(self, index: Tensor) -> "UnaskedTargets":  # noqa: ARG002
        return self

    def logits(self, rows: slice) -> Tensor:  # noqa: ARG002
        raise AssertionError("the teacher was not asked")

    def chunk(self, rows: slice) -> Target:  # noqa: ARG002
        raise AssertionError("the teacher was not asked")


class PickedTargets(Protocol):
    def chunk(self, rows: slice) -> Target:
        """The targets of some of the N selected positions."""

    def logits(self, rows: slice) -> Tensor:
        """The teacher's logits [n, V] at some of them; only a live teacher has them."""


class TeacherTargets(Protocol):
    @property
    def checks(self) -> Sequence[FiniteCheck]:
        """Whether what classes were drawn from was finite, so far, at whichever positions."""

    def at(self, index: Tensor) -> PickedTargets:
        """The targets at flat positions ``index`` [N] into [B * T]."""


class Teacher(Protocol):
    """Turns a batch into targets. ``is_live`` says whether it runs a model."""

    is_live: bool

    def targets(self, batch: Batch, step: int) -> TeacherTargets:
        """The targets of a batch of ``selkd.data.collate.collate`` at an optimiser step."""
