"""The chunked engine against the dense expressions, values and gradients."""

from typing import Any

import pytest
import torch
from torch import Tensor

from selkd import reference
from selkd.maths import chunked
from selkd.maths.chunked import ChunkedLogits, chunked_entropy, chunked_loss, chunked_statistics
from selkd.maths.divergence import ValueAndGradient
from selkd.maths.divergence import forward_kl as criterion
from selkd.maths.head import Head, NarrowHead
from selkd.maths.importance import statistics
from selkd.plugins import Criterion, Metric


def forward_kl(student_logits: Tensor, teacher_logits: Tensor) -> ValueAndGradient:
    """Forward KL, which needs no targets."""
    return criterion(student_logits, teacher_logits, torch.zeros(len(student_logits)).long())


N, D, V = 37, 24, 101
HEADS = {
    "plain": {},
    "bias": {"bias": True},
    "scale": {"scale": 0.0625},
    "softcap": {"softcap": 3.0, "bias": True},
    "scale and softcap": {"scale": 2.5, "softcap": 4.0},
}


def make(dtype: torch.dtype, **options: object) -> tuple[Tensor, Head, Tensor, Tensor]:
    """Hidden states, head, teacher logits and coefficients, a third of which are 0."""
    generator = torch.Generator().manual_seed(7)
    hidden = torch.randn(N, D, generator=generator, dtype=torch.float64)
    weight = torch.randn(V, D, generator=generator, dtype=torch.float64) * 0.4
    bias = torch.randn(V, generator=generator, dtype=torch.float64) if options.pop("bias", False) else None
    teacher = torch.randn(N, V, generator=generator, dtype=torch.float64) * 2
    coefficients = torch.rand(N, generator=generator, dtype=torch.float64) * (torch.arange(N) % 3 > 0)
    leaf = [None if t is None else t.to(dtype).requires_grad_() for t in (hidden, weight, bias)]
    return leaf[0], Head(leaf[1], leaf[2], **options), teacher, coefficients


@pytest.mark.parametrize("head_options", HEADS.values(), ids=HEADS)
@pytest.mark.parametrize("chunk", [1, 5, 36, 37, 1000, None])
def test_entropy_is_the_dense_one(head_options: dict, chunk: int | None) -> None:
    hidden, head, _, _ = make(torch.float64, **head_options)
    expected = torch.distributions.Categorical(logits=head.logits(hidden)).entropy()
    torch.testing.assert_close(chunked_entropy(hidden, head, chunk), expected.detach(), rtol=0, atol=1e-12)


def test_entropy_of_extreme_logits_is_finite_and_not_negative() -> None:
    head = Head(torch.eye(4, dtype=torch.float32) * 1e4)
    entropies = chunked_entropy(torch.tensor([[1.0, 0, 0, 0], [0, 0, 0, 0], [1, 1, 0, 0]]), head)
    torch.testing.assert_close(entropies, torch.tensor([0.0, 4.0, 2.0]).log().clamp(min=0))


@pytest.mark.parametrize("head_options", HEADS.values(), ids=HEADS)
@pytest.mark.parametrize("chunk", [1, 5, 37, 1000])
def test_loss_and_gradients_are_the_dense_ones(head_options: dict, chunk: int) -> None:
    hidden, head, teacher, coefficients = make(torch.float64, **head_options)
    leaves = [hidden, head.weight] + ([] if head.bias is None else [head.bias])

    dense = reference.divergence("forward_kl", head.logits(hidden), teacher, teacher)
    expected = torch.autograd.grad((coefficients * dense).sum() * 0.5, leaves)

    def compare(logits: Tensor, rows: slice) -> tuple[Tensor, Tensor]:
        return forward_kl(logits, teacher[rows].clone())

    loss, values = chunked_loss(hidden, head, coefficients, compare, chunk=chunk)
    torch.testing.assert_close(values, dense.detach())
    torch.testing.assert_close(loss, (coefficients * dense).sum().detach())
    for actual, wanted in zip(torch.autograd.grad(loss * 0.5, leaves), expected, strict=True):
        torch.testing.assert_close(actual, wanted, rtol=1e-10, atol=1e-12)


CRITERIA_IN_BF16 = {"forward_kl": {}, "reverse_kl": {}, "jsd": {"beta": 0.3}, "skew_kl": {"alpha": 0.1},
    "skew_reverse_kl": {"alpha": 0.1}, "total_variation": {}, "dkd": {"alpha": 1.0, "beta": 8.0}}  # fmt: skip


@pytest.mark.parametrize("name", CRITERIA_IN_BF16)
def test_bf16_is_no_worse_than_the_plain_bf16_path(name: str) -> None:
    """Against float64 truth: the chunked error is bounded by the error of plain autograd on bf16 logits."""
    options = CRITERIA_IN_BF16[name]
    hidden, head, teacher, coefficients = make(torch.float64)
    targets = torch.arange(N) % V
    truth_loss = (coefficients * reference.divergence(name, head.logits(hidden), teacher, targets, **options)).sum()
    truth = torch.autograd.grad(truth_loss, [hidden, head.weight])

    low = [t.detach().bfloat16().requires_grad_() for t in (hidden, head.weight)]
    plain_logits = Head(low[1]).logits(low[0]).float()
    plain_values = reference.divergence(name, plain_logits, teacher.float(), targets, **options)
    plain_loss = (coefficients.float() * plain_values).sum()
    plain = torch.autograd.grad(plain_loss, low)

    def compare(logits: Tensor, rows: slice) -> ValueAndGradient:
        return Criterion.find(name).function(logits, teacher[rows].float(), targets[rows], **options)

    loss, _ = chunked_loss(low[0], Head(low[1]), coefficients.float(), compare, chunk=10)
    chunked = torch.autograd.grad(loss, low)
    assert abs(loss - truth_loss) <= abs(plain_loss - truth_loss) * 1.05 + 1e-4
    for actual, other, exact in zip(chunked, plain, truth, strict=True):
        assert (actual.double() - exact).norm() <= (other.double() - exact).norm() * 1.1


@pytest.mark.parametrize("metric", reference.METRICS)
@pytest.mark.parametrize("offset", [0.0, 30.0])
def test_statistics_in_float32_are_no_worse_than_the_plain_path(metric: str, offset: float) -> None:
    """A confident teacher, whose cross-entropy is a small difference of large logits."""
    generator, targets = torch.Generator().manual_seed(0), torch.arange(200) % 97
    student, teacher = (torch.randn(200, 97, generator=generator) * 2 + offset for _ in range(2))
    teacher[torch.arange(200), targets] += 14
    mask, names = torch.ones(200, dtype=torch.bool), Metric.find(metric).statistics
    columns = statistics(names, student.clone(), teacher.clone(), targets)
    found = Metric.find(metric).combine(dict(zip(names, columns.T, strict=True)), mask).double()

    def of(dtype: torch.dtype) -> Tensor:
        return reference.importance(metric, student.to(dtype), teacher.to(dtype), targets, mask).double()

    truth, plain = of(torch.float64), of(torch.float32)
    # Twice: near p(y) = 1 both are a few roundings of a number just above 1, and which one is nearer is chance.
    assert (found - truth).norm() <= 2 * (plain - truth).norm() + 1e-6 * truth.norm()


@pytest.mark.parametrize("metric", reference.METRICS)
def test_statistics_in_bf16_are_no_worse_than_the_plain_bf16_path(metric: str) -> None:
    hidden, head, teacher, _ = make(torch.float64)
    targets, names = torch.arange(N) % V, Metric.find(metric).statistics

    def of(logits: Tensor) -> Tensor:
        return reference.importance(metric, logits[None], teacher[None].to(logits.dtype), targets[None])[0].double()

    low_hidden, low_head = hidden.bfloat16(), head.to(torch.bfloat16)
    columns = chunked_statistics(
        low_hidden, low_head, lambda z, rows: statistics(names, z, teacher[rows].float(), targets[rows]), chunk=10
    )
    found = (
        Metric.find(metric).combine(dict(zip(names, columns.T, strict=True)), torch.ones(N, dtype=torch.bool)).double()
    )
    truth, plain = of(head.logits(hidden)), of(low_head.logits(low_hidden).float())
    assert (found - truth).norm() <= (plain - truth).norm() * 1.05 + 1e-5


def test_autocast_runs_products_in_bf16_and_gives_float32_gradients() -> None:
    hidden, head, teacher, coefficients = make(torch.float32)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss, _ = chunked_loss(hidden, head, coefficients.float(), lambda z, r: forward_kl(z, teacher[r].float()))
    gradients = torch.autograd.grad(loss, [hidden, head.weight])
    exact, _ = chunked_loss(hidden, head, coefficients.float(), lambda z, r: forward_kl(z, teacher[r].float()))
    assert [gradient.dtype for gradient in gradients] == [torch.float32, torch.float32]
    assert loss != exact
    torch.testing.assert_close(loss, exact, rtol=2e-2, atol=1e-2)


def test_an_empty_selection_is_zero_and_attached() -> None:
    hidden, head, _, _ = make(torch.float64, bias=True)
    loss, values = chunked_loss(
        hidden[:0], head, torch.zeros(0, dtype=torch.float64), lambda z, _: forward_kl(z, z.clone())
    )
    assert loss.item() == 0
    assert values.numel() == 0
    for gradient in torch.autograd.grad(loss, [hidden, head.weight, head.bias]):
        assert torch.equal(gradient, torch.zeros_like(gradient))


def test_without_gradient_nothing_is_kept() -> None:
    hidden, head, teacher, coefficients = make(torch.float64)
    with torch.no_grad():
        loss, _ = chunked_loss(hidden, head, coefficients, lambda z, rows: forward_kl(z, teacher[rows].clone()))
    assert not loss.requires_grad


def test_the_embedding_that_is_also_the_head_gets_both_gradients() -> None:
    weight = torch.randn(V, D, dtype=torch.float64, requires_grad=True)
    ids = torch.arange(N) % V
    teacher = torch.randn(N, V, dtype=torch.float64)
    ones = torch.ones(N, dtype=torch.float64)
    loss, _ = chunked_loss(
        weight[ids].tanh(), Head(weight), ones, lambda z, rows: forward_kl(z, teacher[rows].clone()), chunk=9
    )
    dense = reference.divergence("forward_kl", weight[ids].tanh() @ weight.T, teacher, teacher).sum()
    torch.testing.assert_close(torch.autograd.grad(loss, weight), torch.autograd.grad(dense, weight))


@pytest.mark.parametrize("head_options", HEADS.values(), ids=HEADS)
@pytest.mark.parametrize(("piece", "chunk"), [(1, 8), (3, 7), (50, 7)])
def test_pieces_chunks_and_tiles_decide_nothing(
    head_options: dict, piece: int, chunk: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Pieces that divide no chunk, chunks that divide no batch, tiles of the head's gradient that divide no head."""
    hidden, head, teacher, coefficients = make(torch.float64, **head_options)
    leaves = [hidden, head.weight] + ([] if head.bias is None else [head.bias])
    dense = reference.divergence("forward_kl", head.logits(hidden), teacher, teacher)
    expected = torch.autograd.grad((coefficients * dense).sum() * 0.5, leaves)
    monkeypatch.setattr(chunked, "piece_size", lambda *_: piece)
    monkeypatch.setattr(chunked, "chunk_size", lambda *_: chunk)

    teachers = ChunkedLogits(teacher, Head(torch.eye(V, dtype=torch.float64)))
    loss, values = chunked_loss(hidden, head, coefficients, lambda z, rows: forward_kl(z, teachers(rows)))
    torch.testing.assert_close(values, dense.detach())
    for actual, wanted in zip(torch.autograd.grad(loss * 0.5, leaves), expected, strict=True):
        torch.testing.assert_close(actual, wanted, rtol=1e-10, atol=1e-12)
    entropies = torch.distributions.Categorical(logits=head.logits(hidden).detach()).entropy()
    torch.testing.assert_close(chunked_entropy(hidden, head), entropies, rtol=0, atol=1e-12)


def test_logits_are_handed_out_from_one_product_a_chunk(monkeypatch: pytest.MonkeyPatch) -> None:
    hidden, head, _, _ = make(torch.float64)
    monkeypatch.setattr(chunked, "chunk_size", lambda *_: 10)
    made: list[int] = []
    product = Head.logits
    monkeypatch.setattr(Head, "logits", lambda self, h, out: made.append(len(h)) or product(self, h, out))
    logits = ChunkedLogits(hidden, head)
    for start in range(0, N, 5):
        rows = slice(start, min(start + 5, N))
        found = logits(rows)
        torch.testing.assert_close(found, (hidden[rows] @ head.weight.T).detach())
        found.zero_()  # the caller's own: what is handed out next is whole
        torch.testing.assert_close(logits(rows), (hidden[rows] @ head.weight.T).detach())
    assert made == [10, 10, 10, 7]
    assert logits(slice(0, 12)).shape == (12, V)


def test_chunks_are_even_and_of_the_same_positions_in_every_precision(monkeypatch: pytest.MonkeyPatch) -> None:
    """A last chunk of one position would read the whole head, and add to its whole gradient, for that one."""
    made: list[int] = []
    product = Head.logits
    monkeypatch.setattr(Head, "logits", lambda self, h, out: made.append(len(h)) or product(self, h, out))
    monkeypatch.setitem(chunked.CHUNK_BYTES, "cpu", 2 * V * 12)  # 37 positions: 12, 12, 12 and 1 if chunks were full
    for dtype in (torch.bfloat16, torch.float32, torch.float64):
        hidden, head, teacher, coefficients = make(dtype)
        teachers = ChunkedLogits(teacher, Head(torch.eye(V, dtype=dtype)))
        chunked_entropy(hidden, head)
        chunked_loss(hidden, head, coefficients, lambda z, rows, teachers=teachers: forward_kl(z, teachers(rows)))
        assert (N, made[:4]) == (37, [10, 10, 10, 7])
        assert sorted(made[4:]) == [7, 7, 10, 10, 10, 10, 10, 10], "student and teacher, chunk by chunk"
        made.clear()


def test_the_logits_of_one_chunk_live_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    hidden, head, teacher, coefficients = make(torch.float64)
    places: list[tuple[int, int]] = []
    product = Head.logits

    def logits(self: Head, h: Tensor, out: Tensor) -> Tensor:
        places.append((out.untyped_storage().data_ptr(), out.untyped_storage().nbytes()))
        return product(self, h, out)

    monkeypatch.setattr(Head, "logits", logits)
    chunked_entropy(hidden, head, chunk=5)
    n_chunks = -(-N // 5)
    assert len(places) == n_chunks
    assert len(set(places)) == 1, "all in one place"
    loss, _ = chunked_loss(hidden, head, coefficients, lambda z, rows: forward_kl(z, teacher[rows]), chunk=5)
    loss.backward()
    assert len(places) == 2 * n_chunks
    assert len(set(places[n_chunks:])) == 1
    assert {size for _, size in places} == {5 * V * 8}, "of one chunk's size"


@pytest.mark.parametrize("head", [{}, {"bias": True}, {"scale": 0.3}, {"bias": True, "scale": 2.0, "softcap": 4.0}])
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_logits_are_the_same_in_a_place_of_their_own(head: dict[str, Any], dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(3)
    hidden, weight, bias = (torch.randn(*size, generator=generator).to(dtype) for size in ((7, 6), (11, 6), (11,)))
    made = Head(weight, **head | ({"bias": bias} if "bias" in head else {}))
    place = torch.full((9, 11), torch.nan, dtype=dtype)
    found = made.logits(hidden, out=place[:7])
    assert found.data_ptr() == place.data_ptr()
    torch.testing.assert_close(found, made.logits(hidden), rtol=1e-12 if dtype == torch.float64 else 2e-2, atol=1e-12)
    assert place[7:].isnan().all()


def test_what_a_statistic_returns_is_kept_though_its_logits_are_written_over() -> None:
    generator = torch.Generator().manual_seed(4)
    hidden, weight = torch.randn(10, 6, generator=generator), torch.randn(11, 6, generator=generator)
    found = chunked_statistics(hidden, Head(weight), lambda logits, _: logits[:, 2:4], chunk=3)
    torch.testing.assert_close(found, (hidden @ weight.T)[:, 2:4])


def test_a_kept_narrow_head_is_made_anew_when_its_weights_are_others() -> None:
    """Within a step: loaded in place, moved to another place, cut to fewer classes; and at every step."""
    weight = torch.nn.Parameter(torch.randn(7, 3))
    narrow, expected = NarrowHead(), lambda: weight.detach().bfloat16()
    first = narrow.of(Head(weight), torch.bfloat16, 0).weight
    assert narrow.of(Head(weight, scale=2.0), torch.bfloat16, 0) == Head(first, scale=2.0)
    with torch.no_grad():
        weight.copy_(torch.randn(7, 3))
    assert torch.equal(narrow.of(Head(weight), torch.bfloat16, 0).weight, expected())
    weight.data = torch.randn(7, 3)
    assert torch.equal(narrow.of(Head(weight), torch.bfloat16, 0).weight, expected())
    assert narrow.of(Head(weight).slice_vocab(5), torch.bfloat16, 0).vocab_size == 5
    weight.data.add_(1)  # no version tells it
    assert torch.equal(narrow.of(Head(weight), torch.bfloat16, 1).weight, expected())
    weight.data.add_(1)
    narrow.forget()
    assert torch.equal(narrow.of(Head(weight), torch.bfloat16, 1).weight, expected())
    assert narrow.of(Head(weight), torch.float32, 1).weight is weight
