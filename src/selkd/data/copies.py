"""How much of the held-out samples stands in the training samples, and which of them are copies of it.

Held-out documents differ from all training documents, but one may hold a long part of another: a chapter that was
published alone, a page under two addresses. What the student has read there flatters its figures.

A token is covered if it lies in a run of ``NGRAM`` tokens of one document that also stands in a training sample. Runs
are compared by hashes of 64 bits. Those of the held-out samples are kept, and the training samples pass by them once.

Legend: n tokens, G runs of the held-out samples.
"""

import logging
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from selkd.data.samples import Sample, TokenBlock

NGRAM = 13
"""Long enough that unrelated texts hardly share one, short enough to find a text with some words changed. GPT-3's
overlaps were measured by so many words (arXiv 2005.14165, appendix C)."""
COPY = 0.5
"""A held-out sample of which at least so much is covered is a copy. Copies are near 1, as only their edges and changed
words stay uncovered; samples that share a heading or a quotation are below 0.1. The middle is far from both."""
NOTABLE = 0.01
"""From this share of covered tokens on, a warning is given."""
BOILERPLATE = 10
"""Prompts share a template, a system prompt or a set phrase: their tokens in runs that stand more often than this in
the training samples do not count. GPT-3's measurement ignored what stood in more than 10 documents."""

_logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Overlap:
    """What of the held-out tokens stands in the training samples.

    Attributes:
        samples: held-out samples that were looked at.
        copies: those of them that are copies, which are dropped.
        tokens, covered: the tokens of all of them that were counted, and the covered ones.
        kept_tokens, kept_covered: the same without the copies.
    """

    samples: int = 0
    copies: int = 0
    tokens: int = 0
    covered: int = 0
    kept_tokens: int = 0
    kept_covered: int = 0

    @property
    def share(self) -> float:
        """The share of covered tokens with the copies, as the text was found."""
        return self.covered / self.tokens if self.tokens else 0.0

    @property
    def kept_share(self) -> float:
        """The share of covered tokens of the samples that were kept."""
        return self.kept_covered / self.kept_tokens if self.kept_tokens else 0.0

    def described(self) -> dict[str, Any]:
        """The counts and shares as plain data, for the record."""
        shares = {"share": round(self.share, 6), "kept_share": round(self.kept_share, 6)}
        return {"ngram": NGRAM, **asdict(self), **shares}

    def warn(self, name: str) -> None:
        """Log how many copies were dropped, and how much is covered if that is notable."""
        if self.copies:
            _logger.warning(
                "%s: %d of %d held-out samples are copies of training text and were dropped (at least %.0f%% of their "
                "tokens stand there in runs of %d tokens).",
                name, self.copies, self.samples, 100 * COPY, NGRAM,
            )  # fmt: skip
        if self.kept_share > NOTABLE:
            _logger.warning(
                "%s: %.1f%% of the held-out tokens stand in the training text in runs of %d tokens, so figures on "
                "held-out text are flattered; remove repeated text from the data.",
                name, 100 * self.kept_share, NGRAM,
            )  # fmt: skip


def without_copies(
    held_out: Sequence[Sample], training: Iterable[TokenBlock], *, has_prompts: bool
) -> tuple[list[Sample], Overlap]:
    """The held-out samples that are no copies, and how much of them all stands in the training samples.

    Args:
        training: the tokens of the training samples, a block at a time.
        has_prompts: whether documents are prompts or conversations, which share boilerplate.
    """
    runs = [_runs(TokenBlock(sample.token_ids, sample.document_starts)) for sample in held_out]
    hashes, inverse = np.unique(np.concatenate([np.zeros(0, np.uint64), *(h for _, h in runs)]), return_inverse=True)
    occurrences = _occurrences(hashes, training)[inverse]
    kept: list[Sample] = []
    counts = np.zeros((2, 2), np.int64)  # without and with the copies; tokens and covered ones
    begin = 0
    for sample, (starts, _) in zip(held_out, runs, strict=True):
        found = occurrences[begin : begin + len(starts)]
        begin += len(starts)
        is_boilerplate = (found > BOILERPLATE) & has_prompts
        ignored = _covered(starts[is_boilerplate], len(sample.token_ids))
        covered = _covered(starts[(found > 0) & ~is_boilerplate], len(sample.token_ids)) & ~ignored
        sums = np.array([(~ignored).sum(), covered.sum()])
        counts[1] += sums
        if sums[1] == 0 or sums[1] < COPY * sums[0]:
            kept.append(sample)
            counts[0] += sums
    tokens, covered_tokens = counts[1].tolist()
    overlap = Overlap(len(held_out), len(held_out) - len(kept), tokens, covered_tokens, *counts[0].tolist())
    return kept, overlap


def _covered(starts: np.ndarray, length: int) -> np.ndarray:
    """bool [length]: the tokens within the runs that begin at ``starts``."""
    change = np.zeros(length + 1, np.int64)
    change[starts] += 1
    change[starts + NGRAM] -= 1
    return np.cumsum(change[:-1]) > 0


def _runs(block: TokenBlock) -> tuple[np.ndarray, np.ndarray]:
    """Where each run of NGRAM tokens of one document begins, and its hash, uint64."""
    n = len(block.token_ids)
    if n < NGRAM:
        return np.zeros(0, np.int64), np.zeros(0, np.uint64)
    lengths = np.diff(block.document_starts, append=n)
    ends = np.repeat(block.document_starts + lengths, lengths)[: n - NGRAM + 1]
    starts = np.flatnonzero(np.arange(n - NGRAM + 1) + NGRAM <= ends)
    return starts, _hashes(block.token_ids)[starts]


_FACTOR = np.uint64(0x9E3779B97F4A7C15)


def _hashes(token_ids: np.ndarray) -> np.ndarray:
    """uint64 [n - NGRAM + 1]: the hash of the run that begins at each token.

    It is a polynomial in ``_FACTOR`` modulo 2^64 whose coefficients are the scrambled tokens. Those of runs of 2, 4 and
    8 tokens are made from two halves.
    """
    scrambled = (token_ids.astype(np.uint64) + np.uint64(1)) * np.uint64(0xD6E8FEB86659FD93)
    scrambled ^= scrambled >> np.uint64(32)
    scrambled *= np.uint64(0xD6E8FEB86659FD93)
    scrambled ^= scrambled >> np.uint64(29)
    by_length, power, length = {1: scrambled}, {1: _FACTOR}, 1
    while 2 * length <= NGRAM:
        half = by_length[length]
        by_length[2 * length] = half[:-length] * power[length] + half[length:]
        power[2 * length] = _wrapping_square(power[length])
        length *= 2
    n_runs = len(token_ids) - NGRAM + 1
    run, taken = np.zeros(n_runs, np.uint64), 0
    for part in sorted((part for part in by_length if NGRAM & part), reverse=True):
        run = run * power[part] + by_length[part][taken : taken + n_runs]
        taken += part
    return run


def _wrapping_square(value: np.uint64) -> np.uint64:
    return np.uint64(int(value) ** 2 % 2**64)


def _occurrences(hashes: np.ndarray, training: Iterable[TokenBlock]) -> np.ndarray:
    """int64 [G]: how often each of the sorted ``hashes`` stands in the training samples."""
    occurrences = np.zeros(len(hashes), np.int64)
    if not len(hashes):
        return occurrences
    # Most runs of the training text are nowhere in the held-out text: a table of their first bits tells so at once.
    bits = min(max(len(hashes).bit_length() + 5, 16), 26)
    shift = np.uint64(64 - bits)
    may_be_there = np.zeros(2**bits, dtype=bool)
    may_be_there[hashes >> shift] = True
    for _, found in map(_runs, training):
        candidates = found[may_be_there[found >> shift]]
        place = np.searchsorted(hashes, candidates)
        place[place == len(hashes)] = 0
        occurrences += np.bincount(place[hashes[place] == candidates], minlength=len(hashes))
    return occurrences
