"""Standard errors and paired differences, by the bootstrap over examples.

Any resample of the examples gives a figure, as all of them do. Two models are compared on the same resamples of the
same examples: what makes an example hard for both cancels out, which is why a paired difference is known better than
either figure.

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
    """Two numbers an example, and how they become one figure.

    Attributes:
        kind: ``ratio`` is sum(first) / sum(second), a mean where ``second`` is 1; ``exp_ratio`` its exponential, a
            perplexity; ``ece`` the expected calibration error of confidences ``first``, right where ``second`` is 1.
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
        """The figure of each resample, float64 [R]; ``weights`` [R, N] says how often each example counts."""
        return _FIGURES[self.kind](self.first, self.second, weights)


@dataclass(frozen=True)
class Estimate:
    """A figure and its standard error; None where too few examples, or a value that is not finite, leave it open."""

    value: float | None
    standard_error: float | None


def estimate(measures: ExampleMeasures) -> Estimate:
    """The figure over all examples; its standard error is the deviation over R = 1,000 resamples."""
    return _estimate(measures.figures, len(measures))


def difference(ours: ExampleMeasures, theirs: ExampleMeasures) -> Estimate:
    """``ours`` less ``theirs`` on the same examples, resampled together.

    Raises:
        InputError: different kinds, or different numbers of examples.
    """
    if (ours.kind, len(ours)) != (theirs.kind, len(theirs)):
        raise InputError(
            f"a paired comparison needs the same measure on the same examples; got {len(ours)} ({ours.kind}) and "
            f"{len(theirs)} ({theirs.kind}). Measure both with the same data and limit."
        )
    return _estimate(lambda weights: ours.figures(weights) - theirs.figures(weights), len(ours))


def mean_of(estimates: Sequence[Estimate]) -> Estimate:
    """The mean of independent estimates, such as those of different benchmarks; errors add in squares."""
    # None becomes nan, and so does what is made of it.
    values = np.array([part.value for part in estimates], dtype=np.float64)
    errors = np.array([part.standard_error for part in estimates], dtype=np.float64)
    if not estimates or np.isnan(values).any():
        return Estimate(None, None)
    return Estimate(float(values.mean()), _finite(np.linalg.norm(errors) / len(errors)))


def _estimate(figures: Callable[[np.ndarray], np.ndarray], n_examples: int) -> Estimate:
    """Resamples are drawn with replacement, some at a time; they are the same for every measure of N examples."""
    generator = np.random.default_rng(_SEED)
    resampled = []
    with np.errstate(divide="ignore", invalid="ignore", over="ignore"):
        value = figures(np.ones((1, n_examples)))[0]
        for _ in range(0, RESAMPLES, _AT_ONCE):
            drawn = generator.integers(0, n_examples, (_AT_ONCE, n_examples))
            counts = np.stack([np.bincount(row, minlength=n_examples) for row in drawn])
            resampled.append(figures(counts.astype(np.float64)))
        deviation = np.concatenate(resampled).std(ddof=1)  # not finite where one of them is not
    return Estimate(_finite(value), _finite(deviation) if n_examples > 1 else None)


def _finite(value: np.floating) -> float | None:
    return float(value) if np.isfinite(value) else None
