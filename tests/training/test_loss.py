"""The engine's public functions against the specification on full logits."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import linear
from torch.utils.checkpoint import checkpoint

import selkd
from selkd import reference
from selkd.errors import InputError, RunError
from selkd.maths import chunked

B, T, V, D = 3, 11, 37, 8


class Case:
    """A student and a teacher of other width, as hidden states and heads, and what the specification takes."""

    def __init__(self, dtype: torch.dtype = torch.float64) -> None:
        torch.manual_seed(0)
        self.hidden = (torch.randn(B, T, D, dtype=dtype) * 2).requires_grad_()
        self.head = nn.Linear(D, V, dtype=dtype)
        self.teacher_hidden, self.teacher_head = torch.randn(B, T, 12, dtype=dtype) * 2, nn.Linear(12, V, dtype=dtype)
        self.targets = torch.randint(0, V, (B, T))
        self.valid = torch.rand(B, T) < 0.8
        self.ids = torch.arange(B * 16, dtype=torch.uint8).view(B, 16)

    @property
    def logits(self) -> Tensor:
        return self.head(self.hidden)

    @property
    def teacher_logits(self) -> Tensor:
        return self.teacher_head(self.teacher_hidden).detach()

    @property
    def live(self) -> dict[str, Any]:
        return {"hidden_states": self.teacher_hidden, "lm_head": self.teacher_head}

    def gradients(self, loss: Tensor) -> tuple[Tensor, ...]:
        return torch.autograd.grad(loss, [self.hidden, self.head.weight, self.head.bias])


@pytest.fixture(autouse=True)
def small_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(chunked, "chunk_size", lambda *_: 5)


SE_KD = {"metric": "student_entropy", "fraction": 0.2}
CHOICES: list[dict[str, Any]] = [
    {},
    {"positions": SE_KD},
    {"positions": {"policy": "all"}, "criterion": {"temperature": 1.7, "kd_weight": 0.6}},
    {"positions": {"metric": "soft_or", "fraction": 0.4, "reduction": "per_position"}, "criterion": {"name": "jsd"}},
    {"positions": {"policy": "random", "fraction": 0.5}, "criterion": {"name": "reverse_kl"}},
    {"positions": {"policy": "pos_rs_corrected", "metric": "kl", "fraction": 0.5}},
    {
        "positions": {"metric": "student_entropy", "fraction": {"from": 0.9, "to": 0.3}, "policy": "curriculum"},
        "criterion": {"name": "at_kd"},
    },
]


@pytest.mark.parametrize("choice", CHOICES, ids=str)
@pytest.mark.parametrize("form", ["hidden states", "logits"])
def test_a_loss_is_the_specifications(choice: dict[str, Any], form: str) -> None:
    case = Case()
    teacher = case.live if form == "hidden states" else {"logits": case.teacher_logits}
    where = {"step": 3, "total_steps": 10, "seed": 7}
    expected = reference.loss(
        case.logits, case.teacher_logits, case.targets, case.valid, choice, sample_ids=case.ids.numpy(), **where
    )
    result = selkd.distillation_loss(
        case.hidden, case.head, teacher, case.targets, case.valid, sample_ids=case.ids, **choice, **where
    )
    torch.testing.assert_close(result.loss, expected, rtol=1e-10, atol=1e-12)
    for actual, other in zip(case.gradients(0.5 * result.loss), case.gradients(0.5 * expected), strict=True):
        torch.testing.assert_close(actual, other, rtol=1e-8, atol=1e-11)
    chosen = result.coefficients > 0
    assert int(result.sums["positions_selected"]) == int(chosen.sum())
    assert not result.values[~chosen].any()
    if "reduction" not in choice.get("positions", {}):
        by_hand = (result.coefficients * result.values).sum(-1).mean()
        torch.testing.assert_close(by_hand, expected.detach())


def test_draws_of_a_teacher_are_its_target() -> None:
    """What ``sample_classes`` returns is what ``classes`` draws live at the same step, seed and samples."""
    case, classes = Case(), {"sampler": "rs_kd", "draws": 9}
    drawn = selkd.sample_classes(case.live, classes, step=4, seed=2, sample_ids=case.ids)
    assert drawn["counts"].sum(-1).unique().tolist() == [9]
    expected = reference.loss(
        case.logits, case.teacher_logits, case.targets, case.valid, {"positions": SE_KD, "classes": classes}, **drawn
    )
    given = selkd.distillation_loss(case.hidden, case.head, drawn, case.targets, case.valid, positions=SE_KD)
    torch.testing.assert_close(given.loss, expected)
    everywhere = torch.ones_like(case.valid)
    live, stored = (
        selkd.distillation_loss(
            case.hidden, case.head, teacher, case.targets, everywhere, classes=part, step=4, seed=2, sample_ids=case.ids
        )
        for teacher, part in ((case.live, classes), (drawn, None))
    )
    torch.testing.assert_close(live.loss, stored.loss)


RS_KD, TOP_K = {"sampler": "rs_kd", "draws": 12}, {"sampler": "top_k", "draws": 4}


def with_scalars(case: Case, classes: dict[str, Any]) -> dict[str, Tensor]:
    """What is drawn of the case's teacher, with its entropy and log p(y) beside."""
    log_p = case.teacher_logits.log_softmax(-1)
    scalars = {
        "entropy_nats": -(log_p.exp() * log_p).sum(-1),
        "ce_nats": -log_p.gather(-1, case.targets.unsqueeze(-1)).squeeze(-1),
    }
    return selkd.sample_classes(case.live, classes, sample_ids=case.ids) | scalars


def test_counts_that_are_told_to_be_unbiased_draws_give_kl() -> None:
    case = Case()
    teacher = with_scalars(case, RS_KD)
    given = (case.hidden, case.head, teacher, case.targets, case.valid)
    result = selkd.distillation_loss(*given, classes=RS_KD, positions={"policy": "all"})
    log_q = case.logits.log_softmax(-1).gather(-1, teacher["class_ids"])
    kl = (-teacher["entropy_nats"] - (teacher["counts"] / 12 * log_q).sum(-1))[case.valid]
    torch.testing.assert_close(result.sums["kl_nats"].double(), kl.sum().detach())
    scored = selkd.distillation_loss(*given, classes=RS_KD, positions={"metric": "kl", "fraction": 0.3})
    assert scored.scores[case.valid].ne(0).all()
    assert "kl_nats" in scored.sums


@pytest.mark.parametrize("classes", [None, TOP_K])
def test_counts_that_are_not_known_to_be_unbiased_draws_give_no_kl(classes: dict[str, Any] | None) -> None:
    """A renormalised top_k looks like draws, and its estimate of KL is too low at every position."""
    case = Case()
    given = (case.hidden, case.head, with_scalars(case, classes or RS_KD), case.targets, case.valid)
    for metric in ("student_entropy", "teacher_entropy", "ce_ratio"):
        result = selkd.distillation_loss(*given, classes=classes, positions={"metric": metric})
        assert "kl_nats" not in result.sums
    with pytest.raises(InputError, match=r"positions\.metric: kl is estimated from unbiased draws, and (counts|those)"):
        selkd.distillation_loss(*given, classes=classes, positions={"metric": "kl"})
    with pytest.raises(InputError, match="pos_rs_corrected is Full KD in expectation only where"):
        selkd.distillation_loss(*given, classes=RS_KD, positions={"metric": "kl", "policy": "pos_rs_corrected"})


def test_a_batch_of_draws_without_a_valid_position_adds_zero() -> None:
    """So a process or a micro-batch that has only padding takes part in the step."""
    case = Case()
    teacher = with_scalars(case, RS_KD) | {"counts": torch.zeros(B, T, 3), "class_ids": torch.zeros(B, T, 3).long()}
    nowhere = torch.zeros_like(case.valid)
    result = selkd.distillation_loss(
        case.hidden, case.head, teacher, case.targets, nowhere, classes=RS_KD, positions={"metric": "kl"}, divisor=4.0
    )
    assert result.loss.item() == 0
    assert not any(gradient.any() for gradient in case.gradients(result.loss))


def test_a_teachers_top_classes_keep_the_mass_of_all_others() -> None:
    case = Case()
    log_p = case.teacher_logits.log_softmax(-1)
    known, class_ids = log_p.topk(5)
    expected = reference.truncated_divergence(case.logits, class_ids, known)
    result = selkd.distillation_loss(
        case.hidden, case.head, {"class_ids": class_ids, "log_probabilities": known}, case.targets, case.valid,
        positions={"policy": "all"},
    )  # fmt: skip
    torch.testing.assert_close(result.values, expected.detach().masked_fill(~case.valid, 0))
    by_hand = ((expected * case.valid).sum(-1) / case.valid.sum(-1)).mean()
    for actual, other in zip(case.gradients(result.loss), case.gradients(by_hand), strict=True):
        torch.testing.assert_close(actual, other, rtol=1e-8, atol=1e-11)
    full = reference.divergence("forward_kl", case.logits, case.teacher_logits, case.targets)
    assert (expected >= 0).all()
    assert (expected <= full + 1e-12).all()


def test_a_divisor_joins_micro_batches() -> None:
    case = Case()
    options = {"positions": {"policy": "top_k", "fraction": 0.3, "reduction": "per_sample"}}
    whole = selkd.distillation_loss(case.hidden, case.head, case.live, case.targets, case.valid, **options)
    halves = [
        selkd.distillation_loss(
            case.hidden[rows], case.head, {**case.live, "hidden_states": case.teacher_hidden[rows]},
            case.targets[rows], case.valid[rows], divisor=divisor, **options,
        ).loss
        for rows, divisor in ((slice(0, 1), B), (slice(1, B), torch.tensor(B)))
    ]  # fmt: skip
    torch.testing.assert_close(sum(halves), whole.loss)


class Capped(nn.Module):
    def forward(self, hidden: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        return 5.0 * torch.tanh(0.7 * linear(hidden, weight, bias) / 5.0)


HEADS: dict[str, tuple[Callable[[Case], Any], Callable[[Case], Tensor]]] = {
    "layer": (lambda case: case.head, lambda case: case.logits),
    "weight": (lambda case: case.head.weight, lambda case: linear(case.hidden, case.head.weight)),
    "embedding": (
        lambda case: nn.Embedding.from_pretrained(case.head.weight),
        lambda case: linear(case.hidden, case.head.weight),
    ),
    "mapping": (
        lambda case: {"weight": case.head.weight, "bias": case.head.bias, "scale": 0.7, "softcap": 5.0},
        lambda case: Capped()(case.hidden, case.head.weight, case.head.bias),
    ),
}


@pytest.mark.parametrize("form", HEADS)
def test_a_head_may_have_any_form(form: str) -> None:
    case = Case()
    given, logits_of = HEADS[form]
    logits = logits_of(case).detach()
    expected = torch.distributions.Categorical(logits=logits).entropy()
    torch.testing.assert_close(selkd.chunked_entropy(case.hidden, given(case)), expected)
    result = selkd.distillation_loss(case.hidden, given(case), case.live, case.targets, case.valid, positions=SE_KD)
    torch.testing.assert_close(
        result.loss.detach(),
        reference.loss(logits, case.teacher_logits, case.targets, case.valid, {"positions": SE_KD}),
    )


def test_positions_are_the_specifications() -> None:
    torch.manual_seed(1)
    scores, valid = torch.rand(B, T, dtype=torch.float64), torch.rand(B, T) < 0.7
    for policy in ("all", "top_k", "random", "curriculum", "pos_rs", "weighted"):
        actual = selkd.select_positions(scores, valid, {"policy": policy}, step=1, total_steps=4, seed=3)
        fraction = None if policy in ("all", "weighted") else 0.2
        expected = reference.select(policy, scores, valid, fraction, progress=0.25, seed=3, step=1)
        torch.testing.assert_close(actual.double(), expected.double(), msg=policy)
    for given, fraction in ((None, 0.2), ({"fraction": 0.5}, 0.5), ({"policy": None}, 0.2)):
        actual = selkd.select_positions(scores, valid, given)
        expected = reference.select("top_k", scores, valid, fraction)
        torch.testing.assert_close(actual.double(), expected.double(), msg="who has scores means the highest")


def test_targets_of_transformers_are_understood() -> None:
    """Without a mask, positions with the target -100 are not valid."""
    case = Case()
    labels = case.targets.masked_fill(~case.valid, -100)
    masked, unmasked = (
        selkd.distillation_loss(case.hidden, case.head, case.live, *given, positions=SE_KD).loss
        for given in ((case.targets, case.valid), (labels,))
    )
    assert masked == unmasked


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_low_precision_and_autocast(dtype: torch.dtype) -> None:
    case = Case(torch.float32)
    with torch.autocast("cpu", dtype=dtype):
        result = selkd.distillation_loss(
            case.hidden, case.head, case.live, case.targets, case.valid, positions={"policy": "all"}
        )
    exact = reference.loss(case.logits, case.teacher_logits, case.targets, case.valid, {"positions": {"policy": "all"}})
    assert result.loss.dtype == torch.float32
    torch.testing.assert_close(result.loss, exact, rtol=0.02, atol=0)
    assert all(gradient.dtype == torch.float32 for gradient in case.gradients(result.loss))


def test_it_works_without_gradient_under_checkpointing_and_around_a_compiled_body() -> None:
    case = Case(torch.float32)
    body = nn.Sequential(nn.Linear(D, D), nn.Tanh())
    inputs = case.hidden.detach()

    def loss_of(hidden: Tensor) -> Tensor:
        return selkd.distillation_loss(hidden, case.head, case.live, case.targets, case.valid, positions=SE_KD).loss

    plain = loss_of(body(inputs))
    expected = torch.autograd.grad(plain, [*body.parameters(), case.head.weight])
    with torch.no_grad():
        assert loss_of(body(inputs)) == plain
    recomputed = checkpoint(lambda x: loss_of(body(x)), inputs, use_reentrant=False)
    compiled = loss_of(torch.compile(body, backend="eager")(inputs))
    for loss in (recomputed, compiled):
        torch.testing.assert_close(loss, plain)
        for actual, other in zip(
            torch.autograd.grad(loss, [*body.parameters(), case.head.weight]), expected, strict=True
        ):
            torch.testing.assert_close(actual, other)


REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "no teacher": ({"teacher": {}}, "teacher: expected a mapping of one of: hidden_states and lm_head; logits"),
    "two teachers": ({"teacher": {"logits": torch.ones(B, T, V), "counts": torch.ones(B, T, 2)}}, "Got logits, counts"),
    "a typing error": ({"criterion": {"nam": "forward_kl"}}, "criterion.nam: unknown key.*Did you mean 'name'"),
    "another shape": ({"targets": torch.zeros(B, T - 1, dtype=torch.int64)}, r"targets: expected \[3, 11\]"),
    "teacher's shape": ({"teacher": {"logits": torch.ones(B, T + 1, V)}}, r"teacher.logits: expected \[3, 11, …\]"),
    "another vocabulary": ({"teacher": {"logits": torch.ones(B, T, V + 3)}}, "vocab_size: the student has 37 classes"),
    "another width": ({"lm_head": nn.Linear(D + 1, V)}, r"lm_head: expected a weight \[V, 8\]"),
    "a queue": ({"positions": {"policy": "gls"}}, "gls keeps a queue"),
    "a biased estimate": (
        {
            "teacher": {"class_ids": torch.zeros(B, T, 1, dtype=torch.int64), "counts": torch.ones(B, T, 1)},
            "criterion": {"name": "reverse_kl"},
        },
        "criterion.name: reverse_kl of drawn classes",
    ),
    "a metric of the whole": (
        {
            "teacher": {"class_ids": torch.zeros(B, T, 1, dtype=torch.int64), "counts": torch.ones(B, T, 1)},
            "positions": {"metric": "kl"},
        },
        "positions.metric: kl needs the teacher",
    ),
    "a class too many": (
        {"teacher": {"class_ids": torch.full((B, T, 1), V), "counts": torch.ones(B, T, 1)}},
        "teacher.class_ids: expected classes below 37",
    ),
    "float targets": ({"targets": torch.zeros(B, T)}, "targets: expected token ids"),
    "a tail that counts can't tell": (
        {
            "teacher": {"class_ids": torch.zeros(B, T, 1, dtype=torch.int64), "counts": torch.ones(B, T, 1)},
            "classes": {"sampler": "top_k", "draws": 1, "tail": True},
        },
        "classes: these tell how counts were drawn, without a tail",
    ),
    "two-stage alone": ({"positions": {"scoring": "two_stage"}}, "two_stage needs token_counts"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_refused_is_named(name: str) -> None:
    case = Case()
    given, message = REFUSED[name]
    arguments = {"lm_head": case.head, "teacher": case.live, "targets": case.targets, "valid_mask": case.valid} | given
    with pytest.raises(InputError, match=message):
        selkd.distillation_loss(case.hidden, **arguments)


def test_classes_are_not_sampled_of_what_is_not_finite() -> None:
    logits = torch.zeros(2, 5, 9)
    logits[1, 3, 2] = torch.inf
    with pytest.raises(RunError, match=r"position 3 of sample [0-9a-f]{32} gives nan from the teacher's logits"):
        selkd.sample_classes({"logits": logits}, {"sampler": "rs_kd", "draws": 4})


def test_a_number_that_is_not_finite_is_told_with_its_place() -> None:
    case = Case()
    hidden = case.hidden.detach().clone()
    case.valid[1, 4] = True
    hidden[1, 4] = torch.nan
    for positions in (None, SE_KD):  # found in the comparison, and while scoring
        with pytest.raises(RunError, match="position 4 of row 1 of the batch gives nan"):
            selkd.distillation_loss(hidden, case.head, case.live, case.targets, case.valid, positions=positions)


def test_targets_on_another_device_are_refused() -> None:
    hidden, weight = torch.zeros(1, 4, 8, device="meta"), torch.zeros(11, 8, device="meta")
    with pytest.raises(InputError, match="targets: expected on meta, where hidden_states are; got cpu"):
        selkd.distillation_loss(hidden, weight, {"logits": torch.zeros(1, 4, 11)}, torch.zeros(1, 4, dtype=torch.int64))
