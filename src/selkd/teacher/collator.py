"""A cached teacher for any trainer: a collator that finds what the cache holds by the content of each example."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from transformers import default_data_collator

from selkd.data.samples import ID_BYTES, Sample
from selkd.errors import InputError
from selkd.plugins import Sampler
from selkd.teacher.cached import CachedTeacher
from selkd_cache.fingerprint import TAIL
from selkd_cache.reader import TeacherCache

Example = Mapping[str, Any]
POSITIONS = "position_ids"


@dataclass(frozen=True)
class TeacherCollator:
    """Makes a batch as another collator does, and adds what the teacher's cache holds of it.

    An example is what trainers take: ``input_ids`` and, where it has them, ``labels`` (-100 at tokens that are not
    learned) or TRL's ``completion_mask``, and ``position_ids``, which are 0 where a document of a packed sample starts.
    By these it is found in the cache, so batches, order and processes may be any.

    It adds ``teacher_class_ids`` and ``teacher_counts``, int32 [B, T, C], rows padded with count 0; ``valid_mask``,
    bool [B, T], the positions that have classes; and ``sample_ids``, uint8 [B, 16]: what ``selkd.distillation_loss``
    takes. Of a cache with scalars also ``teacher_entropy_nats`` and ``teacher_ce_nats``, float32 [B, T]. Index t is
    about token t + 1. ``position_ids`` are padded here, the padding being a document of its own.

    Args:
        cache: holds every example.
        collate: the trainer's own collator; it may pad on either side.
        temperature: the criterion's, which must be that at which the cache's classes were drawn.
    """

    cache: TeacherCache
    collate: Callable[[Any], Any] = default_data_collator
    temperature: float = 1.0

    def __post_init__(self) -> None:
        if TAIL in self.cache.fingerprint:
            raise InputError(
                f"{self.cache.directory}: this cache keeps the tail as one more class, which counts can't tell. "
                "Read it by selkd.DistillTrainer."
            )
        drawn_at = self.cache.fingerprint.get("temperature", self.temperature)
        if drawn_at != self.temperature:
            raise InputError(
                f"{self.cache.directory}: its classes were drawn at temperature {drawn_at}, and this collator is for "
                f"{self.temperature:g}. Give TeacherCollator temperature={drawn_at}, and the criterion the same."
            )

    @property
    def classes(self) -> dict[str, Any] | None:
        """How the cache's classes were drawn, as ``selkd.distillation_loss`` takes it; None if no built-in sampler did.

        Only of unbiased draws can KL(p || q) be estimated, to score positions by it and to log it.
        """
        fields = {name: self.cache.fingerprint.get(name) for name in ("sampler", "draws")}
        return fields if fields["sampler"] in Sampler.builtin() else None

    def __call__(self, examples: Sequence[Example]) -> dict[str, Any]:
        samples = [sample_of(example) for example in examples]  # before a collator takes keys out of them
        batch = dict(self.collate([{key: example[key] for key in example if key != POSITIONS} for example in examples]))
        input_ids = batch["input_ids"].cpu().numpy()
        if input_ids.ndim != 2 or len(input_ids) != len(samples):
            raise InputError(
                f"TeacherCollator: expected a row of input_ids for each of the {len(samples)} examples, got "
                f"{list(input_ids.shape)}. Give a collator that pads, not one that joins examples."
            )
        valid_mask, position_ids = np.zeros(input_ids.shape, bool), np.zeros(input_ids.shape, np.int64)
        for row, sample in enumerate(samples):
            begin = _place(input_ids[row], sample.token_ids)
            real = slice(begin, begin + len(sample.token_ids))
            position_ids[row] = np.arange(len(position_ids[row])) - real.stop * (
                real.stop <= np.arange(len(valid_mask[row]))
            )
            position_ids[row, real], valid_mask[row, real] = sample.position_ids, sample.valid_mask
        ids = np.frombuffer(b"".join(sample.id for sample in samples), np.uint8).reshape(-1, ID_BYTES)
        keys = {"valid_mask": torch.from_numpy(valid_mask), "sample_ids": torch.from_numpy(ids.copy())}
        if any(POSITIONS in example for example in examples):
            keys[POSITIONS] = torch.from_numpy(position_ids)
        return batch | keys | CachedTeacher(self.cache).read(keys)


def sample_of(example: Example) -> Sample:
    """The sample that an example is. Raises InputError where its arrays have not one entry for each token."""
    token_ids = np.asarray(example["input_ids"])
    position_ids = np.asarray(example.get(POSITIONS, range(len(token_ids))))
    is_target = None
    if example.get("labels") is not None:
        is_target = np.asarray(example["labels"]) != -100
    elif example.get("completion_mask") is not None:
        is_target = np.asarray(example["completion_mask"]) == 1
    if position_ids.shape != token_ids.shape:
        raise InputError(f"position_ids: expected {len(token_ids)}, one a token, got {list(position_ids.shape)}.")
    return Sample(token_ids, np.flatnonzero(position_ids == 0), is_target)


def _place(row: np.ndarray, token_ids: np.ndarray) -> int:
    """Where an example's tokens begin in its row: at 0, or where they end with the row."""
    length = len(token_ids)
    for begin in (0, len(row) - length):
        if begin >= 0 and np.array_equal(row[begin : begin + length], token_ids):
            return begin
    raise InputError(
        f"TeacherCollator: the row of an example with {length} tokens, {len(row)} wide, neither begins nor ends with "
        "them. Give a collator that pads them and changes none."
    )
