"""Expected calibration error, against cases counted by hand."""

import math

import numpy as np
import pytest

from selkd.evaluation.calibration import bin_of, calibration_error, choice_confidence, expected_calibration_error
from selkd.evaluation.intervals import ExampleMeasures, estimate


def ece(confidence: list[float], correct: list[float]) -> float:
    weights = np.ones((1, len(confidence)))
    return float(expected_calibration_error(np.array(confidence), np.array(correct), weights)[0])


def test_two_bins_by_hand() -> None:
    """0.70 and 0.72 share the bin (10/15, 11/15]: mean 0.71, half right. 0.95 and 0.96 share another: all wrong."""
    assert ece([0.70, 0.72], [1, 0]) == pytest.approx(0.21)
    assert ece([0.70, 0.72, 0.95, 0.96], [1, 0, 0, 0]) == pytest.approx((2 * 0.21 + 2 * 0.955) / 4)


def test_without_resampling_it_is_the_same() -> None:
    generator = np.random.default_rng(0)
    confidence, correct = generator.random(500), (generator.random(500) < 0.4).astype(float)
    assert calibration_error(confidence, correct) == pytest.approx(ece(list(confidence), list(correct)))


def test_errors_of_two_bins_do_not_cancel_but_those_in_one_do() -> None:
    assert ece([0.5, 0.5], [1, 0]) == pytest.approx(0.0)
    assert ece([0.2, 0.8], [1, 0]) == pytest.approx(0.8)


def test_bins_are_fifteen_and_hold_their_upper_edge() -> None:
    edges = np.arange(1, 16) / 15
    assert bin_of(edges - 1e-9).tolist() == list(range(15))
    assert bin_of(edges[:-1] + 1e-9).tolist() == list(range(1, 15))
    assert bin_of(np.array([0.0, 1.0])).tolist() == [0, 14]


def test_a_calibrated_model_has_little() -> None:
    generator = np.random.default_rng(1)
    confidence = generator.random(40_000)
    correct = generator.random(40_000) < confidence
    assert ece(confidence.tolist(), correct.tolist()) < 0.01
    assert ece(confidence.tolist(), (generator.random(40_000) < 0.9 * confidence).tolist()) == pytest.approx(
        0.05, abs=0.01
    )


def test_resamples_repeat_examples() -> None:
    """Weights 2 and 0 are the same as the first example twice."""
    found = expected_calibration_error(np.array([0.3, 0.9]), np.array([0.0, 1.0]), np.array([[2, 0], [1, 1]]))
    assert found.tolist() == pytest.approx([0.3, (0.3 + 0.1) / 2])
    assert estimate(ExampleMeasures("ece", np.array([0.3, 0.9]), np.array([0.0, 1.0]))).value == pytest.approx(0.2)


def test_choices_are_made_to_add_up_to_one() -> None:
    probabilities = [0.02, 0.01, 0.005, 0.005]
    assert choice_confidence([math.log(p) for p in probabilities]) == pytest.approx(0.5)
    assert choice_confidence([-1000.0, -1000.0]) == pytest.approx(0.5)
