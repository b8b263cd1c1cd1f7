"""The executable specification against the oracle cases, in float64."""

from typing import Any

import numpy as np
import pytest
import torch

from selkd import reference

TIGHT = {"rtol": 0, "atol": 1e-8}
SE_KD = {"policy": "top_k", "metric": "student_entropy"}

LOSSES: dict[str, dict[str, Any]] = {
    "full_kd": {"positions": {"policy": "all"}},
    "se_kd": {"positions": SE_KD},
    "se_kd_reverse_kl": {"criterion": {"name": "reverse_kl"}, "positions": SE_KD},
    "se_kd_lambda_0.7_with_ce": {"criterion": {"kd_weight": 0.7}, "positions": SE_KD},
    "weighted_kd_student_entropy": {"positions": {"policy": "weighted", "metric": "student_entropy"}},
    "full_kd_per_position": {"positions": {"policy": "all", "reduction": "per_position"}},
    "se_kd_per_position": {"positions": SE_KD | {"reduction": "per_position"}},
    "full_kd_sampled_classes": {"positions": {"policy": "all"}, "classes": {"sampler": "rs_kd", "draws": 8}},
}
CRITERIA: dict[str, dict[str, Any]] = {
    "forward_kl": {"name": "forward_kl"},
    "reverse_kl": {"name": "reverse_kl"},
    "jsd_beta_0.5": {"name": "jsd"},
    "jsd_beta_0.1": {"name": "jsd", "beta": 0.1},
    "skew_kl_alpha_0.1": {"name": "skew_kl"},
    "skew_reverse_kl_alpha_0.1": {"name": "skew_reverse_kl", "alpha": 0.1},
    "total_variation": {"name": "total_variation"},
    "dkd_alpha_1_beta_8": {"name": "dkd"},
    "tckd": {"name": "dkd", "alpha": 1.0, "beta": 0.0},
    "nckd": {"name": "dkd", "alpha": 0.0, "beta": 1.0},
    "forward_kl_temperature_2_times_T2": {"name": "forward_kl", "temperature": 2.0},
}


def recipe_of(case: dict[str, Any], name: str) -> dict[str, Any]:
    if name.startswith("se_kd:"):
        recipe: dict[str, Any] = {"criterion": CRITERIA[name.removeprefix("se_kd:")], "positions": SE_KD}
    else:
        recipe = LOSSES[name]
    return recipe | {"positions": recipe["positions"] | {"fraction": case["fraction"]}}


def drawn(case: dict[str, Any]) -> dict[str, torch.Tensor]:
    return {name: torch.tensor(case["sampled_classes"][name]) for name in ("class_ids", "counts")}


def expected_of(values: Any) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.float64)


def test_importance_is_the_oracles(case: dict[str, Any]) -> None:
    for metric, expected in case["importance"].items():
        scores = reference.importance(metric, case["student_logits"], case["teacher_logits"], case["targets"])
        tolerance = {"rtol": 1e-8, "atol": 0} if "ratio" in metric else TIGHT
        torch.testing.assert_close(scores, expected_of(expected), **tolerance, msg=metric)
    scores = reference.importance(
        "soft_or", case["student_logits"], case["teacher_logits"], case["targets"], case["valid_mask"]
    )
    torch.testing.assert_close(scores, expected_of(case["importance_masked"]["soft_or"]), **TIGHT)


def test_selections_are_the_oracles(case: dict[str, Any]) -> None:
    for name, expected in case["selected"].items():
        policy, metric, *rest = name.split(":")
        scores = expected_of(case["importance"][metric])
        progress = float(rest[0].removeprefix("progress=")) if rest else 0.0
        coefficients = reference.select(policy, scores, case["valid_mask"], case["fraction"], progress=progress)
        assert torch.equal(coefficients > 0, torch.tensor(expected).bool()), name
        picked = case["valid_mask"].any(-1)
        ones = torch.ones(int(picked.sum()), dtype=torch.float64)
        torch.testing.assert_close(coefficients.sum(-1)[picked], ones)


def test_weights_are_the_oracles_probabilities(case: dict[str, Any]) -> None:
    scores = expected_of(case["importance"]["student_entropy"])
    coefficients = reference.select("weighted", scores, case["valid_mask"])
    torch.testing.assert_close(coefficients, expected_of(case["pos_rs_probabilities"]), **TIGHT)


def test_criteria_are_the_oracles(case: dict[str, Any]) -> None:
    for name, expected in case["criteria"].items():
        options = dict(CRITERIA[name])
        values = reference.divergence(
            options.pop("name"), case["student_logits"], case["teacher_logits"], case["targets"], **options
        )
        values = values * options.get("temperature", 1.0) ** 2
        torch.testing.assert_close(values, expected_of(expected), **TIGHT, msg=name)
    values = reference.divergence(
        "at_kd", case["student_logits"], case["teacher_logits"], case["targets"], picked_mask=case["valid_mask"]
    )
    torch.testing.assert_close(values, expected_of(case["criteria_all_valid_picked"]["at_kd"]), **TIGHT)


def test_sampled_divergence_is_the_oracles(case: dict[str, Any]) -> None:
    values = reference.sampled_divergence(case["student_logits"], **drawn(case))
    torch.testing.assert_close(values, expected_of(case["sampled_classes"]["divergence"]), **TIGHT)


def test_losses_and_gradients_are_the_oracles(case: dict[str, Any]) -> None:
    for name in case["loss"] | case["grad_student_logits"]:
        student_logits = case["student_logits"].clone().requires_grad_()
        recipe = recipe_of(case, name)
        loss = reference.loss(
            student_logits,
            case["teacher_logits"],
            case["targets"],
            case["valid_mask"],
            recipe,
            **(drawn(case) if "classes" in recipe else {}),
        )
        if name in case["loss"]:
            assert loss.item() == pytest.approx(case["loss"][name], abs=1e-8), name
        if name in case["grad_student_logits"]:
            loss.backward()
            expected = expected_of(case["grad_student_logits"][name])
            torch.testing.assert_close(student_logits.grad, expected, rtol=0, atol=1e-6, msg=name)


def test_the_oracle_checks_every_criterion_and_metric(case: dict[str, Any]) -> None:
    checked = {CRITERIA[name]["name"] for name in case["criteria"]} | set(case["criteria_all_valid_picked"])
    assert checked == set(reference.CRITERIA)
    assert set(case["importance"]) | {"soft_or"} == set(reference.METRICS)


def test_kl_is_its_decoupled_parts(case: dict[str, Any]) -> None:
    def of(criterion: str, **options: float) -> torch.Tensor:
        return reference.divergence(
            criterion, case["student_logits"], case["teacher_logits"], case["targets"], **options
        )

    p_y = torch.softmax(case["teacher_logits"], -1).gather(-1, case["targets"].unsqueeze(-1)).squeeze(-1)
    parts = of("dkd", alpha=1.0, beta=0.0) + (1 - p_y) * of("dkd", alpha=0.0, beta=1.0)
    torch.testing.assert_close(parts, of("forward_kl"), rtol=0, atol=1e-12)


def test_equal_scores_go_to_the_earlier_position() -> None:
    coefficients = reference.select("top_k", torch.ones(1, 10), torch.ones(1, 10), 0.3)
    assert (coefficients[0] > 0).tolist() == [True] * 3 + [False] * 7


@pytest.mark.parametrize(("fraction", "expected"), [(0.07, 7), (0.0025, 1), (1.0, 100), (0.201, 21)])
def test_counts_use_decimal_arithmetic(fraction: float, expected: int) -> None:
    scores = torch.arange(100.0)[None]
    assert int((reference.select("top_k", scores, torch.ones(1, 100), fraction) > 0).sum()) == expected


@pytest.mark.parametrize("policy", ["random", "pos_rs", "pos_rs_corrected"])
def test_what_is_random_depends_on_seed_id_and_step_alone(policy: str) -> None:
    ids = np.arange(32, dtype=np.uint8).reshape(2, 16)
    mask, scores = torch.ones(2, 40, dtype=torch.bool), torch.arange(1.0, 81.0).view(2, 40)
    choice = reference.select(policy, scores, mask, 0.2, seed=1, sample_ids=ids, step=3)
    alone = reference.select(policy, scores[1:], mask[1:], 0.2, seed=1, sample_ids=ids[1:], step=3)
    assert torch.equal(choice[1:], alone)
    for changed in ({"seed": 2}, {"step": 4}, {"sample_ids": ids + 1}):
        options = {"seed": 1, "sample_ids": ids, "step": 3} | changed
        assert not torch.equal(choice, reference.select(policy, scores, mask, 0.2, **options))


def test_gls_divides_the_step_by_its_budget() -> None:
    scores = torch.tensor([[0.1, 0.2, 0.9, 0.8, 0.7], [0.1, 0.2, 0.3, 0.4, 0.5]])
    mask = torch.ones(2, 5, dtype=torch.bool)
    queue = np.linspace(0, 1, 101)  # the 0.6-quantile is 0.6
    coefficients = reference.select("gls", scores, mask, 0.4, queue=queue, queue_size=1000)
    expected = torch.zeros(2, 5)
    expected[0, 2:] = 1 / 4
    torch.testing.assert_close(coefficients, expected)
    early = reference.select("gls", scores, mask, 0.4, queue=queue, queue_size=1011)
    assert (early > 0).sum(-1).tolist() == [2, 2]


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
    with pytest.raises(ValueError, match="metric 'kl' needs teacher_logits"):
        reference.importance("kl", logits, None, targets)
    with pytest.raises(ValueError, match="policy 'best' is not known"):
        reference.select("best", logits[..., 0], torch.ones(1, 2), 0.5)
    with pytest.raises(ValueError, match="criterion 'kl' is not known"):
        reference.divergence("kl", logits, logits, targets)
