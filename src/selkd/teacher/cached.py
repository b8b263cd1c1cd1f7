"""A teacher read from its cache.

Shapes: B batch, T positions, N selected positions, C distinct drawn classes.
"""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch

from selkd.data.samples import Sample
from selkd.errors import InputError
from selkd.selection.host import on_host
from selkd.teacher.targets import Batch, DrawnClasses, StoredTargets, TruncatedDistribution
from selkd_cache.manifest import TAIL, count_total
from selkd_cache.reader import TeacherCache
from selkd_cache.rows import Rows


class CachedTeacher:
    """A teacher whose draws are read from disk; its model is not needed."""

    is_live = False

    def __init__(self, cache: TeacherCache) -> None:
        self.cache = cache

    def targets(self, batch: Batch, step: int) -> StoredTargets:  # noqa: ARG002  the draws were made once
        """The targets that ``CachedCollator`` put into the batch; if there are none, they are read now."""
        if "teacher_class_ids" not in batch:
            device = batch["input_ids"].device
            batch = {name: tensor.to(device) for name, tensor in self.read(batch).items()}
        class_ids, counts = (batch[name].flatten(0, 1) for name in ("teacher_class_ids", "teacher_counts"))
        if TAIL not in self.cache.fingerprint:
            return StoredTargets(DrawnClasses, class_ids, counts)
        # The tail's mass is what the others lack, and its class, the one after the last, is none of the student's.
        is_known = (counts > 0) & (class_ids < int(self.cache.fingerprint["vocabulary"]))
        log_probabilities = (counts / count_total(self.cache.fingerprint)).log().masked_fill(~is_known, -torch.inf)
        return StoredTargets(TruncatedDistribution, class_ids.masked_fill(~is_known, 0), log_probabilities)

    def read(self, batch: Batch) -> Batch:
        """``teacher_class_ids`` and ``teacher_counts`` of a batch, int32 [B, T, C] on the CPU, padded with count 0."""
        host = on_host(batch)
        valid_mask = host["valid_mask"].numpy()
        stored = [
            self.rows(sample_id.tobytes(), int(valid.sum())) if valid.any() else None
            for sample_id, valid in zip(host["sample_ids"].numpy(), valid_mask, strict=True)
        ]
        width = max((int(rows.row_lengths.max()) for rows in stored if rows is not None), default=1)
        class_ids = np.zeros((*valid_mask.shape, width), dtype=np.int32)
        counts = np.zeros_like(class_ids)
        for sample, (valid, rows) in enumerate(zip(valid_mask, stored, strict=True)):
            if rows is not None:
                lengths = rows.row_lengths.astype(np.int64)
                position = np.repeat(np.flatnonzero(valid), lengths)
                place = np.arange(len(position)) - np.repeat(np.cumsum(lengths) - lengths, lengths)
                class_ids[sample, position, place] = rows.class_ids
                counts[sample, position, place] = rows.counts
        return {"teacher_class_ids": torch.from_numpy(class_ids), "teacher_counts": torch.from_numpy(counts)}

    def rows(self, sample_id: bytes, n_valid: int) -> Rows:
        """The stored rows of one sample. Raises InputError unless there is one for each of its valid positions."""
        rows = self.cache.get(sample_id)
        if len(rows.row_lengths) != n_valid:
            raise InputError(
                f"{self.cache.directory}: sample {sample_id.hex()} has {len(rows.row_lengths)} stored positions, its "
                f"text {n_valid} valid ones. The cache was built with other masks; build it again in another folder."
            )
        return rows


@dataclass(frozen=True)
class CachedCollator:
    """A collator that also reads the teacher's classes, so that a ``DataLoader``'s workers read ahead of training.

    Args:
        collate: makes a batch of samples, as ``selkd.data.collate.collate`` does.
        teacher: its cache holds every sample that has a valid position.
    """

    collate: Callable[[list[Sample]], Batch]
    teacher: CachedTeacher

    def __call__(self, samples: list[Sample]) -> Batch:
        batch = self.collate(samples)
        return batch | self.teacher.read(batch)
