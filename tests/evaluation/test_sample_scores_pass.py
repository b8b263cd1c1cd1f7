"""Sample scores against the specification on full logits; the teacher runs only where a metric needs it."""

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tiny import V, make_model, make_pair, make_samples, make_tokenizer
from tiny_run import make_recipe

from selkd import reference
from selkd.data.collate import collate
from selkd.data.samples import EMPTY_SAMPLE, SampleDataset
from selkd.errors import InputError
from selkd.evaluation.sample_scores import score_samples
from selkd.models.head import head_of, hidden_states
from selkd.models.pair import ModelPair
from selkd.plugins import Metric
from selkd.recipe.choices import SampleOptions
from selkd.recipe.part import parse_part
from selkd.recipe.recipe import Recipe
from selkd.run.pipeline import score_only
from selkd.selection.samples import SampleScores
from selkd.selection.two_stage import Estimator, by_frequency, class_subset, estimated_entropy


@pytest.mark.parametrize("metric", ["student_entropy", "kl", "ce_ratio"])
def test_scores_are_the_specifications(metric: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("selkd.evaluation.statistics_pass.TOKENS_AT_ONCE", 50)  # several batches, of other widths
    samples = SampleDataset.from_samples([*make_samples(9), *[EMPTY_SAMPLE] * 60])  # one batch has nothing but these
    batch = collate(list(samples), 1)
    with torch.no_grad():
        student, teacher = (
            model(input_ids=batch["input_ids"], position_ids=batch["position_ids"], use_cache=False).logits
            for model in (make_model(1), make_model(0, layers=3))
        )
    mask, targets = batch["valid_mask"], batch["targets"]

    def mean(name: str) -> torch.Tensor:
        values = reference.importance(name, student, teacher, targets, mask) * mask
        return values.sum(-1) / mask.sum(-1).clamp(min=1)

    expected = mean("student_ce") / (mean("teacher_ce") + 1e-6) if metric == "ce_ratio" else mean(metric)
    scores, tokens = score_samples(metric, samples, make_pair(), 5)
    np.testing.assert_allclose(scores, expected.numpy(), rtol=2e-5)
    assert scores[-1] == 0
    assert (tokens > 0) == Metric.find(metric).needs_teacher


def test_models_are_loaded_only_for_what_needs_them() -> None:
    def refuse() -> Any:
        raise AssertionError("not needed")

    samples, shared = make_samples(4), (make_tokenizer(), V, torch.float32)
    score_samples("student_entropy", samples, ModelPair(lambda: make_model(1), refuse, *shared), 5)
    neither = ModelPair(refuse, refuse, *shared)
    scores, tokens = score_samples("random", samples, neither, 5)
    assert tokens == 0
    assert len(set(scores)) == len(samples)
    assert np.array_equal(scores, score_samples("random", samples, neither, 5)[0])
    assert not np.array_equal(scores, score_samples("random", samples, neither, 6)[0])


def test_these_metrics_score_samples() -> None:
    assert list(Metric.of_samples()) == ["student_entropy", "kl", "ce_ratio", "random"]


def approximate(frequent: int, tail: int, calibration_fraction: float) -> SampleOptions:
    return SampleOptions(
        scoring="approximate",
        frequent_classes=frequent,
        tail_classes=tail,
        calibration_fraction=calibration_fraction,
    )


def test_approximate_scores_are_the_means_of_the_estimate(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("selkd.evaluation.statistics_pass.TOKENS_AT_ONCE", 50)
    samples = SampleDataset.from_samples([*make_samples(9), EMPTY_SAMPLE])
    ordered = by_frequency(samples.token_counts(V))
    exact, _ = score_samples("student_entropy", samples, make_pair(), 5)
    everything = approximate(V, 1, 0.0)
    whole, _ = score_samples("student_entropy", samples, make_pair(), 5, Estimator(everything, ordered, 0))
    np.testing.assert_allclose(whole, exact, rtol=2e-5)

    student = make_model(1)
    head = head_of(student)
    for probed in (0.0, 0.3):
        estimate = Estimator(approximate(30, 12, probed), ordered, 0)
        scores, tokens = score_samples("student_entropy", samples, make_pair(), 5, estimate)
        assert tokens == 0
        assert scores[-1] == 0
        assert not np.allclose(scores, exact, rtol=1e-3)
        for sample, score in zip(list(samples)[:-1], scores[:-1], strict=True):  # each one alone, by its own classes
            batch = collate([sample], 1)
            hidden = hidden_states(student, batch["input_ids"], batch["position_ids"]).detach()[batch["valid_mask"]]
            first = torch.as_tensor(ordered)[:30]
            if probed:
                n = len(hidden)
                places = np.linspace(0, n - 1, math.ceil(probed * n)).round().astype(int)
                mean = torch.softmax(head.logits(hidden[places]), dim=-1).mean(dim=0)
                first = torch.argsort(mean, descending=True)[:30]
            subset = class_subset(first, torch.as_tensor(ordered), 12, 0, "samples")
            assert score == pytest.approx(float(estimated_entropy(hidden, head, subset).mean()), rel=2e-5)


def test_approximate_scoring_says_how_far_it_agrees_and_is_another_file(tmp_path: Path) -> None:
    approximate = {"scoring": "approximate", "frequent_classes": 40, "tail_classes": 20, "fraction": 0.3}
    recipe = make_recipe(tmp_path, samples=approximate, evaluation={"suite": []})
    run = score_only(parse_part(Recipe, recipe), tmp_path / "run")
    found = run.record["scoring_agreement"]
    assert found["samples_compared"] == 32
    assert 0 <= found["share_of_exact_choice"] <= 1
    assert 0.3 < found["correlation"] <= 1
    scores = str(tmp_path / "run" / "selection" / "samples.parquet")
    assert (
        "estimated from 40 frequent and about 20 other classes" in SampleScores.read(Path(scores)).fingerprint["metric"]
    )
    changed = ({"fraction": 0.3}, {**approximate, "tail_classes": 21}, {**approximate, "calibration_fraction": 0})
    for number, samples in enumerate(changed):
        with pytest.raises(InputError, match="these scores are of another metric: stored 'student_entropy, estimated"):
            score_only(
                parse_part(Recipe, recipe | {"samples": samples | {"path": scores}}), tmp_path / f"other {number}"
            )


@pytest.mark.parametrize(
    ("samples", "message"),
    [
        (
            {"scoring": "approximate", "metric": "kl"},
            "samples.scoring: approximate estimates the student's entropy; kl",
        ),
        ({"tail_classes": 3}, "samples.tail_classes: an option of scoring: approximate"),
        ({"calibration_fraction": 0.1}, "samples.calibration_fraction: an option of scoring: approximate"),
    ],
)
def test_an_approximation_of_what_it_cannot_estimate_is_refused(samples: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        parse_part(SampleOptions, samples, "samples")
