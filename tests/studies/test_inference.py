"""The study's statistics against known answers: tables of t, Holm's own example, coverage by simulation."""

import inference
import numpy as np
import pytest
from inference import LEVEL, holm, holm_level, paired, quantile, verdict


def test_students_t_is_that_of_the_tables() -> None:
    for freedom, expected in {1: 12.706, 2: 4.303, 4: 2.776, 30: 2.042, 1000: 1.962}.items():
        assert quantile(0.975, freedom) == pytest.approx(expected, abs=2e-3)
    assert quantile(0.8, 4) == pytest.approx(0.941, abs=1e-3)
    assert quantile(0.999, 2) == pytest.approx(22.327, rel=1e-2), "far out, where Holm looks"
    assert quantile(0.999, 4) == pytest.approx(7.173, rel=1e-3)


def test_holm_by_hand() -> None:
    """Sorted 0.005, 0.01, 0.03, 0.04 times 4, 3, 2, 1, and never less than the one before."""
    assert holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert holm([0.9, 0.6]) == [1.0, 1.0]
    assert [holm_level([0.01, 0.04, 0.03, 0.005], index) for index in range(4)] == pytest.approx(
        [LEVEL / 3, LEVEL / 1, LEVEL / 2, LEVEL / 4]
    )


Sums = tuple[np.ndarray, np.ndarray, np.ndarray]


def simulate(
    generator: np.random.Generator, truth: float, deviations: tuple[float, float, float], shape: tuple[int, int]
) -> Sums:
    """Sums [S, D] of an arm and its baseline: effects of seed, document and both; documents of different lengths."""
    of_seed, of_document, of_both = deviations
    n_seeds, n_documents = shape
    positions = generator.integers(120, 256, n_documents).astype(float)
    effect = (
        truth
        + of_seed * generator.standard_normal((n_seeds, 1))
        + of_document * generator.standard_normal(n_documents)
        + of_both * generator.standard_normal(shape)
    )
    baseline = generator.random(shape) * positions
    return baseline + effect * positions, baseline, positions


@pytest.mark.parametrize("shape", [(3, 34), (5, 34)], ids=str)
@pytest.mark.parametrize("deviations", [(1.0, 5.0, 1.0), (2.0, 1.0, 3.0), (0.3, 6.0, 6.0)], ids=str)
def test_intervals_cover_the_truth_as_often_as_they_say(
    deviations: tuple[float, float, float], shape: tuple[int, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """About 95% of 300 experiments, whose share has a deviation of 1.3%; not nearly all, or they would find nothing."""
    monkeypatch.setattr(inference, "RESAMPLES", 200)
    generator = np.random.default_rng(7)
    covered = []
    for _ in range(300):
        found = paired(*simulate(generator, 1.5, deviations, shape))
        covered.append(found.low <= 1.5 <= found.high)
    assert 0.905 <= np.mean(covered) <= 0.995


@pytest.mark.parametrize("deviations", [(1.0, 0.3, 1.0), (0.3, 6.0, 3.0)], ids=str)
def test_p_values_far_out_are_not_too_small(
    deviations: tuple[float, float, float], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where Holm looks, with three seeds: of 2,000 experiments without an effect, below 0.005 come 10, or fewer."""
    monkeypatch.setattr(inference, "RESAMPLES", 100)
    generator = np.random.default_rng(11)
    found = [paired(*simulate(generator, 0.0, deviations, (3, 34))) for _ in range(2_000)]
    assert sum(one.half_width(0.005) < abs(one.value) for one in found) <= 18
    one = found[0]
    assert one.half_width(one.p) == pytest.approx(abs(one.value), rel=1e-3)


def test_documents_drawn_anew_in_each_seed_would_be_too_sure(monkeypatch: pytest.MonkeyPatch) -> None:
    """The reason for one draw of documents: they are the same in all seeds, and most of the error is theirs."""
    monkeypatch.setattr(inference, "RESAMPLES", 200)
    generator, covered = np.random.default_rng(8), []
    for _ in range(150):
        arm, baseline, positions = simulate(generator, 0.0, (0.1, 5.0, 0.1), (5, 34))
        nats = arm - baseline
        drawn = generator.integers(0, 34, (200, 5, 34))
        means = np.stack([np.take_along_axis(nats, d, axis=1).sum() / positions[d].sum() for d in drawn])
        covered.append(abs(nats.sum() / positions.sum() / 5) < 1.96 * means.std())
    assert np.mean(covered) < 0.75


def test_what_is_detectable_is_detected_four_times_in_five(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(inference, "RESAMPLES", 200)
    generator, deviations, shape = np.random.default_rng(9), (0.5, 3.0, 1.0), (5, 34)
    usual = np.median([paired(*simulate(generator, 0.0, deviations, shape)).detectable(LEVEL) for _ in range(100)])
    found = [paired(*simulate(generator, -usual, deviations, shape)) for _ in range(150)]
    assert 0.7 <= np.mean([one.high < 0 for one in found]) <= 0.9


def test_a_pair_is_measured_on_the_same_documents_and_decided_by_the_rule() -> None:
    arm, baseline, positions = simulate(np.random.default_rng(1), -3.0, (0.1, 0.5, 0.1), (5, 34))
    found = paired(arm, baseline, positions)
    assert found.value == pytest.approx((arm - baseline).sum() / positions.sum() / 5)
    assert found.low < found.value < found.high < 0
    assert found.p < 1e-4
    assert verdict(found, 0.01, 0.1) == "better"
    assert verdict(paired(baseline, arm, positions), 0.01, 0.1) == "worse"
    assert verdict(found, 0.2, 0.1) == "as good"
    assert verdict(paired(baseline, arm, positions), 0.2, 0.1) == "not told apart"
    assert verdict(found, 0.2, None) == "not told apart", "the first arm gained nothing that others could lose"
    assert verdict(paired(arm[:1], baseline[:1], positions), 0.01, 0.1) == "one seed"
    same = paired(baseline, baseline, positions)
    assert (same.value, same.error, same.p) == (0, 0, 1)
    with pytest.raises(ValueError, match="the same seeds and documents"):
        paired(arm[:3], baseline, positions)
