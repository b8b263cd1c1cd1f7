"""Paired differences over seeds and documents: their errors, Holm's correction, and what a table could have found.

The same documents are measured in every run, so a document that is odd is odd in all seeds. The bootstrap resamples
seeds, and within them the documents: one draw of documents for all seeds, as they are the same. Drawing them anew in
each seed would take them for S times as many documents, and the intervals would be too narrow (a test simulates both).
One seed and one document fewer are drawn than there are (Rao and Wu 1988): so the variance of few seeds is unbiased.
The variance is shared out between seeds and documents, and each part's error is multiplied by Student's t of its own
degrees of freedom: with few seeds the whole is rather too wide than too narrow, also far out, where Holm looks.

Legend: S seeds, D documents, R resamples.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache

import numpy as np

RESAMPLES = 2_000
LEVEL, POWER = 0.05, 0.80
_SEED = 20261129


@dataclass(frozen=True)
class Difference:
    """An arm less its baseline, in nats a position (below 0 is closer to the teacher).

    Attributes:
        value: the mean of the seeds.
        of_seeds: the part of its error that is the seeds'; 0 with one seed, of which nothing is known.
        of_documents: the part that is the documents'.
        seeds, documents: how many there are.
    """

    value: float
    of_seeds: float
    of_documents: float
    seeds: int
    documents: int

    @property
    def error(self) -> float:
        return math.hypot(self.of_seeds, self.of_documents)

    @property
    def low(self) -> float:
        return self.value - self.half_width(LEVEL)

    @property
    def high(self) -> float:
        return self.value + self.half_width(LEVEL)

    @property
    def p(self) -> float:
        """Two-sided, that there is no difference: the level at which the interval just reaches 0."""
        if self.error == 0:
            return float(self.value == 0)
        low, high = 0.0, 1.0  # half_width falls with the level
        for _ in range(60):
            middle = (low + high) / 2
            low, high = (low, middle) if self.half_width(middle) < abs(self.value) else (middle, high)
        return high

    def half_width(self, level: float) -> float:
        """Of the interval that misses the truth with probability ``level``."""
        return self._times(1 - level / 2)

    def detectable(self, level: float) -> float:
        """The smallest difference that would have been found at ``level`` in 4 of 5 such experiments."""
        return self.half_width(level) + self._times(POWER)

    def _times(self, share: float) -> float:
        parts = ((self.of_seeds, self.seeds - 1), (self.of_documents, self.documents - 1))
        return math.hypot(*(quantile(share, freedom) * error for error, freedom in parts if error > 0))


def paired(arm: np.ndarray, baseline: np.ndarray, positions: np.ndarray) -> Difference:
    """The difference of the means over seeds of ``sum of nats / sum of positions``.

    Args:
        arm, baseline: [S, D], the sums of KL over each document, of the same seeds and documents.
        positions: [D], the documents' numbers of positions.
    """
    if arm.shape != baseline.shape or arm.shape[1:] != positions.shape:
        raise ValueError(f"expected the same seeds and documents, got {arm.shape}, {baseline.shape}, {positions.shape}")
    nats = arm - baseline
    n_seeds, n_documents = nats.shape
    generator = np.random.default_rng(_SEED)
    seeds, documents = _weights(generator, n_seeds), _weights(generator, n_documents)
    resampled = np.einsum("rs,sd,rd->r", seeds, nats, documents) / (documents @ positions)
    error, share = float(resampled.std(ddof=1)), _share_of_seeds(nats, positions)
    value = float(nats.mean(axis=0).sum() / positions.sum())
    return Difference(value, math.sqrt(share) * error, math.sqrt(1 - share) * error, n_seeds, n_documents)


def _weights(generator: np.random.Generator, n: int) -> np.ndarray:
    """How often each of n is drawn, of n - 1 draws, as a share: float64 [R, n]. A single one is always taken."""
    if n == 1:
        return np.ones((RESAMPLES, 1))
    return generator.multinomial(n - 1, np.full(n, 1 / n), size=RESAMPLES) / (n - 1)


def _share_of_seeds(nats: np.ndarray, positions: np.ndarray) -> float:
    """The seeds' share of the variance: that of the seeds' means, beside that of the documents'."""
    residuals = nats - np.outer(nats.sum(axis=1) / positions.sum(), positions)
    variances = []
    for means in (nats.sum(axis=1) / positions.sum(), residuals.mean(axis=0) * len(positions) / positions.sum()):
        variances.append(float(means.var(ddof=1)) / len(means) if len(means) > 1 else 0.0)
    total = sum(variances)
    return variances[0] / total if total > 0 else 0.0


def holm(p_values: Sequence[float]) -> list[float]:
    """Holm's adjusted p values, in the order given: reject those below the level, and at most it is wrong anywhere."""
    order = np.argsort(p_values, kind="stable")
    adjusted, highest = [0.0] * len(p_values), 0.0
    for rank, index in enumerate(order):
        highest = max(highest, min(1.0, (len(p_values) - rank) * p_values[index]))
        adjusted[index] = highest
    return adjusted


def holm_level(p_values: Sequence[float], index: int) -> float:
    """The level that Holm holds the p value at ``index`` to: ``LEVEL`` over those that are not below it."""
    return LEVEL / sum(p >= p_values[index] for p in p_values)


def verdict(difference: Difference, adjusted: float, margin: float | None) -> str:
    """The rule of decision: ``better`` or ``worse`` than the baseline by Holm's p, ``as good`` where the interval stays
    within ``margin`` nats of it, else ``not told apart``. A margin of None: nothing is as good. One seed decides
    nothing."""
    if difference.seeds < 2:
        return "one seed"
    if adjusted < LEVEL:
        return "better" if difference.value < 0 else "worse"
    return "as good" if margin is not None and difference.high < margin else "not told apart"


def quantile(share: float, freedom: float) -> float:
    """The t with P(T <= t) = share, of Student's t. With t = sqrt(freedom) * tan(a), the density of a is as
    cos(a)^(freedom - 1)."""
    angles, below = _cumulative(freedom)
    return float(np.sqrt(freedom) * np.tan(np.interp(share, below, angles)))


@cache
def _cumulative(freedom: float) -> tuple[np.ndarray, np.ndarray]:
    angles = np.linspace(-np.pi / 2, np.pi / 2, 8_001)
    density = np.cos(angles).clip(min=0) ** (freedom - 1)
    below = np.concatenate([[0.0], np.cumsum((density[1:] + density[:-1]) / 2)])
    return angles, below / below[-1]
