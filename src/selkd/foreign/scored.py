"""What a teacher from elsewhere said of a text, and how a cache stores it.

Shapes: n tokens of a text, K classes that are known of a position, V classes.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import NamedTuple

import numpy as np
import torch

from selkd.data.samples import Sample
from selkd.errors import InputError
from selkd.selection.classes import in_units, with_tail
from selkd_cache.writer import SampleRows

ROUNDING = 0.02  # by how much the sum of probabilities that were stored in few bits may exceed 1


class Scored(NamedTuple):
    """A text's tokens with the most probable classes of each token's distribution.

    Attributes:
        token_ids: int64 [n].
        class_ids: int64 [n, K]; row j is of the distribution of token j, given those before it.
        log_probabilities: float64 [n, K] in nats; -inf where there is no class. Of a row of -inf alone nothing is
            known, as of the first token's.
    """

    token_ids: np.ndarray
    class_ids: np.ndarray
    log_probabilities: np.ndarray


class Piece(NamedTuple):
    """A document in a sample, which the teacher sees by itself: the tokens from ``begin`` to before ``end``.

    Attributes:
        tokens: the places in the piece of the tokens whose distributions are wanted, int64, each at least 1.
    """

    begin: int
    end: int
    tokens: np.ndarray


def pieces(sample: Sample) -> list[Piece]:
    """The documents of a sample that have a valid position, in order."""
    valid = sample.valid_mask
    borders = [*sample.document_starts.tolist(), len(sample.token_ids)]
    found = [Piece(begin, end, np.flatnonzero(valid[begin:end]) + 1) for begin, end in pairwise(borders)]
    return [piece for piece in found if len(piece.tokens)]


class StoredRows(NamedTuple):
    """Rows as a cache stores them, ragged and concatenated: uint16 [n], and uint32 and uint16 [sum of lengths]."""

    row_lengths: np.ndarray
    class_ids: np.ndarray
    counts: np.ndarray


@dataclass(frozen=True)
class Truncation:
    """How known classes are cut and stored.

    Attributes:
        classes: K, how many are kept, the most probable.
        keeps_tail: whether the mass of all others is one class more; else the kept ones are divided by their sum.
        vocab_size: V, the classes of the student. The mass of others goes to the tail.
    """

    classes: int
    keeps_tail: bool
    vocab_size: int

    def stored(self, class_ids: np.ndarray, log_probabilities: np.ndarray) -> StoredRows:
        """Rows [n, K'] of classes, in any order, as integer counts that sum to ``TOP_K_UNITS``.

        Each class's probability moves by less than 1/65,535. A row of which nothing is known is its tail alone, which
        teaches nothing: the loss and its gradient are 0 there.

        Raises:
            InputError: a row has a NaN, a class twice, or probabilities that sum to more than 1; or nothing is known of
                it and no tail is kept.
        """
        if np.isnan(log_probabilities).any():
            raise InputError("a log-probability is NaN, which no teacher means")
        logs = np.where((class_ids >= 0) & (class_ids < self.vocab_size), log_probabilities, -np.inf)
        order = np.lexsort((class_ids, -logs))[:, : self.classes]  # of equal ones the lower id, as top_k does
        logs = np.take_along_axis(logs, order, axis=1)
        ids = np.where(logs > -np.inf, np.take_along_axis(class_ids, order, axis=1), self.vocab_size + 1)
        probabilities = np.exp(np.minimum(logs, 1.0))  # what is larger is refused, and needs no overflow
        sums = probabilities.sum(axis=1, keepdims=True)
        if sums.size and sums.max() > 1 + ROUNDING:
            raise InputError(
                f"the probabilities of a position's classes sum to {sums.max():.3f}: expected log-probabilities, in "
                "nats and normalised over all classes; logits are none"
            )
        if not self.keeps_tail and sums.size and sums.min() == 0:
            raise InputError("of a position no class is known: with classes.tail it would be stored as unknown")
        order = np.argsort(ids, axis=1, kind="stable")
        ids = np.take_along_axis(ids, order, axis=1)
        if ((ids[:, 1:] == ids[:, :-1]) & (ids[:, 1:] <= self.vocab_size)).any():
            raise InputError("a class is listed twice at one position, and which of the two counts is not known")
        known = torch.from_numpy(ids)
        masses = torch.from_numpy(np.take_along_axis(probabilities / np.maximum(sums, 1), order, axis=1))
        if self.keeps_tail:
            known, masses = with_tail(known, masses, self.vocab_size)
        kept, counts = (tensor.numpy() for tensor in in_units(known, masses))
        is_kept = counts > 0
        return StoredRows(
            is_kept.sum(axis=1).astype(np.uint16), kept[is_kept].astype(np.uint32), counts[is_kept].astype(np.uint16)
        )


def joined(sample_id: bytes, parts: Sequence[StoredRows]) -> SampleRows:
    """The rows of a sample from those of its pieces."""
    if not parts:
        return sample_id, np.zeros(0, np.uint16), np.zeros(0, np.uint32), np.zeros(0, np.uint16)
    lengths, class_ids, counts = (np.concatenate(arrays) for arrays in zip(*parts, strict=True))
    return sample_id, lengths, class_ids, counts
