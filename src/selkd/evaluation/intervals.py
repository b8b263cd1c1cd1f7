"""Standard errors and paired differences, by the bootstrap over examples.

A measure keeps two numbers an example and says how they become one figure, so that any resample of the examples gives
a figure too. Two models are compared on the same resamples of the same examples: what makes an example hard for both
cancels out, which is why a paired difference is known better than either figure.

Legend: N examples, R resamples.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal, get_args

import numpy as np

from selkd.errors import InputError
from selkd.evaluation.calibration import expected_calibration_error

RESAMPLES = 1000
_SEED = 20260201
_AT_ONCE = 100

Kind = Literal["ratio", "exp_ratio", "ece"]


@dataclass(frozen=True, eq=False)
class Measure:
    """Per-example numbers and the figure that they make.

    Attributes:
        kind: ``ratio`` is sum(first) / sum(second), a mean where ``second`` is 1; ``exp_ratio`` its exponential, a
            perplexity; ``ece`` the expected calibration error of confidences ``first``, right where ``second`` is 1.
        first, second: float64 [N].
    """

    kind: Kind
    first: np.ndarray
    second: np.ndarray

    def __post_init__(self) -> None:
        assert self.kind in get_args(Kind)
        assert self.first.shape == self.second.shape
        assert self.first.ndim == 1

    def __len__(self) -> int:
        return len(self.first)

    def figures(self, weights: np.ndarray) -> np.ndarray:
        """The figure of each resample, float64 [R]; ``weights`` [R, N] says how often each example counts."""
        if self.kind == "ece":
            return expected_calibration_error(self.first, self.second, weights)
        with np.errstate(divide="ignore", invalid="ignore", over="ignore"):
            ratio = (weights @ self.first) / (weights @ self.second)
            return np.exp(ratio) if self.kind == "exp_ratio" else ratio


@dataclass(frozen=True)
class Estimate:
    """A figure and its standard error; None where too few examples, or a value that is not finite, leave it open."""

    value: float | None
    standard_error: float | None


def estimate(measure: Measure) -> Estimate:
    """The measure over all examples, its standard error the deviation over R = 1,000 resamples."""
    figures = np.concatenate([measure.figures(weights) for weights in _resamples(len(measure))])
    return Estimate(_finite(_whole(measure)), _deviation(figures, len(measure)))


def difference(ours: Measure, theirs: Measure) -> Estimate:
    """``ours`` less ``theirs`` on the same examples, resampled together.

    Raises:
        InputError: different kinds, or different numbers of examples.
    """
    if (ours.kind, len(ours)) != (theirs.kind, len(theirs)):
        raise InputError(
            f"a paired comparison needs the same measure on the same examples; got {len(ours)} ({ours.kind}) and "
            f"{len(theirs)} ({theirs.kind}). Measure both with the same data and limit."
        )
    figures = [ours.figures(weights) - theirs.figures(weights) for weights in _resamples(len(ours))]
    return Estimate(_finite(_whole(ours) - _whole(theirs)), _deviation(np.concatenate(figures), len(ours)))


def mean_of(estimates: list[Estimate]) -> Estimate:
    """The mean of independent estimates, such as those of different benchmarks; errors add in squares."""
    values = [found.value for found in estimates]
    if not values or any(value is None for value in values):
        return Estimate(None, None)
    errors = [found.standard_error for found in estimates]
    value = float(np.mean([value for value in values if value is not None]))
    if any(error is None for error in errors):
        return Estimate(value, None)
    return Estimate(value, float(np.linalg.norm([error for error in errors if error is not None])) / len(errors))


def _whole(measure: Measure) -> float:
    return float(measure.figures(np.ones((1, len(measure))))[0])


def _resamples(n_examples: int) -> Iterator[np.ndarray]:
    """R resamples with replacement as counts [R, N], some rows at a time; the same for every measure of N examples."""
    generator = np.random.default_rng(_SEED)
    for _ in range(0, RESAMPLES, _AT_ONCE):
        drawn = generator.integers(0, n_examples, (_AT_ONCE, n_examples))
        yield np.stack([np.bincount(row, minlength=n_examples) for row in drawn]).astype(np.float64)


def _deviation(figures: np.ndarray, n_examples: int) -> float | None:
    return _finite(float(figures.std(ddof=1))) if n_examples > 1 and np.isfinite(figures).all() else None


def _finite(value: float) -> float | None:
    return value if np.isfinite(value) else None
