"""Standard errors and paired differences, by the bootstrap over examples.

Each resample of the examples gives a figure. The standard error is the deviation of these figures, times the root of
N / (N - 1), as resamples scatter about the examples' mean, and so a little less than examples about the truth. Two
models are compared on the same resamples of the same examples: an example that is hard for both cancels out, so a
paired difference has a smaller error than either figure.

Legend: N examples, R resamples.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from selkd.errors import InputError
from selkd.evaluation.calibration import expected_calibration_error

RESAMPLES = 1000
_SEED = 20260201
_AT_ONCE = 100


def _ratio(first: np.ndarray, second: np.ndarray, weights: np.ndarray) -> np.ndarray:
    return np.asarray((weights @ first) / (weights @ second))


def _exp_ratio(first: np.ndarray, second: np.ndarray, weights: np.ndarray) -> np.ndarray:
    return np.exp(_ratio(first, second, weights))


_FIGURES = {"ratio": _ratio, "exp_ratio": _exp_ratio, "ece": expected_calibration_error}


@dataclass(frozen=True, eq=False)
class ExampleMeasures:
    """Two numbers for each example, and the kind of figure that is made of them.

    Attributes:
        kind: ``ratio`` is sum(first) / sum(second), a mean if ``second`` is 1. ``exp_ratio`` is its exponential, a
            perplexity. ``ece`` is the expected calibration error of confidences ``first``, right where ``second`` is 1.
        first, second: float64 [N].
    """

    kind: str
    first: np.ndarray
    second: np.ndarray

    def __post_init__(self) -> None:
        assert self.kind in _FIGURES
        assert self.first.shape == self.second.shape == (len(self),)

    def __len__(self) -> int:
        return len(self.first)

    def figures(self, weights: np.ndarray) -> np.ndarray:
        """The figure of each resample, float64 [R]; ``weights`` [R, N] is how often it contains an example."""
        return _FIGURES[self.kind](self.first, self.second, weights)


@dataclass(frozen=True)
class Estimate:
    """A figure and its standard error; None where there are too few examples or a value is not finite."""

    value: float | None
    standard_error: float | None


def estimate(measures: ExampleMeasures) -> Estimate:
    """The figure over all examples; its standard error is had from R = 1,000 resamples."""
    return _estimate(measures.figures, len(measures))


def difference(measures: ExampleMeasures, subtracted: ExampleMeasures) -> Estimate:
    """``measures`` less ``subtracted`` on the same examples, resampled together.

    Raises:
        InputError: the two differ in kind or in their number of examples.
    """
    if (measures.kind, len(measures)) != (subtracted.kind, len(subtracted)):
        raise InputError(
            f"a paired comparison needs the same measure on the same examples; got {len(measures)} ({measures.kind}) "
            f"and {len(subtracted)} ({subtracted.kind}). Measure both with the same data and limit."
        )
    return _estimate(lambda weights: measures.figures(weights) - subtracted.figures(weights), len(measures))


def mean_of(estimates: Sequence[Estimate]) -> Estimate:
    """The mean of independent estimates, such as those of different benchmarks; errors add in squares."""
    # None becomes nan, which spreads to the mean and to the error.
    values = np.array([part.value for part in estimates], dtype=np.float64)
    errors = np.array([part.standard_error for part in estimates], dtype=np.float64)
    if not estimates or np.isnan(values).any():
        return Estimate(None, None)
    return Estimate(float(values.mean()), _finite(np.linalg.norm(errors) / len(errors)))


def _estimate(figures: Callable[[np.ndarray], np.ndarray], n_examples: int) -> Estimate:
    """Resamples with replacement; every measure of N examples gets the same resamples."""
    generator = np.random.default_rng(_SEED)
    resampled = []
    with np.errstate(divide="ignore", invalid="ignore", over="ignore"):
        value = figures(np.ones((1, n_examples)))[0]
        for _ in range(0, RESAMPLES, _AT_ONCE):
            drawn = generator.integers(0, n_examples, (_AT_ONCE, n_examples))
            counts = np.stack([np.bincount(row, minlength=n_examples) for row in drawn])
            resampled.append(figures(counts.astype(np.float64)))
        deviation = np.concatenate(resampled).std(ddof=1)  # not finite where one of them is not
    if n_examples < 2:
        return Estimate(_finite(value), None)
    return Estimate(_finite(value), _finite(deviation * np.sqrt(n_examples / (n_examples - 1))))


def _finite(value: np.floating) -> float | None:
    return float(value) if np.isfinite(value) else None
