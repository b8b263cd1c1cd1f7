"""The real teacher, end to end, on a piece of the real text."""

from pathlib import Path

import pytest
from transformers import AutoModelForCausalLM, AutoTokenizer

from selkd import distill, load_recipe

SMALLER = [
    "data.tokens=8192",
    "data.held_out_tokens=1024",
    "data.held_out_fraction=0.3",
    "training.num_train_epochs=4",
    "training.per_device_train_batch_size=4",
]


@pytest.mark.slow
@pytest.mark.real_teacher
def test_the_demo_teaches_a_real_student(tmp_path: Path) -> None:
    run = distill(load_recipe("demo", SMALLER), tmp_path / "demo")
    assert run.record["data"]["held_out_overlap"]["share"] < 0.01  # what is measured is no training text
    before, after = run.record["fidelity"]["before"], run.record["fidelity"]["after"]
    assert run.record["fidelity"]["teacher"]["perplexity"] < 40
    assert after["perplexity"] < 0.8 * before["perplexity"]
    assert after["kl_nats"] < 0.85 * before["kl_nats"]
    assert after["top1_agreement"] > before["top1_agreement"]
    assert run.record["counts"]["samples_kept"] == 7  # ceil(20% of 32)
    assert 0.2 <= run.record["counts"]["positions_selected"] / run.record["counts"]["positions_valid"] < 0.205
    assert run.record["teacher_cache"]["bytes_per_position"] < 45  # against 192 at fixed width

    student = AutoModelForCausalLM.from_pretrained(run.student)
    tokenizer = AutoTokenizer.from_pretrained(run.student)
    assert student.config.num_hidden_layers == 20
    inputs = tokenizer("The for statement is used to", return_tensors="pt")
    assert len(tokenizer.decode(student.generate(**inputs, max_new_tokens=8, do_sample=False)[0])) > 30
