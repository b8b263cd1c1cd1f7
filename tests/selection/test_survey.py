"""Survey sampling of positions: the specification, exact counts, and dense KD in expectation."""

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from properties import examples
from test_positions import Scored, batch_of, options_of, scored_batches

from selkd import reference
from selkd.errors import InputError
from selkd.recipe.choices import PositionOptions
from selkd.recipe.part import parse_part
from selkd.selection.position_scores import choose_positions
from selkd.selection.positions import Candidates, StepContext, counts_of
from selkd.selection.survey import take_systematically


def picked_by(scores: torch.Tensor, mask: torch.Tensor, fraction: float, power: float = 1.0, **where: Any) -> Any:
    batch = batch_of(mask, where.get("ids"))
    options = options_of("pps", fraction=fraction, power=power)
    return choose_positions(options, scores, batch, StepContext(where.get("step", 0), fraction, 0.0, None), seed=4)


@given(scored_batches(), st.sampled_from([0.0, 0.5, 1.0, 7.0]))
@examples(300)
def test_it_is_the_specification_and_takes_k_positions(batch: Scored, power: float) -> None:
    scores, mask, fraction = batch
    expected = reference.select("pps", scores, mask, fraction, seed=4, step=2, power=power)
    actual = picked_by(scores, mask, fraction, power, step=2)
    torch.testing.assert_close(actual, expected)
    n = mask.sum(dim=-1)
    assert torch.equal((actual > 0).sum(dim=-1), counts_of(fraction, n)), "a position twice would be one too few"
    assert (actual * n.unsqueeze(-1) >= 1 - 1e-9)[actual > 0].all(), "no probability is above 1"


@pytest.mark.parametrize("fraction", [0.1, 0.4, 1.0])
@pytest.mark.parametrize("power", [0.0, 0.5, 1.0, 3.0])
def test_over_many_starts_its_expectation_is_dense_kd(power: float, fraction: float) -> None:
    """Of R evenly spaced starts, pi * R take a position, give or take one: so near is each mean to 1/n."""
    n, repeats, generator = 30, 10_000, torch.Generator().manual_seed(1)
    scores = torch.rand(n, generator=generator, dtype=torch.float64) ** 3 + 0.1
    losses = torch.rand(n, generator=generator, dtype=torch.float64)
    starts = ((torch.arange(repeats, dtype=torch.float64) + 0.5) / repeats).unsqueeze(-1)
    mask = torch.ones(repeats, n, dtype=torch.bool)
    context, options = StepContext(0, fraction, 0.0, None), options_of("pps", fraction=fraction, power=power)
    counts = counts_of(fraction, mask.sum(dim=-1))
    a = take_systematically(Candidates(scores.expand(repeats, -1), mask, counts, context, options, starts))
    pi = probabilities(scores.numpy() ** power, int(counts[0]))
    assert ((a.mean(dim=0) - 1 / n).abs() * n * repeats * pi <= 1 + 1e-6).all()
    drawn = picked_by(scores.expand(4000, -1), mask[:4000], fraction, power, ids=_ids(4000)) @ losses
    assert abs(drawn.mean() - losses.mean()) < 4.5 * drawn.std() / 4000**0.5 + 1e-12


def probabilities(weights: np.ndarray, k: int) -> torch.Tensor:
    """pi = min(1, c * w) with c, found by bisection, such that the pi add up to k."""
    low, high = 0.0, k / weights.min()
    for _ in range(200):
        c = (low + high) / 2
        low, high = (c, high) if np.minimum(1, c * weights).sum() < k else (low, c)
    return torch.from_numpy(np.minimum(1, high * weights))


def _ids(count: int) -> np.ndarray:
    return np.random.default_rng(2).integers(0, 256, (count, 16), dtype=np.uint8)


def test_its_loss_varies_less_than_that_of_corrected_draws() -> None:
    """Without replacement, and spread over the text, along which the loss of neighbours is alike."""
    n, repeats = 60, 2_000
    scores = torch.rand(n, dtype=torch.float64, generator=torch.Generator().manual_seed(3)) + 1
    losses = 1 + torch.linspace(0, 3, n, dtype=torch.float64).sin()
    mask, context = torch.ones(repeats, n, dtype=torch.bool), StepContext(0, 0.2, 0.0, None)

    def deviation(policy: str) -> float:
        options, batch = options_of(policy, fraction=0.2), batch_of(mask, _ids(repeats))
        a = choose_positions(options, scores.expand(repeats, -1), batch, context, seed=1)
        return float((a @ losses).std())

    assert deviation("pps") < 0.7 * deviation("pos_rs_corrected")


def test_scores_of_zero_are_alike_and_power_zero_is_evenly_spaced() -> None:
    mask = torch.ones(1, 20, dtype=torch.bool)
    nothing, some = torch.zeros(1, 20, dtype=torch.float64), torch.rand(1, 20, dtype=torch.float64)
    even = picked_by(some, mask, 0.25, 0.0)
    places = even[0].nonzero().flatten()
    assert set(places.diff().tolist()) == {4}
    assert even[0, places].tolist() == pytest.approx([1 / 5] * 5)
    assert torch.equal(picked_by(nothing, mask, 0.25, 1.0), even)
    two = nothing.clone()
    two[0, [3, 8]] = torch.tensor([1.0, 5.0]).double()
    a = picked_by(two, mask, 0.25)
    assert a[0, [3, 8]].tolist() == [1 / 20, 1 / 20], "fewer scores than K: they are sure, the rest is alike"
    assert a[0].count_nonzero() == 5
    assert a[0].sum().item() == pytest.approx(1)


def test_a_sample_decides_alone() -> None:
    """Padding, the other samples and the order of the rows change nothing."""
    scores, ids = torch.rand(3, 12, dtype=torch.float64), _ids(3)
    mask = torch.ones(3, 12, dtype=torch.bool)
    together = picked_by(scores, mask, 0.3, ids=ids)
    wide = torch.full((2, 40), torch.nan, dtype=torch.float64)
    wide[:, 17:29] = scores[[2, 0]]
    wide_mask = ~wide.isnan()
    padded = picked_by(wide, wide_mask, 0.3, ids=ids[[2, 0]])
    torch.testing.assert_close(padded[:, 17:29], together[[2, 0]])
    assert (padded[~wide_mask] == 0).all()
    assert not torch.equal(picked_by(scores, mask, 0.3, ids=ids, step=1), together)


def test_without_power_it_needs_no_metric() -> None:
    options = parse_part(PositionOptions, {"policy": "pps", "power": 0, "metric": "kl"}, "positions")
    assert (options.metric, options.scoring, options.needs_teacher) == (None, None, False)
    assert parse_part(PositionOptions, {"policy": "pps"}, "positions").power == 1.0
    with pytest.raises(InputError, match=r"positions\.power: an option of pps, without effect on all"):
        parse_part(PositionOptions, {"power": 1.0}, "positions")
    with pytest.raises(InputError, match=r"positions\.reduction: pps gives its positions weights of their own"):
        parse_part(PositionOptions, {"policy": "pps", "reduction": "per_position"}, "positions")
