"""Standard errors and paired differences, against what statistics says they are."""

import numpy as np
import pytest

from selkd.errors import InputError
from selkd.evaluation.intervals import Estimate, ExampleMeasures, difference, estimate, mean_of

GENERATOR = np.random.default_rng(7)


def share(right: np.ndarray) -> ExampleMeasures:
    return ExampleMeasures("ratio", right.astype(np.float64), np.ones(len(right)))


def test_a_means_error_is_the_known_one() -> None:
    right = GENERATOR.random(400) < 0.3
    found = estimate(share(right))
    assert found.value == pytest.approx(right.mean())
    assert found.standard_error == pytest.approx(right.std() / np.sqrt(400), rel=0.08)


def test_the_error_of_few_examples_is_that_of_their_mean() -> None:
    """Resamples of 4 examples scatter by the root of 3/4 less than their means do about the truth."""
    few = np.random.default_rng(1).standard_normal(4)
    found = estimate(ExampleMeasures("ratio", few, np.ones(4)))
    assert found.standard_error == pytest.approx(few.std(ddof=1) / np.sqrt(4), rel=0.08)


def test_a_perplexity_is_the_exponential_of_all_tokens_mean() -> None:
    """Its error is, to first order, the perplexity times that of the weighted mean."""
    tokens = GENERATOR.integers(5, 50, 300).astype(np.float64)
    nll = tokens * (3.0 + 0.2 * GENERATOR.standard_normal(300))
    found = estimate(ExampleMeasures("exp_ratio", nll, tokens))
    mean = nll.sum() / tokens.sum()
    assert found.value == pytest.approx(np.exp(mean))
    delta = np.sqrt(((nll - mean * tokens) ** 2).sum()) / tokens.sum()
    assert found.standard_error == pytest.approx(np.exp(mean) * delta, rel=0.1)


def test_pairing_takes_away_what_both_find_hard() -> None:
    """Two models that differ on 20 of 400 examples: the error is that of their differences."""
    ours = GENERATOR.random(400) < 0.5
    theirs = ours.copy()
    theirs[:20] = ~theirs[:20]
    found = difference(share(ours), share(theirs))
    gap = ours.astype(float) - theirs.astype(float)
    assert found.value == pytest.approx(gap.mean())
    assert found.standard_error == pytest.approx(gap.std() / np.sqrt(400), rel=0.1)
    alone = estimate(share(ours)).standard_error
    assert alone is not None
    assert found.standard_error < 0.5 * alone * np.sqrt(2)
    assert difference(share(ours), share(ours)) == Estimate(0.0, 0.0)
    swapped = difference(share(theirs), share(ours))
    assert swapped.value == pytest.approx(-gap.mean())
    assert swapped.standard_error == pytest.approx(found.standard_error)


def test_only_the_same_examples_are_paired() -> None:
    with pytest.raises(InputError, match=r"same examples; got 3 \(ratio\) and 4 \(ratio\)"):
        difference(share(np.ones(3)), share(np.ones(4)))
    with pytest.raises(InputError, match=r"got 3 \(ratio\) and 3 \(ece\)"):
        difference(share(np.ones(3)), ExampleMeasures("ece", np.ones(3), np.ones(3)))


def test_what_cannot_be_known_is_none() -> None:
    assert estimate(share(np.ones(1))) == Estimate(1.0, None)
    assert estimate(ExampleMeasures("exp_ratio", np.array([1e4, 1.0]), np.ones(2))) == Estimate(None, None)


def test_the_mean_of_independent_estimates() -> None:
    found = mean_of([Estimate(0.2, 0.03), Estimate(0.4, 0.04)])
    assert found.value == pytest.approx(0.3)
    assert found.standard_error == pytest.approx(0.025)
    assert mean_of([Estimate(0.2, 0.03), Estimate(None, None)]) == Estimate(None, None)
    assert mean_of([Estimate(0.2, 0.03), Estimate(0.4, None)]).standard_error is None
    assert mean_of([]) == Estimate(None, None)
