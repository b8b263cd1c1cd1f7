"""The executable specification against the oracle cases, in float64."""

from typing import Any

import numpy as np
import pytest
import torch

from selkd import reference

TIGHT = {"rtol": 0, "atol": 1e-8}

LOSSES: dict[str, dict[str, Any]] = {
    "full_kd": {"positions": {"policy": "all"}},
    "se_kd": {"positions": {"policy": "top_k", "metric": "student_entropy"}},
    "se_kd_lambda_0.7_with_ce": {
        "criterion": {"kd_weight": 0.7},
        "positions": {"policy": "top_k", "metric": "student_entropy"},
    },
    "full_kd_per_position": {"positions": {"policy": "all", "reduction": "per_position"}},
    "se_kd_per_position": {"positions": {"policy": "top_k", "metric": "student_entropy", "reduction": "per_position"}},
    "full_kd_sampled_classes": {"positions": {"policy": "all"}, "classes": {"sampler": "rs_kd", "draws": 8}},
}


def recipe_of(case: dict[str, Any], name: str) -> dict[str, Any]:
    recipe = LOSSES[name]
    return recipe | {"positions": recipe["positions"] | {"fraction": case["fraction"]}}


def drawn(case: dict[str, Any]) -> dict[str, torch.Tensor]:
    return {name: torch.tensor(case["sampled_classes"][name]) for name in ("class_ids", "counts")}


def test_importance_is_the_oracles(case: dict[str, Any]) -> None:
    scores = reference.importance("student_entropy", case["student_logits"], case["teacher_logits"], case["targets"])
    torch.testing.assert_close(
        scores, torch.tensor(case["importance"]["student_entropy"], dtype=torch.float64), **TIGHT
    )


def test_top_k_selects_the_oracles_positions(case: dict[str, Any]) -> None:
    scores = torch.tensor(case["importance"]["student_entropy"], dtype=torch.float64)
    coefficients = reference.select("top_k", scores, case["valid_mask"], case["fraction"])
    assert torch.equal(coefficients > 0, torch.tensor(case["selected"]["top_k:student_entropy"]).bool())
    picked = case["valid_mask"].any(-1)
    torch.testing.assert_close(coefficients.sum(-1)[picked], torch.ones(int(picked.sum()), dtype=torch.float64))


@pytest.mark.parametrize(("name", "temperature"), [("forward_kl", 1.0), ("forward_kl_temperature_2_times_T2", 2.0)])
def test_forward_kl_is_the_oracles(case: dict[str, Any], name: str, temperature: float) -> None:
    values = reference.divergence(
        "forward_kl", case["student_logits"], case["teacher_logits"], case["targets"], temperature=temperature
    )
    torch.testing.assert_close(
        values * temperature**2, torch.tensor(case["criteria"][name], dtype=torch.float64), **TIGHT
    )


def test_sampled_divergence_is_the_oracles(case: dict[str, Any]) -> None:
    values = reference.sampled_divergence(case["student_logits"], **drawn(case))
    expected = torch.tensor(case["sampled_classes"]["divergence"], dtype=torch.float64)
    torch.testing.assert_close(values, expected, **TIGHT)


@pytest.mark.parametrize("name", LOSSES)
def test_loss_and_gradient_are_the_oracles(case: dict[str, Any], name: str) -> None:
    student_logits = case["student_logits"].clone().requires_grad_()
    extra = drawn(case) if "classes" in LOSSES[name] else {}
    loss = reference.loss(
        student_logits, case["teacher_logits"], case["targets"], case["valid_mask"], recipe_of(case, name), **extra
    )
    assert loss.item() == pytest.approx(case["loss"][name], abs=1e-8)
    if name in case["grad_student_logits"]:
        loss.backward()
        expected = torch.tensor(case["grad_student_logits"][name], dtype=torch.float64)
        torch.testing.assert_close(student_logits.grad, expected, rtol=0, atol=1e-6)


def test_equal_scores_go_to_the_earlier_position() -> None:
    coefficients = reference.select("top_k", torch.ones(1, 10), torch.ones(1, 10), 0.3)
    assert (coefficients[0] > 0).tolist() == [True] * 3 + [False] * 7


@pytest.mark.parametrize(("fraction", "expected"), [(0.07, 7), (0.0025, 1), (1.0, 100), (0.201, 21)])
def test_counts_use_decimal_arithmetic(fraction: float, expected: int) -> None:
    scores = torch.arange(100.0)[None]
    assert int((reference.select("top_k", scores, torch.ones(1, 100), fraction) > 0).sum()) == expected


def test_random_depends_on_seed_id_and_step_alone() -> None:
    ids = np.arange(32, dtype=np.uint8).reshape(2, 16)
    mask = torch.ones(2, 40, dtype=torch.bool)
    choice = reference.select("random", None, mask, 0.2, seed=1, sample_ids=ids, step=3)
    alone = reference.select("random", None, mask[1:], 0.2, seed=1, sample_ids=ids[1:], step=3)
    assert torch.equal(choice[1:], alone)
    for changed in ({"seed": 2}, {"step": 4}, {"sample_ids": ids + 1}):
        other = reference.select("random", None, mask, 0.2, **({"seed": 1, "sample_ids": ids, "step": 3} | changed))
        assert not torch.equal(choice, other)


def test_a_step_without_valid_positions_costs_nothing() -> None:
    logits = torch.randn(2, 5, 7, dtype=torch.float64, requires_grad=True)
    none = torch.zeros(2, 5, dtype=torch.bool)
    loss = reference.loss(logits, torch.randn(2, 5, 7, dtype=torch.float64), torch.zeros(2, 5).long(), none, {})
    loss.backward()
    assert loss.item() == 0
    assert torch.equal(logits.grad, torch.zeros_like(logits))


def test_unknown_names_are_refused() -> None:
    logits, targets = torch.zeros(1, 2, 3), torch.zeros(1, 2).long()
    with pytest.raises(ValueError, match="metric 'entropy' is not known"):
        reference.importance("entropy", logits, None, targets)
    with pytest.raises(ValueError, match="policy 'best' is not known"):
        reference.select("best", logits[..., 0], torch.ones(1, 2), 0.5)
    with pytest.raises(ValueError, match="criterion 'kl' is not known"):
        reference.divergence("kl", logits, logits, targets)
