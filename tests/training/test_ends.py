"""How a training ends, and goes on: no step too many, the same logs, the checkpoint that was just written."""

import multiprocessing
import os
import subprocess
from contextlib import suppress
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
from tiny import make_arguments, make_model, make_prompts, make_samples, make_tokenizer
from transformers import TrainerCallback

from selkd import DistillTrainer, interrupts
from selkd.data.samples import SampleDataset
from selkd.training.callbacks import EverySteps, MetricsFile


def trained(out: Path, resume: bool | None = None, **changes: Any) -> DistillTrainer:
    """A training of 5 steps, 3 an epoch, with a line of the log every 3 steps and a checkpoint every 2."""
    defaults = {"max_steps": 5, "logging_steps": 3, "save_strategy": "steps", "save_steps": 2}
    samples = make_samples(12)
    if "on_policy" in changes:
        samples = SampleDataset.from_samples(make_prompts(12))
        changes |= {"prompt_field": "q", "completion_field": "a", "packing": False}
    arguments = make_arguments(out, **(defaults | changes))
    trainer = DistillTrainer(
        make_model(1), make_model(0, layers=3), arguments, samples, processing_class=make_tokenizer()
    )
    trainer.train(resume_from_checkpoint=resume)
    return trainer


def lines(trainer: DistillTrainer) -> list[dict[str, Any]]:
    return [
        {name: value for name, value in line.items() if "seconds" not in name}
        for line in trainer.state.log_history
        if "loss" in line
    ]


def weights(trainer: DistillTrainer) -> list[torch.Tensor]:
    return [parameter.detach() for parameter in trainer.model.parameters()]


def test_a_training_that_ended_inside_an_epoch_makes_no_further_step(tmp_path: Path) -> None:
    first = trained(tmp_path)
    again = trained(tmp_path, resume=True)
    assert first.state.global_step == again.state.global_step == 5
    assert all(map(torch.equal, weights(first), weights(again)))
    assert again.totals.positions_selected == first.totals.positions_selected


def test_a_training_that_goes_on_between_two_logged_steps_logs_the_same(tmp_path: Path) -> None:
    for name, changes in (
        ("text", {"positions": {"metric": "student_entropy", "fraction": {"from": 1.0, "to": 0.2}}}),
        ("answers", {"on_policy": {"max_new_tokens": 4}, "criterion": {"name": "reverse_kl"}}),
    ):
        whole = trained(tmp_path / name, max_steps=6, **changes)
        for step in (4, 6):  # as if it had ended before step 4 was saved
            for file in (tmp_path / name / f"checkpoint-{step}").iterdir():
                file.unlink()
        resumed = trained(tmp_path / name, resume=True, max_steps=6, **changes)
        assert lines(resumed) == lines(whole)
        assert len(lines(whole)) == 2


class Ask(TrainerCallback):
    """Asks the training to end in the middle of a step."""

    def __init__(self, step: int) -> None:
        self.step = step

    def on_step_begin(self, args: Any, state: Any, *_: Any, **__: Any) -> None:  # noqa: ARG002
        if state.global_step == self.step - 1:
            interrupts.ask("a test")


def test_callbacks_keep_their_order_when_a_training_goes_on(tmp_path: Path) -> None:
    def make() -> DistillTrainer:
        arguments = make_arguments(tmp_path / "checkpoints", max_steps=3, save_strategy="steps", save_steps=2)
        trainer = DistillTrainer(
            make_model(1),
            make_model(0, layers=3),
            arguments,
            make_samples(12),
            processing_class=make_tokenizer(),
            callbacks=[MetricsFile("../metrics.jsonl")],
        )
        trainer.add_callback(EverySteps(50, lambda: 0, lambda: None))
        return trainer

    first, resumed = make(), make()
    first.train()
    resumed.train(resume_from_checkpoint=True)
    orders = [[type(callback) for callback in trainer.callback_handler.callbacks] for trainer in (first, resumed)]
    assert orders[0] == orders[1]


def test_a_training_that_is_asked_to_end_saves_after_the_step_and_goes_on_the_same(tmp_path: Path) -> None:
    whole = trained(tmp_path / "whole", save_steps=100)
    arguments = make_arguments(
        tmp_path / "asked", max_steps=5, logging_steps=3, save_strategy="steps", save_steps=100, save_total_limit=1
    )
    trainer = DistillTrainer(
        make_model(1),
        make_model(0, layers=3),
        arguments,
        make_samples(12),
        processing_class=make_tokenizer(),
        callbacks=[Ask(2)],
    )
    try:
        trainer.train()
    finally:
        interrupts.forget()
    assert trainer.state.global_step == 2
    assert [path.name for path in (tmp_path / "asked").glob("checkpoint-*")] == ["checkpoint-2"]
    resumed = trained(tmp_path / "asked", resume=True, save_steps=100)
    assert lines(resumed) == lines(whole)
    assert all(map(torch.equal, weights(resumed), weights(whole)))


def test_a_checkpoint_is_written_when_it_is_time(tmp_path: Path) -> None:
    """A clock that is always due: a checkpoint each step, and the numbers of a training without."""
    without = trained(tmp_path / "without", save_strategy="no")
    timed = trained(tmp_path / "timed", save_strategy="no", save_seconds=1e-9)
    assert sorted(path.name for path in (tmp_path / "timed").iterdir()) == [f"checkpoint-{n}" for n in range(1, 6)]
    assert all(map(torch.equal, weights(timed), weights(without)))
    assert lines(timed) == lines(without)


def test_checkpoints_go_by_their_steps_and_not_by_their_dates(tmp_path: Path) -> None:
    trained(tmp_path, max_steps=2)
    for name in ("checkpoint-1", "checkpoint-2"):  # a clock that was ahead
        (tmp_path / name).mkdir(exist_ok=True)
        os.utime(tmp_path / name, (4e9, 4e9))
    trained(tmp_path, resume=True, max_steps=4, save_total_limit=2)
    assert sorted(path.name for path in tmp_path.glob("checkpoint-*")) == ["checkpoint-2", "checkpoint-4"]


def test_a_signal_to_all_processes_leaves_a_runs_data_loader_its_samples(tmp_path: Path) -> None:
    """Outside a run, PyTorch has it: a loader's process that a signal ended fails the training."""

    def read(is_run: bool) -> int:
        interrupts.leave_to_parent(is_run)
        arguments = make_arguments(tmp_path, dataloader_num_workers=1)
        trainer = DistillTrainer(
            make_model(1), make_model(0, layers=3), arguments, make_samples(60), processing_class=make_tokenizer()
        )
        others = set(psutil.Process().children())  # that earlier tests left in this process
        batches = iter(trainer.get_train_dataloader())
        next(batches)
        (worker,) = set(psutil.Process().children()) - others
        subprocess.run(["kill", "-TERM", str(worker.pid)], check=True)  # one that its parent sent would be obeyed
        with suppress(psutil.TimeoutExpired):
            worker.wait(0.5)
        return 1 + len(list(batches))

    try:
        assert read(is_run=True) == 15
        with pytest.raises(RuntimeError, match="is killed by signal: Terminated"):
            read(is_run=False)
    finally:
        interrupts.leave_to_parent(False)


def test_persistent_workers_end_with_the_training(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A run's workers ignore signals, so the process that leaves would wait for them for ever."""
    monkeypatch.setattr(interrupts._Asked, "is_left_to_parent", True)
    held = trained(tmp_path, dataloader_num_workers=2, dataloader_persistent_workers=True)
    left = multiprocessing.active_children()
    for worker in left:
        worker.kill()
    assert left == []
    assert held.state.global_step == 5
