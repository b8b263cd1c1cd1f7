"""Class samplers: exact counts, unbiased targets, and how far each lies from the teacher."""

import numpy as np
import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st
from properties import examples

from selkd.maths.divergence import forward_kl, sampled_forward_kl
from selkd.plugins import Sampler
from selkd.recipe.choices import ClassOptions
from selkd.selection.classes import (
    TOP_K_UNITS,
    class_sampler,
    count_distinct,
    in_units,
    rs_kd,
    systematic,
    top_k,
)

SAMPLERS = [name for name, sampler in Sampler.builtin().items() if sampler.function is not None]


def as_dense(class_ids: torch.Tensor, counts: torch.Tensor, vocab_size: int) -> torch.Tensor:
    return torch.zeros(len(class_ids), vocab_size, dtype=torch.float64).scatter_add_(-1, class_ids, counts.double())


@given(st.integers(1, 40), st.integers(1, 30), st.integers(1, 12), st.integers(0, 2**32 - 1))
@examples(60)
def test_counts_are_exact(draws: int, vocab_size: int, n: int, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    probabilities = torch.softmax(torch.randn(n, vocab_size, generator=generator) * 3, dim=-1)
    uniforms = torch.rand(n, draws, generator=generator, dtype=torch.float64)
    class_ids, counts = rs_kd(probabilities, uniforms, draws)
    assert (counts.sum(-1) == draws).all()
    # An independent reading: numpy, one position at a time.
    for row in range(n):
        cumulative = np.cumsum(probabilities[row].double().numpy())
        drawn = np.searchsorted(cumulative, uniforms[row].numpy() * cumulative[-1], side="right")
        ids, expected = np.unique(drawn, return_counts=True)
        filled = counts[row] > 0
        assert class_ids[row][filled].tolist() == ids.tolist()
        assert counts[row][filled].tolist() == expected.tolist()


def test_a_class_without_probability_is_never_drawn() -> None:
    probabilities = torch.tensor([[0.0, 0.5, 0.0, 0.5, 0.0]])
    uniforms = torch.linspace(0, 1 - 1e-12, 1001, dtype=torch.float64)[None]
    class_ids, counts = rs_kd(probabilities, uniforms, 1001)
    assert class_ids[counts > 0].tolist() == [1, 3]


@example(155, torch.float32, 155)  # the largest uniform rounds up to the whole, and the last block is empty
@given(st.integers(1, 300), st.sampled_from([torch.float32, torch.float64]), st.integers(0, 2**32 - 1))
@examples(60)
def test_a_draw_is_the_class_that_its_point_lies_in(vocab_size: int, dtype: torch.dtype, seed: int) -> None:
    """Also where whole blocks of classes have no probability, and at the borders between blocks."""
    generator = torch.Generator().manual_seed(seed)
    weights = torch.rand(5, vocab_size, generator=generator, dtype=torch.float64).pow(4)
    weights[torch.rand(5, vocab_size, generator=generator) < torch.rand(5, 1, generator=generator)] = 0
    weights[:, int(torch.randint(vocab_size, (), generator=generator))] += 1e-3
    p = (weights / weights.sum(-1, keepdim=True)).to(dtype)
    uniforms = torch.rand(5, 40, generator=generator, dtype=torch.float64)
    uniforms[0, :2] = torch.tensor([0.0, 1 - 2**-53])
    class_ids, counts = rs_kd(p, uniforms, 40)
    cumulative = p.double().cumsum(-1) / p.double().sum(-1, keepdim=True)
    for row in range(5):
        drawn = torch.repeat_interleave(class_ids[row], counts[row])
        points = uniforms[row].sort().values
        assert (p[row, drawn] > 0).all()
        tolerance = 1e-6 if dtype == torch.float32 else 1e-14
        assert (cumulative[row, drawn] >= points - tolerance).all()
        assert (cumulative[row, drawn] - p[row, drawn] <= points + tolerance).all()


def test_the_target_is_unbiased_with_the_multinomials_variance() -> None:
    draws, repeats = 16, 20000
    p = torch.softmax(torch.tensor([2.0, 1.0, 0.0, -1.0, -3.0]), dim=-1).double()
    uniforms = torch.rand(repeats, draws, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    class_ids, counts = rs_kd(p.expand(repeats, -1), uniforms, draws)
    target = as_dense(class_ids, counts, 5) / draws
    variance = p * (1 - p) / draws
    assert ((target.mean(0) - p).abs() < 4.5 * (variance / repeats).sqrt()).all()
    torch.testing.assert_close(target.var(0), variance, rtol=0.08, atol=0)


def test_the_gradient_of_forward_kl_is_unbiased() -> None:
    repeats, vocab_size, draws = 20000, 7, 8
    generator = torch.Generator().manual_seed(1)
    student, teacher = torch.randn(2, 1, vocab_size, generator=generator, dtype=torch.float64)
    uniforms = torch.rand(repeats, draws, generator=generator, dtype=torch.float64)
    class_ids, counts = rs_kd(torch.softmax(teacher, -1).expand(repeats, -1), uniforms, draws)
    _, sampled = sampled_forward_kl(student.expand(repeats, -1).clone(), class_ids, counts)
    _, exact = forward_kl(student.clone(), teacher.clone(), torch.zeros(1).long())
    assert ((sampled.mean(0) - exact[0]).abs() < 4.5 * sampled.std(0) / repeats**0.5).all()


def test_ids_beyond_17_bits_survive() -> None:
    vocab_size = 200_000
    probabilities = torch.zeros(1, vocab_size)
    probabilities[0, [5, 131_072, 151_935, 199_999]] = 0.25
    class_ids, counts = rs_kd(probabilities, torch.linspace(0, 0.999, 40, dtype=torch.float64)[None], 40)
    assert class_ids[counts > 0].tolist() == [5, 131_072, 151_935, 199_999]


def test_count_distinct_pads_with_zero_counts() -> None:
    class_ids, counts = count_distinct(torch.tensor([[1, 1, 4, 9], [7, 7, 7, 7]]))
    assert counts.tolist() == [[2, 1, 1, 0], [4, 0, 0, 0]]
    assert class_ids.tolist() == [[1, 4, 9, 0], [7, 0, 0, 0]]


@given(st.integers(1, 40), st.integers(1, 30), st.integers(1, 12), st.integers(0, 2**32 - 1))
@examples(60)
def test_systematic_counts_are_the_floor_or_the_ceiling(draws: int, vocab_size: int, n: int, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    p = torch.softmax(torch.randn(n, vocab_size, generator=generator, dtype=torch.float64) * 3, dim=-1)
    class_ids, counts = systematic(p, torch.rand(n, 1, generator=generator, dtype=torch.float64), draws)
    assert (counts.sum(-1) == draws).all()
    assert ((as_dense(class_ids, counts, vocab_size) - draws * p).abs() < 1 + 1e-9).all()


def test_systematic_is_unbiased_and_closer_than_rs_kd() -> None:
    draws, repeats = 16, 20000
    p = torch.softmax(torch.randn(40, generator=torch.Generator().manual_seed(2), dtype=torch.float64) * 2, dim=-1)
    uniforms = torch.rand(repeats, draws, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    target = as_dense(*systematic(p.expand(repeats, -1), uniforms[:, :1], draws), 40) / draws
    excess = draws * p - (draws * p).floor()  # a count is the ceiling with this probability
    variance = excess * (1 - excess) / draws**2
    assert ((target.mean(0) - p).abs() < 4.5 * (variance / repeats).sqrt() + 1e-12).all()
    torch.testing.assert_close(target.var(0), variance, rtol=0, atol=3.2e-5)  # 4.5 deviations; the largest is 1e-3
    plain = as_dense(*rs_kd(p.expand(repeats, -1), uniforms, draws), 40) / draws
    assert ((target - p) ** 2).sum() < 0.5 * ((plain - p) ** 2).sum()


def test_top_k_takes_the_largest_and_the_lower_of_equals() -> None:
    p = torch.tensor([[0.1, 0.3, 0.1, 0.5], [0.25, 0.25, 0.25, 0.25]], dtype=torch.float64)
    class_ids, weights = top_k(p, torch.zeros(2, 0), 2)
    assert class_ids.tolist() == [[1, 3], [0, 1]]
    torch.testing.assert_close(weights, p.gather(-1, class_ids))
    values, _ = sampled_forward_kl(torch.zeros(2, 4, dtype=torch.float64), class_ids, weights)
    w = np.array([3 / 8, 5 / 8])
    assert values[0].item() == pytest.approx(float((w * np.log(w * 4)).sum()))


@given(st.integers(1, 64), st.integers(0, 2**32 - 1))
@examples(50)
def test_probabilities_in_units_stay_within_one_unit(width: int, seed: int) -> None:
    p = torch.softmax(torch.randn(5, width, generator=torch.Generator().manual_seed(seed)) * 4, dim=-1)
    class_ids = torch.arange(width).expand(5, -1)
    _, counts = in_units(class_ids, p)
    assert (counts.sum(-1) == TOP_K_UNITS).all()
    exact = p.double() / p.double().sum(-1, keepdim=True)
    assert ((counts / TOP_K_UNITS - exact).abs() < 1 / TOP_K_UNITS).all()


@pytest.mark.parametrize(
    ("eighths", "expected"),
    [
        ([4, 2, 1, 1], [32_767, 16_384, 8_192, 8_192]),  # remainders .5, .75, .875, .875, and three units missing
        ([1, 7], [8_192, 57_343]),  # .875, .125
        ([7, 1], [57_343, 8_192]),
        ([4, 4], [32_768, 32_767]),  # equal remainders: the unit goes to the earlier class
        ([2, 2, 2, 2], [16_384, 16_384, 16_384, 16_383]),
        ([8], [65_535]),
        ([0, 3, 5], [0, 24_576, 40_959]),  # .625, .375
    ],
)
def test_units_go_to_the_largest_remainders(eighths: list[int], expected: list[int]) -> None:
    """Eighths, so that every product and every remainder is exact."""
    p = torch.tensor([eighths], dtype=torch.float64) / 8
    class_ids, counts = in_units(torch.arange(len(eighths))[None], p)
    assert counts.tolist() == [expected]
    assert class_ids.tolist() == [list(range(len(eighths)))]


@given(st.integers(1, 64), st.integers(0, 2**32 - 1))
@examples(50)
def test_no_class_that_is_rounded_down_has_a_larger_remainder_than_one_rounded_up(width: int, seed: int) -> None:
    p = torch.softmax(torch.randn(1, width, generator=torch.Generator().manual_seed(seed)).double() * 4, dim=-1)
    _, counts = in_units(torch.arange(width)[None], p)
    exact = p[0] / p[0].sum() * TOP_K_UNITS
    is_up, remainder = counts[0] > exact.floor(), exact - exact.floor()
    if is_up.any():  # else no unit was missing, as with a single class
        assert remainder[is_up].min() >= torch.cat([torch.zeros(1), remainder[~is_up]]).max() - 1e-9


@pytest.mark.parametrize("name", SAMPLERS)
def test_what_is_stored_sums_to_the_total(name: str) -> None:
    sampler = class_sampler(ClassOptions.model_validate({"sampler": name, "draws": 6}))
    generator = torch.Generator().manual_seed(3)
    p = torch.softmax(torch.randn(9, 30, generator=generator), dim=-1)
    uniforms = torch.rand(9, sampler.n_uniforms, generator=generator, dtype=torch.float64)
    _, counts = sampler.integers(p, uniforms)
    assert counts.dtype == torch.int64
    assert (counts.sum(-1) == sampler.total).all()
