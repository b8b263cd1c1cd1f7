"""Sample scores against the specification on full logits; the teacher runs only where a metric needs it."""

from typing import Any

import numpy as np
import pytest
import torch
from tiny import V, make_model, make_samples

from selkd import reference
from selkd.data.batching import collate
from selkd.data.samples import EMPTY_SAMPLE, SampleDataset
from selkd.recipe_choices import SampleMetric
from selkd.scoring import NEEDS_TEACHER, score_samples


def scored(metric: str, samples: SampleDataset, **changes: Any) -> tuple[np.ndarray, int]:
    options = {
        "student": lambda: make_model(1),
        "teacher": lambda: make_model(0, layers=3),
        "dtype": torch.float32,
        "pad_token_id": 1,
        "n_classes": V,
        "seed": 5,
    } | changes
    return score_samples(metric, samples, **options)


@pytest.mark.parametrize("metric", ["student_entropy", "kl", "ce_ratio"])
def test_scores_are_the_specifications(metric: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("selkd.scoring.TOKENS_AT_ONCE", 50)  # several batches, of other widths
    samples = SampleDataset.from_samples([*make_samples(9), EMPTY_SAMPLE])
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
    scores, tokens = scored(metric, samples)
    np.testing.assert_allclose(scores, expected.numpy(), rtol=2e-5)
    assert scores[-1] == 0
    assert (tokens > 0) == (metric in NEEDS_TEACHER)


def test_models_are_loaded_only_for_what_needs_them() -> None:
    def refuse() -> Any:
        raise AssertionError("not needed")

    samples = make_samples(4)
    scored("student_entropy", samples, teacher=refuse)
    scores, tokens = scored("random", samples, teacher=refuse, student=refuse)
    assert tokens == 0
    assert len(set(scores)) == len(samples)
    assert np.array_equal(scores, scored("random", samples, student=refuse)[0])
    assert not np.array_equal(scores, scored("random", samples, student=refuse, seed=6)[0])


def test_the_recipe_knows_the_metrics_that_there_are() -> None:
    assert set(SampleMetric.__args__) == {"student_entropy", "kl", "ce_ratio", "random", "all"}
