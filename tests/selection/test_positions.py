"""Position policies against the specification, on every shape that hypothesis finds."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from selkd import reference
from selkd.recipe import PositionPolicy
from selkd.selection.noise import position_uniforms
from selkd.selection.positions import POLICIES, counts_of, select


@st.composite
def scored_batches(draw: st.DrawFn) -> tuple[torch.Tensor, torch.Tensor, float]:
    """Scores with many ties, any mask (empty rows too), and a fraction."""
    rows, width = draw(st.integers(1, 4)), draw(st.integers(1, 30))
    scores = draw(st.lists(st.sampled_from([0.0, 0.5, 1.0, 2.0]), min_size=rows * width, max_size=rows * width))
    mask = draw(st.lists(st.booleans(), min_size=rows * width, max_size=rows * width))
    fraction = draw(st.floats(0.0025, 1.0))
    return torch.tensor(scores).view(rows, width), torch.tensor(mask).view(rows, width), fraction


@given(scored_batches(), st.sampled_from(["all", "top_k"]))
@settings(max_examples=150, deadline=None)
def test_select_is_the_specification(batch: tuple[torch.Tensor, torch.Tensor, float], policy: str) -> None:
    scores, mask, fraction = batch
    expected = reference.select(policy, scores, mask, fraction)
    torch.testing.assert_close(select(policy, scores, mask, None if policy == "all" else fraction), expected)


def test_random_is_the_specification() -> None:
    ids = np.random.default_rng(0).integers(0, 256, (3, 16), dtype=np.uint8)
    mask = torch.rand(3, 50) > 0.3
    noise = torch.from_numpy(position_uniforms(5, ids, mask.numpy(), "positions", 2))
    expected = reference.select("random", None, mask, 0.3, seed=5, sample_ids=ids, step=2)
    torch.testing.assert_close(select("random", noise, mask, 0.3), expected)


def test_random_takes_each_position_equally_often() -> None:
    n, repeats, fraction = 20, 4000, 0.2
    ids = np.arange(repeats * 16, dtype=np.uint64).astype(np.uint32).view(np.uint8).reshape(-1, 16)[:repeats]
    mask = np.ones((repeats, n), dtype=bool)
    picked = select(
        "random", torch.from_numpy(position_uniforms(0, ids, mask, "positions", 0)), torch.from_numpy(mask), fraction
    )
    shares = (picked > 0).double().mean(dim=0)
    deviation = (fraction * (1 - fraction) / repeats) ** 0.5
    assert (shares - fraction).abs().max() < 4.5 * deviation


def test_noise_does_not_move_with_padding_or_batch() -> None:
    ids = np.random.default_rng(1).integers(0, 256, (2, 16), dtype=np.uint8)
    mask = np.zeros((2, 9), dtype=bool)
    mask[0, :5], mask[1, 4:9] = True, True
    both = position_uniforms(3, ids, mask, "x", 1, draws=4)
    alone = position_uniforms(3, ids[1:], np.ones((1, 5), dtype=bool), "x", 1, draws=4)
    assert np.array_equal(both[1, 4:9], alone[0])
    assert (both[~mask] == 0).all()


@given(st.floats(1e-6, 1.0), st.integers(0, 10**6))
@settings(deadline=None)
def test_counts_lie_within_one_of_the_share(fraction: float, n: int) -> None:
    count = int(counts_of(fraction, torch.tensor([n])))
    assert fraction * n - 1e-6 <= count < fraction * n + 1
    assert count <= n


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_scores_that_are_not_finite_are_refused_by_place(bad: float) -> None:
    scores, mask = torch.zeros(2, 6), torch.ones(2, 6, dtype=torch.bool)
    scores[1, 4] = bad
    with pytest.raises(ValueError, match="position 4 in row 1"):
        select("top_k", scores, mask, 0.5)
    mask[1, 4] = False  # what is not valid is not looked at
    assert select("top_k", scores, mask, 0.5)[1, 4] == 0


def test_the_recipe_knows_the_policies_that_there_are() -> None:
    assert set(PositionPolicy.__args__) == set(POLICIES)
