"""Position scores, sample scores, fidelity and a training's evaluation are made of the same numbers, bit for bit."""

import math
import os
from pathlib import Path

import pytest
import torch
from test_distributed import torchrun
from tiny import V, make_pair, make_samples

from selkd.data.collate import collate, group_by_tokens
from selkd.errors import RunError
from selkd.evaluation import statistics_pass
from selkd.evaluation.fidelity import fidelity
from selkd.evaluation.sample_scores import score_samples
from selkd.recipe.choices import ClassOptions, CriterionOptions, PositionOptions
from selkd.selection.positions import StepContext
from selkd.teacher.live import LiveTeacher
from selkd.training.evaluation import divergence_sums
from selkd.training.objective import Objective

AT_ONCE = 90  # several batches, of several samples each


def test_whoever_measures_the_divergence_gets_the_same_bits(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(statistics_pass, "TOKENS_AT_ONCE", AT_ONCE)
    models, samples = make_pair(), make_samples(9)
    measured = fidelity(models, samples)
    scores, tokens = score_samples("kl", samples, models, seed=0)
    assert tokens == measured.teacher_tokens

    objective = Objective(CriterionOptions(), PositionOptions.model_validate({"metric": "kl", "fraction": 0.3}), 0)
    teacher = LiveTeacher(models.teacher, ClassOptions(), 1.0, 0, V)
    of_training = torch.zeros(2, dtype=torch.float64)
    groups = group_by_tokens(samples.lengths, AT_ONCE)
    assert 1 < len(groups) < len(samples)
    for group in groups:
        batch = collate([samples[index] for index in group], 1)
        with torch.no_grad():
            hidden, targets = models.student_hidden(batch), teacher.targets(batch, 0)
        scored = objective.score(hidden, models.student_head, batch, targets, StepContext(0, 0.3, 0.0, None))
        for row, index in enumerate(group):
            of_sample = scored.values[row, batch["valid_mask"][row]]
            assert torch.equal(of_sample, measured.statistics["kl"][measured.sample_of == index])
            total = torch.zeros(1).index_add_(0, torch.zeros(len(of_sample), dtype=torch.int64), of_sample)
            assert scores[index] == (total / len(of_sample)).item()
        sums = divergence_sums(hidden, models.student_head, batch=batch, teacher=targets, is_live=True, temperature=1.0)
        of_training += torch.stack([sums["total_nats"], sums["positions"]])
    assert of_training[1] == measured.positions
    # In float64 only the order of the terms differs.
    assert of_training[0] / of_training[1] == pytest.approx(measured.kl_nats, rel=1e-13)
    assert measured.statistics["kl"].double().mean() == pytest.approx(measured.kl_nats, rel=1e-13)


@pytest.mark.parametrize("role", ["student", "teacher"])
def test_a_model_that_is_not_finite_is_named_by_sample_and_position(role: str) -> None:
    models, samples = make_pair(), make_samples(3)
    model = models.student if role == "student" else models.teacher
    model.get_output_embeddings().weight.data[7] = math.nan
    for measure in (lambda: fidelity(models, samples, "evaluating"), lambda: score_samples("kl", samples, models, 0)):
        with pytest.raises(RunError, match=r"position 0 of sample [0-9a-f]{32} gives nan .* while (evaluat|scor)ing"):
            measure()


def test_the_modes_of_the_models_stay() -> None:
    models = make_pair()
    models.student.train()
    fidelity(models, make_samples(3))
    assert models.student.training
    assert not models.teacher.training


ONE_FAULT = """
import sys
from pathlib import Path
import numpy as np
import torch
from accelerate import PartialState
from tiny import V, make_model, make_tokenizer
from selkd.data.samples import Sample, SampleDataset
from selkd.errors import RunError
from selkd.evaluation import statistics_pass
from selkd.evaluation.fidelity import fidelity
from selkd.models.pair import ModelPair

statistics_pass.TOKENS_AT_ONCE = 20  # several batches, of which each process has some
rank = PartialState(cpu=True).process_index
student = make_model(1, tie_word_embeddings=False)
with torch.no_grad():
    student.get_input_embeddings().weight[V - 1] = torch.nan
samples = [Sample(np.arange(2, 12) + number, np.array([0])) for number in range(8)]
samples[0] = Sample(np.arange(V - 10, V)[::-1].copy(), np.array([0]))  # this one alone reads the damaged row
models = ModelPair(lambda: student, lambda: make_model(0, 3), make_tokenizer(), V, torch.float32)
try:
    fidelity(models, SampleDataset.from_samples(samples))
except RunError as error:
    Path(sys.argv[1], f"rank-{rank}").write_text(str(error))
"""


@pytest.mark.slow
def test_a_fault_on_one_process_is_told_by_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A process that raised alone would leave the others waiting for what it never sends."""
    monkeypatch.setenv("PYTHONPATH", str(Path(__file__).parents[1]), prepend=os.pathsep)
    worker = tmp_path / "worker.py"
    worker.write_text(ONE_FAULT)
    done = torchrun(str(worker), str(tmp_path), timeout_seconds=120)
    assert done.returncode == 0, done.stderr[-3000:]
    first, second = (tmp_path / f"rank-{rank}" for rank in (0, 1))
    assert "gives nan from the student's or the teacher's logits, while evaluating" in first.read_text()
    assert first.read_text() == second.read_text()
