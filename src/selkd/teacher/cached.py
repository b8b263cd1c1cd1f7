"""A teacher read from its cache.

Shapes: B batch, T positions, N selected positions, C distinct drawn classes.
"""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from selkd.data.samples import Sample
from selkd.errors import InputError
from selkd.plugins import Sampler
from selkd.selection.classes import split_draws, split_evenly
from selkd.selection.host import on_host, to_device
from selkd.teacher.live import draw_uniforms_of
from selkd.teacher.targets import Batch, DrawnClasses, StoredTargets, TeacherScalars, TruncatedDistribution
from selkd_cache.fingerprint import TAIL, count_total, n_scalars
from selkd_cache.reader import TeacherCache
from selkd_cache.rows import Rows
from selkd_cache.scalars import values_of

ENTROPY, CROSS_ENTROPY = "teacher_entropy_nats", "teacher_ce_nats"  # a batch's entries, float32 [B, T]
_AT_TEMPERATURE = "_at_temperature"


@dataclass(frozen=True)
class ScoringDraws:
    """Which of a position's draws score it, where selection is by an estimate from draws; the loss has the others.

    If the same draws did both, positions whose draws happen to look far from the student would be selected, and then
    look as far in the loss. The split is a function of the seed, the sample and the optimiser step.

    Attributes:
        count: how many of the draws score.
        seed: the run's.
        is_even: whether they are taken evenly spaced, for draws that are equally spaced; else at random. The others
            are independent of them only where the draws are.
    """

    count: int
    seed: int
    is_even: bool = False

    def split(self, counts: Tensor, batch: Batch, step: int, draws: int) -> tuple[Tensor, Tensor]:
        """The counts [B * T, C] of the scoring draws and of the others, of those of all ``draws``."""
        part = split_evenly if self.is_even else split_draws
        return part(counts, draw_uniforms_of(batch, self.seed, draws, "scoring draws", step), self.count)


class CachedTeacher:
    """A teacher whose draws are read from disk; its model is not needed.

    Args:
        scoring: which draws score positions; None: the metric looks at none of them, and the loss has all.
    """

    is_live = False

    def __init__(self, cache: TeacherCache, scoring: ScoringDraws | None = None) -> None:
        self.cache = cache
        self.scoring = scoring
        sampler = Sampler.builtin().get(str(cache.fingerprint.get("sampler")))
        self._goes_with_draws = (
            sampler is not None and sampler.is_unbiased and cache.fingerprint.get("temperature") == 1.0
        )

    @property
    def has_scalars(self) -> bool:
        """Whether the teacher's entropy and log p(y) are in the cache."""
        return n_scalars(self.cache.fingerprint) > 0

    @property
    def has_kl(self) -> bool:
        """Whether KL(p || q) can be estimated from the cache."""
        return self.has_scalars and self._goes_with_draws

    def targets(self, batch: Batch, step: int, *, for_loss: bool = True) -> StoredTargets:
        """The targets that ``CachedCollator`` put into the batch; if there are none, they are read now.

        Args:
            for_loss: whether ``scoring`` draws are kept apart; False where positions are measured, by all draws.
        """
        if "teacher_class_ids" not in batch:
            device = batch["input_ids"].device
            batch = batch | {name: to_device(tensor, device) for name, tensor in self.read(batch).items()}
        class_ids, counts = (batch[name].flatten(0, 1) for name in ("teacher_class_ids", "teacher_counts"))
        scalars = None
        if self.has_scalars:
            entropy, cross_entropy = (batch[name].flatten() for name in (ENTROPY, CROSS_ENTROPY))
            scalars = TeacherScalars(entropy, cross_entropy, self._goes_with_draws)
        if TAIL not in self.cache.fingerprint:
            scoring = None
            if for_loss and self.scoring is not None:
                draws = count_total(self.cache.fingerprint)
                scoring, counts = self.scoring.split(counts, batch, step, draws)
            return StoredTargets(DrawnClasses, class_ids, counts, scalars, scoring)
        # The tail's mass is what the others lack, and its class, the one after the last, is none of the student's.
        is_known = (counts > 0) & (class_ids < int(self.cache.fingerprint["vocabulary"]))
        log_probabilities = (counts / count_total(self.cache.fingerprint)).log().masked_fill(~is_known, -torch.inf)
        class_ids = class_ids.masked_fill(~is_known, 0)
        return StoredTargets(TruncatedDistribution, class_ids, log_probabilities, scalars)

    def read(self, batch: Batch) -> Batch:
        """What the cache has of a batch, on the CPU: ``teacher_class_ids`` and ``teacher_counts``, int32 [B, T, C],
        padded with count 0, and the scalars, float32 [B, T], 0 where not valid.

        The scalars are ``teacher_entropy_nats`` and ``teacher_ce_nats``, H(p) and -log p(y) at temperature 1, and with
        ``_at_temperature`` after their names those at the cache's temperature, where it is another.
        """
        host = on_host(batch)
        valid_mask = host["valid_mask"].numpy()
        stored = [
            self.rows(sample_id.tobytes(), int(valid.sum())) if valid.any() else None
            for sample_id, valid in zip(host["sample_ids"].numpy(), valid_mask, strict=True)
        ]
        width = max((int(rows.row_lengths.max()) for rows in stored if rows is not None), default=1)
        class_ids = np.zeros((*valid_mask.shape, width), dtype=np.int32)
        counts = np.zeros_like(class_ids)
        scalars = np.zeros((n_scalars(self.cache.fingerprint), *valid_mask.shape), dtype=np.float32)
        for sample, (valid, rows) in enumerate(zip(valid_mask, stored, strict=True)):
            if rows is not None:
                lengths = rows.row_lengths.astype(np.int64)
                position = np.repeat(np.flatnonzero(valid), lengths)
                place = np.arange(len(position)) - np.repeat(np.cumsum(lengths) - lengths, lengths)
                class_ids[sample, position, place] = rows.class_ids
                counts[sample, position, place] = rows.counts
                if self.has_scalars:
                    assert rows.scalars is not None, "the reader compared the shard with the fingerprint"
                    scalars[:, sample, valid] = values_of(rows.scalars).T
        names = (ENTROPY, CROSS_ENTROPY, ENTROPY + _AT_TEMPERATURE, CROSS_ENTROPY + _AT_TEMPERATURE)
        read = {"teacher_class_ids": class_ids, "teacher_counts": counts} | dict(zip(names, scalars, strict=False))
        return {name: torch.from_numpy(values) for name, values in read.items()}

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
