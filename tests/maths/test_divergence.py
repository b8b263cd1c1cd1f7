"""The closed forms of the criteria against the specification: values by definition, gradients by autograd."""

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from selkd import reference
from selkd.maths.divergence import (
    adaptive_weights,
    cross_entropy,
    differentiated,
    sampled_forward_kl,
    truncated_forward_kl,
)
from selkd.plugins import Criterion

N, V = 37, 29
OPTIONS: list[tuple[str, dict[str, float]]] = [
    ("forward_kl", {}),
    ("reverse_kl", {}),
    ("jsd", {"beta": 0.5}),
    ("jsd", {"beta": 0.03}),
    ("skew_kl", {"alpha": 0.1}),
    ("skew_kl", {"alpha": 0.9}),
    ("skew_reverse_kl", {"alpha": 0.1}),
    ("skew_reverse_kl", {"alpha": 0.9}),
    ("total_variation", {}),
    ("dkd", {"alpha": 1.0, "beta": 8.0}),
    ("dkd", {"alpha": 0.3, "beta": 0.0}),
    ("at_kd", {}),
]


def make(dtype: torch.dtype = torch.float64, spread: float = 1.5) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(5)
    student, teacher = (torch.randn(N, V, generator=generator, dtype=torch.float64) * spread for _ in range(2))
    return student.to(dtype).requires_grad_(), teacher.to(dtype), torch.randint(V, (N,), generator=generator)


def compared(name: str, options: dict[str, Any], student: Tensor, teacher: Tensor, targets: Tensor) -> Any:
    criterion = Criterion.find(name)
    if criterion.position_weights is not None:
        log_p_target = torch.log_softmax(teacher, -1).gather(-1, targets.unsqueeze(-1)).squeeze(-1)
        options = criterion.position_weights(log_p_target, torch.zeros_like(targets))
    return criterion.function(student.detach().clone(), teacher.clone(), targets, **options)


@pytest.mark.parametrize(("name", "options"), OPTIONS)
def test_values_and_gradients_are_the_specifications(name: str, options: dict[str, float]) -> None:
    student, teacher, targets = make()
    dense = reference.divergence(name, student[None], teacher[None], targets[None], **options)[0]
    values, gradient = compared(name, options, student, teacher, targets)
    torch.testing.assert_close(values, dense.detach(), rtol=0, atol=1e-11)
    torch.testing.assert_close(gradient, torch.autograd.grad(dense.sum(), student)[0], rtol=0, atol=1e-10)


def known(teacher: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """The k most probable classes and their log-probabilities, the last two of every third row padded."""
    log_p, class_ids = torch.log_softmax(teacher, -1).topk(k)
    log_p[::3, k - 2 :], class_ids[::3, k - 2 :] = -torch.inf, 0
    return class_ids, log_p


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("k", [3, 8, V - 1])
def test_a_truncated_teachers_tail_is_one_class(k: int, dtype: torch.dtype) -> None:
    student, teacher, _ = make(dtype)
    class_ids, log_p = known(teacher, k)
    dense = reference.truncated_divergence(student[None].double(), class_ids[None], log_p[None].double())[0]
    values, gradient = truncated_forward_kl(student.detach().clone(), class_ids, log_p)
    tolerance = 1e-12 if dtype == torch.float64 else 2e-6
    torch.testing.assert_close(values.double(), dense.detach(), rtol=tolerance, atol=tolerance)
    expected = torch.autograd.grad(dense.sum(), student)[0]
    torch.testing.assert_close(gradient, expected, rtol=tolerance, atol=tolerance)
    torch.testing.assert_close(gradient.sum(-1), torch.zeros_like(values), rtol=0, atol=10 * tolerance)
    whole = reference.divergence("forward_kl", student[None], teacher[None], torch.zeros(1, N, dtype=torch.int64))[0]
    assert (values >= 0).all()
    assert (values <= whole + 1e-6).all()


def test_a_truncated_teacher_of_every_class_is_the_whole_one() -> None:
    """Rounding leaves a tail that no class is in, or probabilities that sum to more than 1."""
    for dtype, excess in ((torch.float64, 0.0), (torch.float32, 0.0), (torch.float32, 1e-6)):
        student, teacher, targets = make(dtype)
        log_p, class_ids = torch.log_softmax(teacher, -1).sort(-1)
        values, gradient = truncated_forward_kl(student.detach().clone(), class_ids, log_p + excess)
        whole = Criterion.find("forward_kl").function(student.detach().clone(), teacher.clone(), targets)
        torch.testing.assert_close((values, gradient), whole, rtol=1e-5, atol=1e-5)


def test_where_no_class_is_known_nothing_is_learned() -> None:
    """Its tail is everything: an imported teacher's row beyond the end of its file."""
    student = torch.randn(3, V, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    class_ids, log_p = torch.zeros(3, 4, dtype=torch.int64), torch.full((3, 4), -torch.inf, dtype=torch.float64)
    class_ids[1], log_p[1] = torch.tensor([1, 2, 5, 7]), torch.tensor([0.4, 0.3, 0.1, 0.1]).double().log()
    values, gradient = truncated_forward_kl(student.clone(), class_ids, log_p)
    assert values[1] > 0.01
    torch.testing.assert_close(values[[0, 2]], torch.zeros(2, dtype=torch.float64), rtol=0, atol=1e-12)
    torch.testing.assert_close(gradient[[0, 2]], torch.zeros(2, V, dtype=torch.float64), rtol=0, atol=1e-12)


def test_a_tail_that_underflows_is_finite() -> None:
    """A student that is sure of a known class, and a teacher that is sure of another."""
    student = torch.full((2, V), -400.0)
    student[:, 3] = 0.0
    class_ids, log_p = torch.tensor([[3, 5], [3, 5]]), torch.log(torch.tensor([[0.5, 0.25], [1e-30, 1.0]]))
    values, gradient = truncated_forward_kl(student, class_ids, log_p)
    assert values.isfinite().all()
    assert gradient.isfinite().all()
    log_rest = math.log(V - 2) - 400
    by_hand = 0.5 * math.log(0.5) + 0.25 * (math.log(0.25) + 400) + 0.25 * (math.log(0.25) - log_rest)
    assert values[0].item() == pytest.approx(by_hand, rel=1e-5)


def test_every_criterion_is_checked() -> None:
    assert {name for name, _ in OPTIONS} == set(reference.CRITERIA)
    assert {name: criterion.options for name, criterion in Criterion.builtin().items()} == reference.CRITERIA


@pytest.mark.parametrize(("name", "options"), OPTIONS)
def test_peaked_distributions_stay_finite_in_float32(name: str, options: dict[str, float]) -> None:
    """Logits of a hundred nats: probabilities underflow, logarithms do not."""
    student, teacher, targets = make(torch.float32, spread=60.0)
    values, gradient = compared(name, options, student, teacher, targets)
    assert torch.isfinite(values).all()
    assert torch.isfinite(gradient).all()
    exact = make(torch.float64, spread=60.0)
    expected, expected_gradient = compared(name, options, *exact)
    torch.testing.assert_close(values.double(), expected, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(gradient.double(), expected_gradient, rtol=1e-3, atol=5e-3)  # of hundreds of nats


@pytest.mark.parametrize(("name", "options"), OPTIONS)
def test_equal_distributions_cost_nothing(name: str, options: dict[str, float]) -> None:
    student, _, targets = make()
    values, gradient = compared(name, options, student, student.detach(), targets)
    torch.testing.assert_close(values, torch.zeros_like(values), rtol=0, atol=1e-12)
    torch.testing.assert_close(gradient, torch.zeros_like(gradient), rtol=0, atol=1e-12)


def test_text_and_drawn_classes_are_the_specifications() -> None:
    student, _, targets = make()
    class_ids = torch.stack([torch.randperm(V)[:6].sort().values for _ in range(N)])
    counts = torch.tensor([[3, 1, 2, 1, 1, 0]]).expand(N, -1)
    for (values, gradient), dense in (
        (
            sampled_forward_kl(student.detach().clone(), class_ids, counts),
            reference.sampled_divergence(student, class_ids, counts),
        ),
        (
            cross_entropy(student.detach().clone(), targets),
            torch.nn.functional.cross_entropy(student, targets, reduction="none"),
        ),
    ):
        torch.testing.assert_close(values, dense.detach())
        torch.testing.assert_close(gradient, torch.autograd.grad(dense.sum(), student, retain_graph=True)[0])


def test_adaptive_weights_average_to_the_means_of_hard_and_easy() -> None:
    p_target = torch.rand(11, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    sample = torch.tensor([0, 1, 0, 0, 1, 0, 3, 1, 0, 1, 1])  # sample 2 has none, sample 3 a single one
    weights = adaptive_weights(p_target.log(), sample)
    for row, m in ((0, 5), (1, 5), (3, 1)):
        mine = sample == row
        hard = mine & (weights["alpha"] > 0)
        assert int(hard.sum()) == (m + 1) // 2
        assert p_target[hard].max() <= p_target[mine & ~hard].min() if m > 1 else True
        torch.testing.assert_close(weights["beta"][mine].mean(), torch.tensor(1.0, dtype=torch.float64))
        assert float(weights["beta"][hard].sum() / m) == pytest.approx(0.8 if m > 1 else 1.0)


@pytest.mark.parametrize("offset", [0.0, 30.0, 100.0])
@pytest.mark.parametrize(("name", "options"), OPTIONS)
def test_float32_is_no_worse_than_the_plain_path(name: str, options: dict[str, float], offset: float) -> None:
    """Logits of real models lie far from 0; float64 is the truth, plain float32 on torch's own softmax the bound."""
    student, teacher, targets = make(torch.float32)
    student, teacher = (student.detach() + offset).requires_grad_(), teacher + offset
    wide_student = student.detach().double().requires_grad_()
    truth = reference.divergence(name, wide_student[None], teacher.double()[None], targets[None], **options)[0]
    (true_gradient,) = torch.autograd.grad(truth.sum(), wide_student)
    plain = reference.divergence(name, student[None], teacher[None], targets[None], **options)[0]
    (plain_gradient,) = torch.autograd.grad(plain.sum(), student)
    values, gradient = compared(name, options, student, teacher, targets)
    assert (values.double() - truth).norm() <= 1.5 * (plain.double() - truth).norm() + 1e-6
    assert (gradient.double() - true_gradient).norm() <= 1.5 * (plain_gradient.double() - true_gradient).norm() + 1e-6


def test_what_is_differentiated_must_depend_on_the_student_and_be_finite() -> None:
    def squared(student_logits: Tensor, teacher_logits: Tensor, _: Tensor) -> Tensor:
        return ((student_logits - teacher_logits) ** 2).mean(-1)

    student, teacher, targets = make()
    with pytest.raises(ValueError, match="mine does not depend on student_logits"):
        differentiated(lambda _, teacher_logits, __: teacher_logits.sum(-1), "mine")(student, teacher, targets)
    with pytest.raises(ValueError, match="mine has a gradient that is not finite"):
        differentiated(lambda logits, *_: (logits * 0).sqrt().sum(-1), "mine")(student, teacher, targets)
    values, gradient = differentiated(squared, "mine")(student.detach().clone(), teacher, targets)
    torch.testing.assert_close(values, squared(student, teacher, targets).detach())
    torch.testing.assert_close(gradient, (2 * (student - teacher) / V).detach())
