"""The teacher's signal at chosen positions, live or from a cache, behind one protocol.

The order is: ``teacher.targets(batch)`` before the student's forward; the student's hidden states choose positions;
``targets.at(index)`` narrows to them; the loss asks for ``chunk(rows)`` at a time. So a live teacher runs its body
once over the batch and its head at selected positions alone.

Shapes: B batch, T positions, N selected positions, n of a chunk, V classes, D hidden, U draws, C distinct classes.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedModel

from selkd.cache.reader import TeacherCache
from selkd.cache.rows import Rows
from selkd.data.samples import Sample
from selkd.errors import InputError
from selkd.maths.chunked import ChunkedLogits, wide
from selkd.maths.finite import require_finite
from selkd.maths.head import Head
from selkd.models.head import head_of, hidden_states, input_device
from selkd.recipe.choices import ClassOptions
from selkd.selection.classes import class_sampler
from selkd.selection.randomness import position_uniforms

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


class LiveTeacher:
    """A teacher model in memory. With a class sampler it draws anew at every optimiser step.

    Args:
        model: in evaluation mode, on any device: what it says is moved to the batch's.
        classes: the class sampler.
        temperature: the criterion's; draws come from the distribution at this temperature.
        seed: the run's.
        vocab_size: classes that teacher and student share; families pad their vocabularies with unused rows.
    """

    is_live = True

    def __init__(
        self, model: PreTrainedModel, classes: ClassOptions, temperature: float, seed: int, vocab_size: int
    ) -> None:
        self.model = model
        self.sampler = None if classes.sampler == "all" else class_sampler(classes)
        self.temperature = temperature
        self.seed = seed
        self.head = head_of(model).slice_vocab(vocab_size)

    @torch.no_grad()
    def targets(self, batch: Batch, step: int, *, draws: bool = True) -> "_LiveTargets":
        """``draws``: False where the full distribution alone will be asked for (``logits``)."""
        uniforms = None
        if self.sampler is not None and draws:
            ids, valid = batch["sample_ids"].cpu().numpy(), batch["valid_mask"].cpu().numpy()
            noise = position_uniforms(self.seed, ids, valid, "classes", step, draws=self.sampler.n_uniforms)
            uniforms = torch.from_numpy(noise).flatten(0, 1).to(batch["input_ids"].device)
        with torch.autocast(input_device(self.model).type, enabled=False):
            hidden = hidden_states(self.model, batch["input_ids"], batch["position_ids"])
        everywhere = torch.arange(batch["input_ids"].numel(), device=batch["input_ids"].device)
        return _LiveTargets(hidden.flatten(0, 1), self, uniforms, everywhere, batch)


class _LiveTargets:
    """Targets at hidden states [B * T, D], or [N, D] once narrowed; the head's product is made a chunk at a time.

    ``index``: of these positions in the batch.
    """

    def __init__(
        self, hidden_states: Tensor, teacher: LiveTeacher, uniforms: Tensor | None, index: Tensor, batch: Batch
    ) -> None:
        self.hidden_states = hidden_states
        self.teacher = teacher
        self.uniforms = uniforms
        self.index = index
        self.batch = batch
        self._logits = ChunkedLogits(hidden_states, teacher.head)

    def at(self, index: Tensor) -> "_LiveTargets":
        uniforms = None if self.uniforms is None else self.uniforms[index]
        hidden = self.hidden_states[index.to(self.hidden_states.device)]
        return _LiveTargets(hidden, self.teacher, uniforms, self.index[index], self.batch)

    def logits(self, rows: slice) -> Tensor:
        return self._logits(rows).to(self.index.device)

    def chunk(self, rows: slice) -> Target:
        logits = self.logits(rows)
        sampler = self.teacher.sampler
        if sampler is None:
            return FullDistribution(logits)
        assert self.uniforms is not None, "a sampler's uniforms come with the targets"
        probabilities = torch.softmax(logits / self.teacher.temperature, dim=-1)
        require_finite(probabilities.sum(dim=-1), self.index[rows], self.batch, "the teacher's logits")
        return DrawnClasses(*sampler(probabilities, self.uniforms[rows]))


@torch.no_grad()
def head_logits(head: Head, hidden_states: Tensor) -> Tensor:
    """Logits [n, V] in float32 or float64, the product in the model's own dtype whatever autocast is around."""
    with torch.autocast(hidden_states.device.type, enabled=False):
        return wide(head.logits(hidden_states))


class CachedTeacher:
    """A teacher read from disk: its model need not exist any more."""

    is_live = False

    def __init__(self, cache: TeacherCache) -> None:
        self.cache = cache

    def targets(self, batch: Batch, step: int) -> "_CachedTargets":  # noqa: ARG002  the draws were made once
        """What ``CachedCollator`` read for the batch, or what is read now."""
        if "teacher_class_ids" not in batch:
            device = batch["input_ids"].device
            batch = {name: tensor.to(device) for name, tensor in self.read(batch).items()}
        return _CachedTargets(batch["teacher_class_ids"].flatten(0, 1), batch["teacher_counts"].flatten(0, 1))

    def read(self, batch: Batch) -> Batch:
        """``teacher_class_ids`` and ``teacher_counts`` of a batch: int32 [B, T, C] on the CPU, padded with count 0."""
        valid_mask = batch["valid_mask"].cpu().numpy()
        rows = [
            self._rows(sample_id.tobytes(), int(valid.sum())) if valid.any() else None
            for sample_id, valid in zip(batch["sample_ids"].cpu().numpy(), valid_mask, strict=True)
        ]
        width = max((int(found.row_lengths.max()) for found in rows if found is not None), default=1)
        class_ids = np.zeros((*valid_mask.shape, width), dtype=np.int32)
        counts = np.zeros_like(class_ids)
        for row, (valid, found) in enumerate(zip(valid_mask, rows, strict=True)):
            if found is not None:
                lengths = found.row_lengths.astype(np.int64)
                position = np.repeat(np.flatnonzero(valid), lengths)
                place = np.arange(len(position)) - np.repeat(np.cumsum(lengths) - lengths, lengths)
                class_ids[row, position, place], counts[row, position, place] = found.class_ids, found.counts
        return {"teacher_class_ids": torch.from_numpy(class_ids), "teacher_counts": torch.from_numpy(counts)}

    def _rows(self, sample_id: bytes, n_valid: int) -> Rows:
        """The stored rows of one sample; they must be as many as the batch has valid positions."""
        rows = self.cache.get(sample_id)
        if len(rows.row_lengths) != n_valid:
            raise InputError(
                f"{self.cache.directory}: sample {sample_id.hex()} has {len(rows.row_lengths)} stored positions, the "
                f"batch {n_valid} valid ones. The cache was built with other masks; build it again in another folder."
            )
        return rows


@dataclass(frozen=True)
class CachedCollator:
    """A collator that also reads the teacher's classes, so that a ``DataLoader``'s workers do so ahead of training.

    Args:
        collate: samples in, a batch of ``selkd.data.collate.collate`` out.
        teacher: holds every sample that has a valid position.
    """

    collate: Callable[[list[Sample]], Batch]
    teacher: CachedTeacher

    def __call__(self, samples: list[Sample]) -> Batch:
        batch = self.collate(samples)
        return batch | self.teacher.read(batch)


@dataclass(frozen=True)
class _CachedTargets:
    class_ids: Tensor  # int32 [B * T, C], or int64 [N, C] once narrowed
    counts: Tensor

    def at(self, index: Tensor) -> "_CachedTargets":
        return _CachedTargets(self.class_ids[index].long(), self.counts[index].long())

    def logits(self, rows: slice) -> Tensor:  # noqa: ARG002
        raise AssertionError("what needs the full distribution is refused before a cache is opened for training")

    def chunk(self, rows: slice) -> DrawnClasses:
        return DrawnClasses(self.class_ids[rows], self.counts[rows])
