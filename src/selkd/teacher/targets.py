"""What a teacher says at chosen positions, live or from a cache: one protocol for both.

The order is: ``teacher.targets(batch)`` before the student's forward; the student's hidden states choose positions;
``targets.at(index)`` narrows to them; the loss asks for ``chunk(rows)`` at a time. So a live teacher runs its body
once over the batch and its head at selected positions alone.

Shapes: B batch, T positions, N selected positions, n of a chunk, V classes, C distinct drawn classes.
"""

from dataclasses import dataclass
from typing import Protocol

from torch import Tensor

Batch = dict[str, Tensor]


@dataclass(frozen=True)
class FullDistribution:
    """The teacher's logits [n, V], float32 or float64."""

    logits: Tensor


@dataclass(frozen=True)
class DrawnClasses:
    """Classes drawn from the teacher: ``class_ids`` int64 and ``counts`` [n, C], rows padded with count 0.

    The target is counts / counts.sum(); they are integers, but for ``top_k``'s probabilities.
    """

    class_ids: Tensor
    counts: Tensor


Target = FullDistribution | DrawnClasses


class PickedTargets(Protocol):
    def chunk(self, rows: slice) -> Target:
        """The targets of some of the N selected positions."""

    def logits(self, rows: slice) -> Tensor:
        """The full distribution at some of them, [n, V], at temperature 1; a live teacher's alone."""


class TeacherTargets(Protocol):
    def at(self, index: Tensor) -> PickedTargets:
        """The targets at flat positions ``index`` [N] into [B * T]."""


class Teacher(Protocol):
    """Whatever supervises: it turns a batch into targets. ``is_live`` says whether a model runs for it."""

    is_live: bool

    def targets(self, batch: Batch, step: int) -> TeacherTargets:
        """Targets for a batch of ``selkd.data.collate.collate`` at an optimiser step."""
