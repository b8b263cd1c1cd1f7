"""The objective itself on the oracle cases: the head is the identity, so hidden states are the student's logits."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from test_reference import CRITERIA, LOSSES, drawn, recipe_of
from torch import Tensor

from selkd import reference
from selkd.maths import chunked
from selkd.maths.head import Head
from selkd.recipe.choices import CriterionOptions, PositionOptions
from selkd.recipe.part import parse_part
from selkd.selection.positions import step_context
from selkd.teacher.targets import DrawnClasses, FullDistribution, Target
from selkd.training.objective import Objective


@dataclass(frozen=True)
class OracleTeacher:
    """Targets [n, V] (or drawn classes [n, C]) of the case, with the interface of a teacher's."""

    full: Tensor
    drawn: tuple[Tensor, Tensor] | None = None
    checks: tuple[()] = ()

    def at(self, index: Tensor) -> "OracleTeacher":
        picked = None if self.drawn is None else (self.drawn[0][index], self.drawn[1][index])
        return OracleTeacher(self.full[index], picked)

    @property
    def knows_kl(self) -> bool:
        return self.drawn is None

    def scored_by(self) -> Callable[[slice], Tensor]:
        return self.logits

    def logits(self, rows: slice) -> Tensor:
        return self.full[rows].clone()

    def chunk(self, rows: slice) -> Target:
        if self.drawn is None:
            return FullDistribution(self.logits(rows))
        return DrawnClasses(self.drawn[0][rows], self.drawn[1][rows])


def batch_of(case: dict[str, Any]) -> dict[str, Tensor]:
    rows, width = case["targets"].shape
    return {
        "targets": case["targets"],
        "valid_mask": case["valid_mask"].bool(),
        "sample_ids": torch.arange(rows * 16, dtype=torch.uint8).view(rows, 16),
        "position_ids": torch.arange(width).expand(rows, -1),
    }


def run(case: dict[str, Any], recipe: dict[str, Any], factor: float = 1.0, **where: Any) -> tuple[Tensor, Tensor]:
    """The objective's loss and ``factor`` times it differentiated with respect to the logits."""
    criterion = parse_part(CriterionOptions, recipe.get("criterion", {}))
    positions = parse_part(PositionOptions, recipe.get("positions", {}))
    objective, batch = Objective(criterion, positions, seed=0), batch_of(case)
    context = step_context(positions, where.get("step", 0), where.get("total_steps", 1))
    picked = tuple(t.flatten(0, 1) for t in drawn(case).values()) if "classes" in recipe else None
    vocab_size = case["student_logits"].shape[-1]
    head = Head(torch.eye(vocab_size, dtype=torch.float64).requires_grad_())
    hidden = case["student_logits"].clone().requires_grad_()
    outputs = objective(
        hidden,
        head,
        batch,
        OracleTeacher(case["teacher_logits"].flatten(0, 1), picked),
        context=context,
        normaliser=objective.normaliser(batch, context),
    )
    (gradient,) = torch.autograd.grad(outputs["loss"] * factor, hidden)
    return outputs["loss"].detach(), gradient


@pytest.fixture(params=[1, 3, 1000])
def chunk(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> int:
    """Positions of a chunk: one, a number that divides nothing, all."""
    monkeypatch.setattr(chunked, "chunk_size", lambda *_: request.param)
    return int(request.param)


@pytest.mark.usefixtures("chunk")
def test_losses_and_gradients_are_the_oracles(case: dict[str, Any]) -> None:
    for name in case["loss"] | case["grad_student_logits"]:
        loss, gradient = run(case, recipe_of(case, name))
        if name in case["loss"]:
            assert loss.item() == pytest.approx(case["loss"][name], abs=1e-8), name
        if name in case["grad_student_logits"]:
            expected = torch.tensor(case["grad_student_logits"][name], dtype=torch.float64)
            torch.testing.assert_close(gradient, expected, rtol=0, atol=1e-6, msg=name)
    assert set(LOSSES) == set(case["loss"])


POSITIONS: list[dict[str, Any]] = [
    {"policy": "all"},
    {"metric": "soft_or", "fraction": 0.4, "reduction": "per_position"},
    {"policy": "weighted", "metric": "kl"},
    {"policy": "pos_rs_corrected", "metric": "ce_ratio", "fraction": 0.5, "coverage": 0.3},
    {"policy": "curriculum", "fraction": {"from": 0.9, "to": 0.3, "over": 0.5}, "curriculum_steps": 7},
]


ALL_CRITERIA = {**CRITERIA, "at_kd_temperature_1.7": {"name": "at_kd", "temperature": 1.7}}


@pytest.mark.parametrize("criterion", ALL_CRITERIA.values(), ids=ALL_CRITERIA)
@pytest.mark.parametrize("positions", POSITIONS, ids=lambda options: options.get("policy", "top_k"))
def test_any_choice_goes_with_any_other(
    criterion: dict[str, Any], positions: dict[str, Any], case: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Values and gradients of the specification, with text mixed in and half the loss differentiated."""
    monkeypatch.setattr(chunked, "chunk_size", lambda *_: 5)
    recipe = {"criterion": {**criterion, "kd_weight": 0.8}, "positions": positions}
    batch, logits = batch_of(case), case["student_logits"].clone().requires_grad_()
    expected = reference.loss(
        logits, case["teacher_logits"], case["targets"], case["valid_mask"], recipe,
        sample_ids=batch["sample_ids"].numpy(), step=3, total_steps=10,
    )  # fmt: skip
    loss, gradient = run(case, recipe, factor=0.5, step=3, total_steps=10)
    torch.testing.assert_close(loss, expected.detach(), rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(gradient, torch.autograd.grad(0.5 * expected, logits)[0], rtol=1e-8, atol=1e-10)
