"""Paired differences over seeds and documents: their errors, Holm's correction, and what a table could have found.

The same documents are measured in every run, so a document that is odd is odd in all seeds. The bootstrap resamples
seeds, and within them the documents: one draw of documents for all seeds, as they are the same. Drawing them anew in
each seed would take them for S times as many documents, and the intervals would be too narrow (a test simulates both).
One seed and one document fewer are drawn than there are (Rao and Wu 1988): so the variance of few seeds is unbiased.
The interval is the difference +- t * error, with Satterthwaite's degrees of freedom for the two parts of the variance.

Legend: S seeds, D documents, R resamples.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

RESAMPLES = 2_000
LEVEL, POWER = 0.05, 0.80
_SEED = 20261129


@dataclass(frozen=True)
class Difference:
    """An arm less its baseline, in nats a position (below 0 is closer to the teacher).

    Attributes:
        p: two-sided, that there is no difference.
        freedom: Satterthwaite's degrees of freedom.
        detectable: the smallest difference that would have been found in 4 of 5 such experiments, at level 0.05.
    """

    value: float
    error: float
    low: float
    high: float
    p: float
    freedom: float
    detectable: float


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
    value, error = float(nats.mean(axis=0).sum() / positions.sum()), float(resampled.std(ddof=1))
    freedom = _freedom(nats, positions)
    t = quantile(1 - LEVEL / 2, freedom)
    p = 2 * (1 - probability(abs(value) / error, freedom)) if error > 0 else float(value == 0)
    return Difference(
        value, error, value - t * error, value + t * error, p, freedom, (t + quantile(POWER, freedom)) * error
    )


def _weights(generator: np.random.Generator, n: int) -> np.ndarray:
    """How often each of n is drawn, of n - 1 draws, as a share: float64 [R, n]. A single one is always taken."""
    if n == 1:
        return np.ones((RESAMPLES, 1))
    return generator.multinomial(n - 1, np.full(n, 1 / n), size=RESAMPLES) / (n - 1)


def _freedom(nats: np.ndarray, positions: np.ndarray) -> float:
    """Satterthwaite's degrees of freedom of the sum of two variances: of the seeds' means and of the documents'."""
    residuals = nats - np.outer(nats.sum(axis=1) / positions.sum(), positions)
    parts = []
    for means in (nats.sum(axis=1) / positions.sum(), residuals.mean(axis=0) * len(positions) / positions.sum()):
        if len(means) > 1:
            parts.append((means.var(ddof=1) / len(means), len(means) - 1))
    total = sum(variance for variance, _ in parts)
    if total == 0:
        return float(max((freedom for _, freedom in parts), default=1))
    return float(total**2 / sum(variance**2 / freedom for variance, freedom in parts))


def holm(p_values: Sequence[float]) -> list[float]:
    """Holm's adjusted p values, in the order given: reject those below the level, and at most it is wrong anywhere."""
    order = np.argsort(p_values, kind="stable")
    adjusted, highest = [0.0] * len(p_values), 0.0
    for rank, index in enumerate(order):
        highest = max(highest, min(1.0, (len(p_values) - rank) * p_values[index]))
        adjusted[index] = highest
    return adjusted


def verdict(difference: Difference, adjusted: float, margin: float) -> str:
    """The rule of decision: ``better`` or ``worse`` than the baseline by Holm's p, ``as good`` where the interval stays
    within ``margin`` nats of it, else ``not told apart``."""
    if adjusted < LEVEL:
        return "better" if difference.value < 0 else "worse"
    return "as good" if difference.high < margin else "not told apart"


def probability(t: float, freedom: float) -> float:
    """P(T <= t) of Student's t. With t = sqrt(freedom) * tan(a), the density of a is as cos(a)^(freedom - 1)."""
    angles, below = _cumulative(freedom)
    return float(np.interp(np.arctan(t / np.sqrt(freedom)), angles, below))


def quantile(share: float, freedom: float) -> float:
    """The t with P(T <= t) = share."""
    angles, below = _cumulative(freedom)
    return float(np.sqrt(freedom) * np.tan(np.interp(share, below, angles)))


def _cumulative(freedom: float) -> tuple[np.ndarray, np.ndarray]:
    angles = np.linspace(-np.pi / 2, np.pi / 2, 8_001)
    density = np.cos(angles).clip(min=0) ** (freedom - 1)
    below = np.concatenate([[0.0], np.cumsum((density[1:] + density[:-1]) / 2)])
    return angles, below / below[-1]
