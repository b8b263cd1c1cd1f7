"""The teacher's targets at chosen positions: one protocol for a live teacher and a cache.

``teacher.targets(batch)`` comes before the student's forward. Then positions are selected by the student's hidden
states, ``targets.at(index)`` gives the targets there, and the loss asks for one ``chunk(rows)`` after the other. So a
live teacher runs its body once over the batch, and its head at selected positions alone.

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

    The target is counts / counts.sum(). Counts are integers, except that ``top_k`` has probabilities.
    """

    class_ids: Tensor
    counts: Tensor


Target = FullDistribution | DrawnClasses


class PickedTargets(Protocol):
    def chunk(self, rows: slice) -> Target:
        """The targets of some of the N selected positions."""

    def logits(self, rows: slice) -> Tensor:
        """The teacher's logits [n, V] at some of them; only a live teacher has them."""


class TeacherTargets(Protocol):
    def at(self, index: Tensor) -> PickedTargets:
        """The targets at flat positions ``index`` [N] into [B * T]."""


class Teacher(Protocol):
    """Turns a batch into targets. ``is_live`` says whether it runs a model."""

    is_live: bool

    def targets(self, batch: Batch, step: int) -> TeacherTargets:
        """The targets of a batch of ``selkd.data.collate.collate`` at an optimiser step."""
