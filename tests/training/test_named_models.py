"""A trainer by names, as TRL's: the same training as with loaded models, and what its card says."""

import json
from pathlib import Path

import pytest
import torch
from tiny import make_model, make_samples, make_tokenizer
from tiny_run import make_teacher

from selkd import DistillArguments, DistillTrainer
from selkd.errors import InputError


def arguments(folder: Path) -> DistillArguments:
    return DistillArguments(
        output_dir=str(folder),
        use_cpu=True,
        max_steps=2,
        report_to=[],
        save_strategy="no",
        eval_strategy="steps",
        eval_steps=1,
        positions={"metric": "student_entropy", "fraction": 0.2},
    )


def test_names_train_as_the_models_they_name_and_the_card_tells_how(tmp_path: Path) -> None:
    teacher = make_teacher(tmp_path / "teacher")
    make_model(1).save_pretrained(tmp_path / "student")
    make_tokenizer().save_pretrained(tmp_path / "student")
    samples = make_samples(6)
    named = DistillTrainer(
        model=str(tmp_path / "student"),
        teacher=str(teacher),
        args=arguments(tmp_path / "named"),
        train_dataset=samples,
        eval_dataset=samples,
    )
    assert named.model.dtype == torch.float32
    loaded = DistillTrainer(
        model=make_model(1),
        teacher=type(named.model).from_pretrained(teacher, dtype=named._teacher_input.dtype),
        args=arguments(tmp_path / "loaded"),
        train_dataset=samples,
        eval_dataset=samples,
        processing_class=make_tokenizer(),
    )
    assert named.train().training_loss == loaded.train().training_loss
    named.create_model_card()
    card = (tmp_path / "named" / "README.md").read_text()
    evaluated = [line for line in named.state.log_history if "eval_kl_nats" in line][-1]
    for words in (
        "Teacher: `teacher`.",
        "Criterion: forward KL",
        "Classes:",
        "Data: 6 samples",
        f"eval_kl_nats: {evaluated['eval_kl_nats']:.4g}",
    ):
        assert words in card, card
    assert str(tmp_path) not in card


def test_a_named_models_own_code_is_not_run(tmp_path: Path) -> None:
    folder = make_teacher(tmp_path / "evil")
    (folder / "evil.py").write_text(f"import os\nos.mkdir({str(tmp_path / 'ran')!r})\n")
    config = json.loads((folder / "config.json").read_text())
    config |= {"model_type": "evil", "auto_map": {"AutoConfig": "evil.C", "AutoModelForCausalLM": "evil.M"}}
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(InputError):
        DistillTrainer(str(folder), make_model(0), arguments(tmp_path / "out"), make_samples(4))
    with pytest.raises(InputError):
        DistillTrainer(
            make_model(0), tmp_path / "nowhere", arguments(tmp_path / "out"), make_samples(4), None, make_tokenizer()
        )
    assert not (tmp_path / "ran").exists()
