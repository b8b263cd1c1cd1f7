"""Calibration: is a model that is 70% sure right 70% of the time?

Legend: N examples, K choices, R resamples.
"""

from collections.abc import Sequence

import numpy as np

BINS = 15


def choice_confidence(loglikelihoods: Sequence[float]) -> float:
    """The greatest of the K choices' probabilities, normalised to add up to 1.

    It is the probability of the choice that raw accuracy takes as the model's answer, given that one of the choices
    follows: a softmax of the summed log-likelihoods, which are not divided by length.

    Args:
        loglikelihoods: [K], in nats.
    """
    shifted = np.asarray(loglikelihoods, dtype=np.float64)
    shifted = np.exp(shifted - shifted.max())
    return float(shifted.max() / shifted.sum())


def bin_of(confidence: np.ndarray) -> np.ndarray:
    """The bin of each confidence, int64 [N]: one of 15 of equal width, upper edges included."""
    return np.clip(np.ceil(np.asarray(confidence) * BINS).astype(np.int64) - 1, 0, BINS - 1)


def expected_calibration_error(confidence: np.ndarray, correct: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """The mean over bins of |mean confidence - share of right answers|, weighted by each bin's number of examples.

    Args:
        confidence: [N] in 0 to 1.
        correct: [N], 1 where the answer was right, else 0.
        weights: [R, N], how often an example occurs in a resample.

    Returns:
        float64 [R].
    """
    gap = np.zeros((len(confidence), BINS))
    gap[np.arange(len(confidence)), bin_of(confidence)] = np.asarray(confidence) - np.asarray(correct)
    return np.abs(weights @ gap).sum(axis=1) / weights.sum(axis=1)


def calibration_error(confidence: np.ndarray, correct: np.ndarray) -> float:
    """``expected_calibration_error`` of all N examples, each once."""
    gaps = np.bincount(bin_of(confidence), weights=np.asarray(confidence) - np.asarray(correct), minlength=BINS)
    return float(np.abs(gaps).sum() / max(1, len(confidence)))
