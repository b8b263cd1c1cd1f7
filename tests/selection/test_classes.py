"""RS-KD's draws: exact counts, unbiased targets."""

import numpy as np
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from selkd.maths.divergence import forward_kl, sampled_forward_kl
from selkd.recipe import ClassSampler
from selkd.selection.classes import SAMPLERS, count_distinct, rs_kd


def as_dense(class_ids: torch.Tensor, counts: torch.Tensor, n_classes: int) -> torch.Tensor:
    return torch.zeros(len(class_ids), n_classes, dtype=torch.float64).scatter_add_(-1, class_ids, counts.double())


@given(st.integers(1, 40), st.integers(1, 30), st.integers(1, 12), st.integers(0, 2**32 - 1))
@settings(max_examples=60, deadline=None)
def test_counts_are_exact(draws: int, n_classes: int, n: int, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    probabilities = torch.softmax(torch.randn(n, n_classes, generator=generator) * 3, dim=-1)
    uniforms = torch.rand(n, draws, generator=generator, dtype=torch.float64)
    class_ids, counts = rs_kd(probabilities, uniforms)
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
    class_ids, counts = rs_kd(probabilities, uniforms)
    assert class_ids[counts > 0].tolist() == [1, 3]


def test_the_target_is_unbiased_with_the_multinomials_variance() -> None:
    draws, repeats = 16, 20000
    p = torch.softmax(torch.tensor([2.0, 1.0, 0.0, -1.0, -3.0]), dim=-1).double()
    uniforms = torch.rand(repeats, draws, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    class_ids, counts = rs_kd(p.expand(repeats, -1), uniforms)
    target = as_dense(class_ids, counts, 5) / draws
    variance = p * (1 - p) / draws
    assert ((target.mean(0) - p).abs() < 4.5 * (variance / repeats).sqrt()).all()
    torch.testing.assert_close(target.var(0), variance, rtol=0.08, atol=0)


def test_the_gradient_of_forward_kl_is_unbiased() -> None:
    repeats, n_classes, draws = 20000, 7, 8
    generator = torch.Generator().manual_seed(1)
    student, teacher = torch.randn(2, 1, n_classes, generator=generator, dtype=torch.float64)
    uniforms = torch.rand(repeats, draws, generator=generator, dtype=torch.float64)
    class_ids, counts = rs_kd(torch.softmax(teacher, -1).expand(repeats, -1), uniforms)
    _, sampled = sampled_forward_kl(student.expand(repeats, -1).clone(), class_ids, counts)
    _, exact = forward_kl(student.clone(), teacher.clone())
    assert ((sampled.mean(0) - exact[0]).abs() < 4.5 * sampled.std(0) / repeats**0.5).all()


def test_ids_beyond_17_bits_survive() -> None:
    n_classes = 200_000
    probabilities = torch.zeros(1, n_classes)
    probabilities[0, [5, 131_072, 151_935, 199_999]] = 0.25
    class_ids, counts = rs_kd(probabilities, torch.linspace(0, 0.999, 40, dtype=torch.float64)[None])
    assert class_ids[counts > 0].tolist() == [5, 131_072, 151_935, 199_999]


def test_count_distinct_pads_with_zero_counts() -> None:
    class_ids, counts = count_distinct(torch.tensor([[1, 1, 4, 9], [7, 7, 7, 7]]))
    assert counts.tolist() == [[2, 1, 1], [4, 0, 0]]
    assert class_ids.tolist() == [[1, 4, 9], [7, 0, 0]]


def test_the_recipe_knows_the_samplers_that_there_are() -> None:
    assert set(ClassSampler.__args__) == {"all", *SAMPLERS}
