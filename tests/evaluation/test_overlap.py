"""Overlaps of what metrics select, from the statistics that the fidelity pass leaves behind."""

import numpy as np
import pytest
import torch
from tiny import make_pair, make_samples

from selkd import reference
from selkd.data.collate import collate
from selkd.data.samples import EMPTY_SAMPLE, SampleDataset
from selkd.evaluation.fidelity import fidelity
from selkd.evaluation.overlap import overlaps
from selkd.evaluation.sample_scores import score_samples


def test_overlaps_are_those_of_the_specifications_selections() -> None:
    models = make_pair(1, 2)
    samples = SampleDataset.from_samples([*make_samples(count=11), EMPTY_SAMPLE])
    measured = fidelity(models, samples)
    found = overlaps(measured.statistics, measured.sample_of, 0.3, 0.4)

    batch = collate(list(samples), 1)
    with torch.no_grad():
        arguments = {"input_ids": batch["input_ids"], "position_ids": batch["position_ids"], "use_cache": False}
        q, p = models.student(**arguments).logits, models.teacher(**arguments).logits
    mask = batch["valid_mask"]
    chosen = {
        name: reference.select("top_k", reference.importance(name, q, p, batch["targets"], mask), mask, 0.3) > 0
        for name in reference.METRICS
    }
    assert found["positions"]["metrics"] == list(reference.METRICS)
    for row, first in zip(found["positions"]["overlap"], chosen.values(), strict=True):
        expected = [float((first & second).sum() / first.sum()) for second in chosen.values()]
        assert row == pytest.approx(expected, abs=1e-4)

    kept = {}
    for name in found["samples"]["metrics"]:
        scores, _ = score_samples(name, samples, models, 0)
        kept[name] = set(np.argsort(-scores[:11], kind="stable")[:5].tolist())  # ceil(0.4 * 11)
    for row, first in zip(found["samples"]["overlap"], kept.values(), strict=True):
        assert row == pytest.approx([len(first & second) / 5 for second in kept.values()], abs=1e-4)


def test_a_handful_of_samples_has_no_overlap_of_filters() -> None:
    measured = fidelity(make_pair(1, 2), make_samples(4))
    assert overlaps(measured.statistics, measured.sample_of, 0.3, 0.4)["samples"] is None
