"""Batches of samples, and which samples share a batch by their lengths where nothing is trained.

Legend: B batch, T positions.
"""

from collections.abc import Sequence
from typing import Literal

import numpy as np
import torch

from selkd.data.samples import ID_BYTES, Sample
from selkd.errors import InputError

TOKENS_AT_ONCE = 4096
"""The tokens of one batch, padding included, in scoring, measuring and caching."""


def collate(
    samples: Sequence[Sample],
    pad_token_id: int,
    *,
    padding_side: Literal["left", "right"] = "right",
    pad_to: int | None = None,
) -> dict[str, torch.Tensor]:
    """One batch of B samples, padded to the longest or to ``pad_to``.

    There is no attention mask, because Transformers keeps packed documents apart by their ``position_ids`` only while
    ``attention_mask`` is None. Padding is a document of its own, so no real token sees it.

    Returns:
        ``input_ids``, ``position_ids`` (from 0 in each document) and ``targets`` (the next token, or the pad token if
        there is none), int64 [B, T]; ``valid_mask``, bool [B, T], True where ``targets`` is to be predicted;
        ``sample_ids``, uint8 [B, 16].

    Raises:
        InputError: there is no sample, the side is unknown, or ``pad_to`` is less than the longest sample.
    """
    if not samples:
        raise InputError("collate: expected at least one sample, got none.")
    if padding_side not in ("left", "right"):
        raise InputError(f"padding_side: expected 'left' or 'right', got {padding_side!r}.")
    longest = max(len(sample.token_ids) for sample in samples)
    width = longest if pad_to is None else pad_to
    if width < longest:
        raise InputError(f"pad_to: expected at least {longest}, the longest sample's tokens, got {pad_to}.")

    shape = (len(samples), width)
    input_ids = np.full(shape, pad_token_id, dtype=np.int64)
    targets = np.full(shape, pad_token_id, dtype=np.int64)
    position_ids = np.zeros(shape, dtype=np.int64)
    valid_mask = np.zeros(shape, dtype=bool)
    for row, sample in enumerate(samples):
        length, valid = len(sample.token_ids), sample.valid_mask
        begin = width - length if padding_side == "left" else 0
        real = slice(begin, begin + length)
        input_ids[row, real] = sample.token_ids
        position_ids[row] = np.arange(width) if padding_side == "left" else np.arange(-length, width - length)
        position_ids[row, real] = sample.position_ids
        valid_mask[row, real] = valid
        targets[row, real] = np.where(valid, np.roll(sample.token_ids, -1), pad_token_id)
    ids = np.frombuffer(b"".join(sample.id for sample in samples), dtype=np.uint8).reshape(-1, ID_BYTES)
    return {
        "input_ids": torch.from_numpy(input_ids),
        "position_ids": torch.from_numpy(position_ids),
        "targets": torch.from_numpy(targets),
        "valid_mask": torch.from_numpy(valid_mask),
        "sample_ids": torch.from_numpy(ids.copy()),  # a copy: the buffer of bytes cannot be written to
    }


def group_by_tokens(lengths: Sequence[int] | np.ndarray, max_tokens: int) -> list[list[int]]:
    """Indices in groups of at most ``max_tokens`` tokens, padding included; a longer sample is a group by itself.

    Samples are taken from the shortest to the longest (equal lengths in their order), which needs little padding.
    """
    groups: list[list[int]] = []
    for index in np.argsort(np.asarray(lengths), kind="stable").tolist():
        longest = int(lengths[index])
        if groups and (len(groups[-1]) + 1) * longest <= max_tokens:
            groups[-1].append(index)
        else:
            groups.append([index])
    return groups
