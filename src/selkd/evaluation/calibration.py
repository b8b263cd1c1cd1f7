"""Calibration: does a model that says 70% turn out right 70% of the time?

Legend: N examples, K choices, R resamples.
"""

from collections.abc import Sequence

import numpy as np

BINS = 15


def choice_confidence(loglikelihoods: Sequence[float]) -> float:
    """The greatest of the K choices' probabilities once they are made to add up to 1.

    The choices' summed log-likelihoods in nats, not divided by length, go through a softmax: the probability of the
    choice that raw accuracy takes as the model's answer, given that one of the choices follows.
    """
    shifted = np.asarray(loglikelihoods, dtype=np.float64)
    shifted = np.exp(shifted - shifted.max())
    return float(shifted.max() / shifted.sum())


def bin_of(confidence: np.ndarray) -> np.ndarray:
    """int64 [N]: which of 15 bins of equal width a confidence lies in; a bin holds its upper edge, the first also 0."""
    return np.clip(np.ceil(np.asarray(confidence) * BINS).astype(np.int64) - 1, 0, BINS - 1)


def expected_calibration_error(confidence: np.ndarray, correct: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """ECE: over the bins, the mean of |mean confidence - share that was right|, each bin weighed by its examples.

    Args:
        confidence: [N] in 0 to 1.
        correct: [N], 1 where the answer was right, else 0.
        weights: [R, N], how often each example counts in each resample.

    Returns:
        float64 [R].
    """
    gap = np.zeros((len(confidence), BINS))
    gap[np.arange(len(confidence)), bin_of(confidence)] = np.asarray(confidence) - np.asarray(correct)
    return np.abs(weights @ gap).sum(axis=1) / weights.sum(axis=1)
