"""Fidelity by sample and by entropy, against the dense expressions."""

from pathlib import Path

import numpy as np
import pytest
import torch
from tiny import make_model, make_pair, make_samples, make_tokenizer
from tiny_run import make_text

from selkd.data.collate import collate
from selkd.errors import InputError
from selkd.evaluation.evaluated_model import EvaluatedModel
from selkd.evaluation.fidelity import ENTROPY_EDGES, fidelity
from selkd.evaluation.fidelity_task import measure_fidelity
from selkd.evaluation.intervals import estimate
from selkd.evaluation.options import FidelityOptions
from selkd.models.pair import ModelSlot


def test_sums_and_buckets_are_those_of_the_full_logits() -> None:
    models, samples = make_pair(1, 2), make_samples(count=9)
    found = fidelity(models, samples)
    rows = []  # sample, teacher's entropy, student's and teacher's cross-entropy, KL, agreement
    for number, sample in enumerate(samples):
        batch = collate([sample], 1)
        with torch.no_grad():
            arguments = {"position_ids": batch["position_ids"], "use_cache": False}
            q, p = (m(batch["input_ids"], **arguments).logits.double() for m in (models.student, models.teacher))
        targets, valid = batch["targets"], batch["valid_mask"][0]
        log_q, log_p = torch.log_softmax(q[0], dim=-1), torch.log_softmax(p[0], dim=-1)
        entropy, kl = -(log_p.exp() * log_p).sum(-1), (log_p.exp() * (log_p - log_q)).sum(-1)
        ce_q, ce_p = (-log.gather(-1, targets[0, :, None])[:, 0] for log in (log_q, log_p))
        columns = [entropy, ce_q, ce_p, kl, (q.argmax(-1) == p.argmax(-1))[0].double()]
        rows.append(torch.stack([torch.full_like(columns[0], number), *columns], dim=1)[valid].numpy())
    dense = np.concatenate(rows)

    assert found.positions == len(dense)
    assert found.perplexity == pytest.approx(np.exp(dense[:, 2].mean()), rel=1e-4)
    assert found.teacher_perplexity == pytest.approx(np.exp(dense[:, 3].mean()), rel=1e-4)
    assert found.kl_nats == pytest.approx(dense[:, 4].mean(), rel=1e-4)
    per_sample = found.sums.sum(dim=1)
    for number in range(9):
        of_sample = dense[dense[:, 0] == number]
        assert per_sample[number].tolist() == pytest.approx([len(of_sample), *of_sample[:, 2:].sum(axis=0)], rel=1e-4)
    assert len(found.by_entropy()) == len(ENTROPY_EDGES) + 1
    used = 0
    for bucket in found.by_entropy():
        end = bucket["to_nats"] or np.inf
        inside = dense[(dense[:, 1] >= bucket["from_nats"]) & (dense[:, 1] < end)]
        assert bucket["positions"] == len(inside)
        if len(inside):
            used += 1
            means = [bucket[name] for name in ("cross_entropy_nats", "teacher_cross_entropy_nats", "kl_nats")]
            assert means == pytest.approx(inside[:, 2:5].mean(axis=0).tolist(), rel=1e-3)
            assert bucket["top1_agreement"] == pytest.approx(inside[:, 5].mean())
        else:
            assert bucket["kl_nats"] is None
    assert used >= 2


def subject(name: str, seed: int) -> EvaluatedModel:
    model = make_model(seed)
    return EvaluatedModel(name, name, name, torch.float32, 64, ModelSlot(lambda: model), make_tokenizer())


def test_on_a_text_with_and_without_a_teacher(tmp_path: Path) -> None:
    options = FidelityOptions(str(make_text(tmp_path / "text.jsonl")), windows=5)
    alone = measure_fidelity(subject("a", 1), None, options)
    against = measure_fidelity(subject("a", 1), subject("b", 2), options)
    assert alone.estimates.keys() == {"perplexity"}
    assert against.estimates.keys() == {"perplexity", "kl_nats", "top1_agreement"}
    assert alone.estimates["perplexity"] == against.estimates["perplexity"]
    assert len(against.examples) == 5
    assert against.details["positions"] < 5 * 64
    assert "kl_nats" not in alone.details["by_entropy"][0]
    itself = measure_fidelity(subject("a", 1), subject("a", 1), options)
    assert itself.estimates["kl_nats"].value == pytest.approx(0, abs=1e-6)
    assert itself.estimates["top1_agreement"].value == 1
    assert estimate(against.measure("kl_nats")).value == pytest.approx(against.figures["kl_nats"])
    with pytest.raises(InputError, match="shorter than one window of 64 tokens"):
        measure_fidelity(subject("a", 1), None, FidelityOptions(str(make_text(tmp_path / "short.jsonl", 1))))
