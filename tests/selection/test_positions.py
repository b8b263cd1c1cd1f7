"""Position policies against the specification, on every shape that hypothesis finds; their expectations."""

from decimal import ROUND_CEILING, Decimal
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from properties import examples

from selkd import reference
from selkd.errors import RunError
from selkd.plugins import Policy
from selkd.recipe.choices import FractionSchedule, PositionOptions
from selkd.selection.position_scores import choose_positions
from selkd.selection.positions import StepContext, counts_of, fraction_at, select, step_context
from selkd.selection.queue import ScoreQueue
from selkd.selection.randomness import draw_uniforms, position_uniforms

Scored = tuple[torch.Tensor, torch.Tensor, float]


@st.composite
def scored_batches(draw: st.DrawFn) -> Scored:
    """Scores with many ties and some below 0, any mask (empty rows too), and a fraction."""
    rows, width = draw(st.integers(1, 4)), draw(st.integers(1, 30))
    values = st.sampled_from([-1e-9, 0.0, 0.5, 1.0, 2.0])
    scores = draw(st.lists(values, min_size=rows * width, max_size=rows * width))
    mask = draw(st.lists(st.booleans(), min_size=rows * width, max_size=rows * width))
    fraction = draw(st.floats(0.0025, 1.0))
    return torch.tensor(scores).double().view(rows, width), torch.tensor(mask).view(rows, width), fraction


def options_of(policy: str, **options: Any) -> PositionOptions:
    return PositionOptions.model_validate({"policy": policy, "fraction": 0.5} | options)


def batch_of(mask: torch.Tensor, ids: np.ndarray | None = None, position_ids: torch.Tensor | None = None) -> Any:
    """What a policy reads of a batch."""
    if ids is None:
        ids = np.arange(2 * len(mask), dtype=np.int64).view(np.uint8).reshape(-1, 16)
    places = torch.arange(mask.shape[1]).expand(mask.shape) if position_ids is None else position_ids
    return {"valid_mask": mask, "sample_ids": torch.from_numpy(ids.copy()), "position_ids": places}


@given(scored_batches(), st.sampled_from(["all", "top_k", "curriculum", "weighted"]), st.floats(0, 1))
@examples(200)
def test_select_is_the_specification(batch: Scored, policy: str, progress: float) -> None:
    scores, mask, fraction = batch
    expected = reference.select(policy, scores, mask, fraction, progress=progress)
    context = StepContext(0, None if policy in ("all", "weighted") else fraction, progress, None)
    torch.testing.assert_close(select(options_of(policy), scores, mask, context), expected)


@given(
    scored_batches(),
    st.sampled_from(["pos_rs", "pos_rs_corrected"]),
    st.sampled_from([0.001, 0.5, 1.0, 3.0]),
    st.sampled_from([None, 0.1, 0.9, 1.0]),
    st.integers(0, 3),
    st.sampled_from([0.0, 0.25, 1.0]),
)
@examples(300)
def test_draws_and_their_mitigations_are_the_specification(
    batch: Scored, policy: str, smoothing: float, clip: float | None, skip_first: int, coverage: float
) -> None:
    scores, mask, fraction = batch
    given = {"smoothing": smoothing, "clip": clip, "skip_first": skip_first, "coverage": coverage}
    expected = reference.select(policy, scores, mask, fraction, seed=4, step=2, **given)
    options = options_of(policy, fraction=fraction, **given)
    actual = choose_positions(options, scores, batch_of(mask), StepContext(2, fraction, 0.0, None), seed=4)
    torch.testing.assert_close(actual, expected)


@given(scored_batches(), st.integers(0, 40))
def test_gls_takes_what_reaches_the_queues_quantile(batch: Scored, seen: int) -> None:
    scores, mask, fraction = batch
    queue = ScoreQueue(100)
    queue.push(np.random.default_rng(seen).choice([0.0, 0.5, 1.0, 2.0], seen))
    context = step_context(options_of("gls", fraction=fraction, queue_size=100), 0, 1, queue)
    picked = select(options_of("gls", queue_size=100), scores, mask, context) > 0
    expected = reference.select("gls", scores, mask, fraction, queue=queue.scores, queue_size=100) > 0
    assert torch.equal(picked, expected)
    assert (context.threshold is None) == (seen < 10)


def test_a_queue_forgets_the_oldest() -> None:
    queue = ScoreQueue(20)
    assert queue.threshold(0.5) is None
    for start in range(0, 30, 6):
        queue.push(np.arange(start, start + 6))
    assert queue.scores.tolist() == list(range(10, 30))
    assert queue.threshold(0.25) == pytest.approx(10 + 0.75 * 19)  # linear interpolation


def test_random_is_the_specification() -> None:
    ids = np.random.default_rng(0).integers(0, 256, (3, 16), dtype=np.uint8)
    mask = torch.rand(3, 50) > 0.3
    noise = torch.from_numpy(position_uniforms(5, ids, mask.numpy(), "positions", 2))
    expected = reference.select("random", None, mask, 0.3, seed=5, sample_ids=ids, step=2)
    torch.testing.assert_close(select(options_of("random"), noise, mask, StepContext(2, 0.3, 0.0, None)), expected)


def test_random_takes_each_position_equally_often() -> None:
    n, repeats, fraction = 20, 4000, 0.2
    ids = np.arange(repeats * 16, dtype=np.uint64).astype(np.uint32).view(np.uint8).reshape(-1, 16)[:repeats]
    mask = np.ones((repeats, n), dtype=bool)
    noise = torch.from_numpy(position_uniforms(0, ids, mask, "positions", 0))
    picked = select(options_of("random"), noise, torch.from_numpy(mask), StepContext(0, fraction, 0.0, None))
    shares = (picked > 0).double().mean(dim=0)
    deviation = (fraction * (1 - fraction) / repeats) ** 0.5
    assert (shares - fraction).abs().max() < 4.5 * deviation


@pytest.mark.parametrize("mitigation", [{}, {"smoothing": 2.0}, {"clip": 0.7}, {"skip_first": 3}, {"coverage": 0.4}])
@pytest.mark.parametrize("policy", ["pos_rs", "pos_rs_corrected"])
def test_the_expectation_of_draws(policy: str, mitigation: dict[str, Any]) -> None:
    """pos_rs: weighted KD, sum r l. Corrected: Full KD's mean over what is eligible, whatever the mitigation."""
    n, repeats, fraction, generator = 15, 20_000, 0.4, torch.Generator().manual_seed(1)
    scores = torch.rand(n, generator=generator, dtype=torch.float64) ** 3 + 0.02
    losses = torch.rand(n, generator=generator, dtype=torch.float64)
    ids = np.random.default_rng(2).integers(0, 256, (repeats, 16), dtype=np.uint8)
    mask = torch.ones(repeats, n, dtype=torch.bool)
    options = options_of(policy, fraction=fraction, **mitigation)
    a = choose_positions(
        options, scores.expand(repeats, -1), batch_of(mask, ids), StepContext(0, fraction, 0.0, None), seed=0
    )
    estimates = a @ losses

    eligible = torch.arange(n) >= mitigation.get("skip_first", 0)
    m = int(eligible.sum())
    if policy == "pos_rs_corrected":
        expected = losses[eligible].mean()
    else:
        u = scores.clamp(max=float(np.quantile(scores.numpy(), mitigation["clip"]))) if "clip" in mitigation else scores
        r = u ** (1 / mitigation.get("smoothing", 1.0)) * eligible
        k = int(np.ceil(fraction * m - 1e-9))
        sure = torch.zeros(n, dtype=torch.bool)
        sure[scores.argsort(descending=True)[: int(np.ceil(mitigation.get("coverage", 0.0) * k - 1e-9))]] = True
        r = r.masked_fill(sure, 0) / r.masked_fill(sure, 0).sum()
        expected = (losses[sure].sum() + (k - int(sure.sum())) * (r @ losses)) / k
    error = estimates.std() / repeats**0.5
    assert abs(estimates.mean() - expected) < 4.5 * error + 1e-12
    assert (a[:, ~eligible] == 0).all()


def test_draws_do_not_move_with_padding_or_batch() -> None:
    scores, ids = torch.rand(2, 6, dtype=torch.float64), np.random.default_rng(1).integers(0, 256, (2, 16), np.uint8)
    wide = torch.full((2, 10), torch.nan, dtype=torch.float64)
    wide[:, 3:9] = scores
    mask = torch.zeros(2, 10, dtype=torch.bool)
    mask[:, 3:9] = True
    context, options = StepContext(1, 0.5, 0.0, None), options_of("pos_rs", clip=0.9)
    padded = choose_positions(options, wide, batch_of(mask, ids), context, seed=0)
    alone = choose_positions(options, scores[1:], batch_of(mask[1:, 3:9], ids[1:]), context, seed=0)
    torch.testing.assert_close(padded[1:, 3:9], alone)
    assert (padded[~mask] == 0).all()


def test_documents_of_a_packed_sample_are_skipped_one_by_one() -> None:
    position_ids = torch.tensor([[0, 1, 2, 3, 0, 1, 2, 3]])
    mask = torch.ones(1, 8, dtype=torch.bool)
    options = options_of("pos_rs", fraction=1.0, skip_first=3)
    a = choose_positions(
        options,
        torch.ones(1, 8),
        batch_of(mask, position_ids=position_ids),
        StepContext(0, 1.0, 0.0, None),
        seed=3,
    )
    assert set(a.nonzero()[:, 1].tolist()) <= {3, 7}
    assert a.sum().item() == 1


def test_noise_does_not_move_with_padding_or_batch() -> None:
    ids = np.random.default_rng(1).integers(0, 256, (2, 16), dtype=np.uint8)
    mask = np.zeros((2, 9), dtype=bool)
    mask[0, :5], mask[1, 4:9] = True, True
    both = position_uniforms(3, ids, mask, "x", 1, draws=4)
    alone = position_uniforms(3, ids[1:], np.ones((1, 5), dtype=bool), "x", 1, draws=4)
    assert np.array_equal(both[1, 4:9], alone[0])
    assert (both[~mask] == 0).all()
    draws = draw_uniforms(3, ids, np.array([2, 5]), "y")
    assert np.array_equal(draws[:1, :2], draw_uniforms(3, ids[:1], np.array([2]), "y"))
    assert (draws[0, 2:] == 0).all()


COUNTS = [
    ("0.07", 100, 7), ("0.14", 100, 14), ("0.28", 100, 28), ("0.55", 100, 55), ("0.56", 100, 56), ("0.57", 100, 57),
    ("0.1", 30, 3), ("0.2", 15, 3), ("0.0025", 400, 1), ("0.3", 0, 0), ("1.0", 7, 7),
    ("0.07", 101, 8), ("0.2", 1, 1), ("0.2", 16, 4), ("0.0025", 401, 2),
]  # fmt: skip


@pytest.mark.parametrize(("fraction", "n", "expected"), COUNTS)
def test_counts_are_rounded_up_in_decimal_arithmetic(fraction: str, n: int, expected: int) -> None:
    """In binary 0.07 * 100 is a little more than 7, and rounding it up gave 8."""
    assert counts_of(float(fraction), torch.tensor([n])).tolist() == [expected]


@given(st.integers(1, 4), st.data())
def test_counts_are_those_of_decimal_arithmetic(digits: int, data: st.DataObject) -> None:
    """Often of lengths that a fraction of so many digits divides, where binary rounding would show."""
    numerator = data.draw(st.integers(1, 10**digits))
    n = data.draw(st.one_of(st.integers(0, 10**6), st.integers(0, 100).map(lambda m: m * 10**digits)))
    expected = (Decimal(numerator).scaleb(-digits) * n).to_integral_value(ROUND_CEILING)
    assert counts_of(numerator / 10**digits, torch.tensor([n])).tolist() == [int(expected)]


@given(st.floats(1e-6, 1.0), st.integers(0, 10**6))
def test_counts_lie_within_one_of_the_share(fraction: float, n: int) -> None:
    count = int(counts_of(fraction, torch.tensor([n])))
    assert fraction * n - 1e-6 <= count < fraction * n + 1
    assert count <= n


def test_a_scheduled_fraction_moves_and_stays() -> None:
    linear = FractionSchedule.model_validate({"from": 1.0, "to": 0.2, "over": 0.3})
    assert [fraction_at(linear, step, 100) for step in (0, 15, 30, 99)] == pytest.approx([1.0, 0.6, 0.2, 0.2])
    cosine = linear.model_copy(update={"shape": "cosine"})
    values = [fraction_at(cosine, step, 100) for step in (0, 7.5, 15, 30, 60)]
    assert values == pytest.approx([1.0, 1 - 0.8 * (1 - np.cos(np.pi / 4)) / 2, 0.6, 0.2, 0.2])
    assert fraction_at(0.3, 5, 10) == 0.3


def test_the_curriculum_moves_over_steps_or_a_share_of_them() -> None:
    def progress(step: int, **options: Any) -> float:
        return step_context(options_of("curriculum", **options), step, 100).progress

    assert [progress(step) for step in (0, 50, 100)] == pytest.approx([0, 0.5, 1])
    assert [progress(step, curriculum_steps=20) for step in (0, 5, 40)] == pytest.approx([0, 0.25, 1])
    assert [progress(step, curriculum_steps=0.5) for step in (25, 50)] == pytest.approx([0.5, 1])


def test_a_users_policy_is_checked(monkeypatch: pytest.MonkeyPatch) -> None:
    mask = torch.tensor([[True, True, False]])
    answers = {
        "good": lambda scores, valid_mask: scores * valid_mask,
        "shape": lambda scores: scores[:, :2],
        "mask": lambda scores: torch.ones_like(scores),
        "nan": lambda valid_mask: valid_mask / torch.zeros(()),
    }
    for name, function in answers.items():
        monkeypatch.setitem(Policy.known(), name, Policy.of_function(name, function))
    scores, context = torch.tensor([[1.0, 3.0, 9.0]]), StepContext(0, 0.5, 0.0, None)
    assert select(options_of("good"), scores, mask, context).tolist() == [[1.0, 3.0, 0.0]]
    assert options_of("nan", metric="kl").metric is None, "it asks for no scores"
    for name, message in (("shape", "returned shape"), ("mask", "not valid"), ("nan", "not finite")):
        with pytest.raises(RunError, match=f"positions.policy: {name} .*{message}"):
            select(options_of(name), scores, mask, context)


def test_every_policy_is_specified() -> None:
    assert tuple(Policy.builtin()) == reference.POLICIES
