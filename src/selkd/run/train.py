"""The stage that trains the student, from its last checkpoint if it has one, and saves it."""

from pathlib import Path
from typing import Any

from torch import nn
from transformers import PrinterCallback, ProgressCallback

from selkd.data.samples import SampleDataset
from selkd.errors import InputError, Interrupted
from selkd.files import new_folder
from selkd.interrupts import interrupted, stop_together
from selkd.models.adapters import merged
from selkd.models.sources import locate
from selkd.run import benchmarks
from selkd.run.directory import RunDirectory
from selkd.run.enough import warn_if_short
from selkd.run.evaluate import FIGURES, benchmarks_record, forget_after, measure_fidelity
from selkd.run.held_out import write_step_sums
from selkd.run.record import PeakMemory, add_seconds, count_teacher_tokens, size
from selkd.run.workspace import Workspace
from selkd.training.callbacks import EverySteps, Measured, MetricsFile, TrainingProgress
from selkd.training.trainer import DistillTrainer
from selkd_cache.reader import TeacherCache


def train(work: Workspace, run: RunDirectory, samples: SampleDataset, cache: TeacherCache | None) -> None:
    """Train the student on ``samples``, from its last checkpoint if it has one; save it and record the training."""
    stop_together()
    peaks = PeakMemory(run)
    if cache is not None:
        work.models.release_teacher()
    warn_if_short(work, "train", Path(work.arguments.output_dir))
    trainer = RunTrainer(
        work,
        is_cached=cache is not None,
        model=work.models.student,
        teacher=work.models.teacher if cache is None else cache,
        args=work.arguments,
        train_dataset=samples,
        processing_class=work.tokenizer,
        callbacks=[MetricsFile("../metrics.jsonl"), TrainingProgress()],
    )
    for callback in (PrinterCallback, ProgressCallback):  # both write to standard output, where only the answer belongs
        trainer.remove_callback(callback)
    last = trainer.last_checkpoint()
    trainer.train(resume_from_checkpoint=None if last is None else str(last))
    if trainer.state.global_step < trainer.state.max_steps:  # something else ended it early: the student isn't done
        raise interrupted(f"at optimiser step {trainer.state.global_step} of {trainer.state.max_steps}")
    student = _save(work, run, trainer)
    trained = sum(parameter.numel() for parameter in work.models.student.parameters() if parameter.requires_grad)
    run.record["student"] |= size(work.models.student) | {"trained_parameters": trained}
    if work.recipe.student.lora is not None:  # the saved student has no adapters
        run.record["student"]["parameters"] -= trained
    _record_training(run, trainer, peaks)
    count_teacher_tokens(run, train=trainer.totals.teacher_tokens)
    work.state.wait_for_everyone()
    run.record["student"]["fingerprint"] = locate(str(student), work.cache_dir).fingerprint
    forget_after(run)
    run.save()


class RunTrainer(DistillTrainer):
    """The trainer of a run: it measures the student as ``evaluation`` says, and raises where it was asked to end.

    Args:
        is_cached: whether the teacher's answers come from a cache, so that training needs no teacher in memory.
    """

    def __init__(self, work: Workspace, *, is_cached: bool, **given: Any) -> None:
        self.work, self.is_cached = work, is_cached
        super().__init__(**given)
        options = work.recipe.evaluation
        if options.every_steps is not None:
            self.add_callback(Measured())
            also_last = options.keep_best is not None
            self.add_callback(
                EverySteps(options.every_steps, lambda: self._kept(Measured).step, self._evaluate, also_last)
            )

    def _evaluate(self, *_: Any, **__: Any) -> dict[str, float]:
        """Where the Trainer evaluates, measure the current student, and keep it if it is the best so far."""
        self.control.should_evaluate = False
        try:
            self._measure()
        except Interrupted:  # the checkpoint of this step says that it is still to be measured
            if self.state.global_step == self._resumed_at:
                raise
            self.control.should_save = self.is_interrupted = True
        else:
            self._kept(Measured).step = self.state.global_step
        return {}

    def _measure(self) -> None:
        work, options, step = self.work, self.work.recipe.evaluation, self.state.global_step
        logs: dict[str, float] = {}
        measured: dict[str, float] = {}
        if "fidelity" in options.suite:
            fidelity = measure_fidelity(work, work.models.student, "evaluating")
            if self.is_cached:  # training needs no teacher in memory
                work.models.release_teacher()
            measured = {name: getattr(fidelity, name) for name in FIGURES}
            logs = {f"held_out_{name}": value for name, value in measured.items()}
            if work.state.is_main_process:
                write_step_sums(work.run_path, fidelity, step)
        if options.has_benchmarks:
            summary = benchmarks.measure(work, work.models.student, f"step-{step}", f"step {step}", reuse=False)
            if summary is not None:
                logs |= benchmarks.figures(summary)
        if "fidelity" in options.suite:
            self.totals.teacher_tokens += fidelity.teacher_tokens
        self.log(logs)
        is_gathered = options.keep_best is not None and self.is_fsdp_enabled
        weights = self.accelerator.get_state_dict(self.model) if is_gathered else None
        benchmarks.keep_if_best(work, work.models.student, step, measured | logs, weights)

    def _init_training_state(self, *args: Any) -> tuple[int, int]:
        epochs_and_steps = super()._init_training_state(*args)
        self._resumed_at = self.state.global_step
        return epochs_and_steps

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        super()._save_checkpoint(model, trial)
        if self.is_interrupted:
            raise interrupted(f"at optimiser step {self.state.global_step} of {self.state.max_steps}, which is saved")


def _save(work: Workspace, run: RunDirectory, trainer: DistillTrainer) -> Path:
    """Save the student with its adapters merged, whole or not at all, and return its folder."""
    student = run.path / "student"
    saved = run.path / "adapter" if work.recipe.student.lora is not None else student
    if not work.state.is_main_process:
        trainer.save_model(str(saved))  # it has a part of the weights, and writes nothing
        return student
    with new_folder(saved, replace=True) as new:
        trainer.save_model(str(new))
        (new / "training_args.bin").unlink(missing_ok=True)  # a pickle, which a student does not need
    if saved != student:
        with new_folder(student, replace=True) as new:
            merged(work.models.student).save_pretrained(new)
            work.tokenizer.save_pretrained(new)
    return student


def _record_training(run: RunDirectory, trainer: DistillTrainer, peaks: PeakMemory) -> None:
    """Record steps, losses, counts, time, and the measurements on the way."""
    # Looked up here, as resuming replaces the callback by the checkpoint's.
    metrics = next(callback for callback in trainer.callback_handler.callbacks if isinstance(callback, MetricsFile))
    add_seconds(run, "train", metrics.seconds - (run.record["seconds"]["train"] or 0.0), peaks)
    lines = metrics.lines.read()
    losses = [line["loss"] for line in lines if "loss" in line]
    kl = [line.get("kl_nats") for line in lines if "loss" in line]  # null where it can't be had
    run.record["train"] = {
        "steps": trainer.state.global_step,
        "max_steps": trainer.state.max_steps,
        "epochs": trainer.state.epoch,
        "loss_first": losses[0] if losses else None,
        "loss_last": losses[-1] if losses else None,
        "kl_nats_first": kl[0] if kl else None,
        "kl_nats_last": kl[-1] if kl else None,
    }
    if trainer.answering is not None:
        run.record["on_policy"] = trainer.rollouts.figures()
    totals = trainer.totals
    run.record["counts"].update(positions_valid=totals.positions_valid, positions_selected=totals.positions_selected)
    steps = []
    for line in lines:
        figures = {name: value for name, value in line.items() if name.startswith(benchmarks.LOGGED)}
        if figures:
            steps.append({"step": line["step"], **figures})
    best = benchmarks.read_best(run.path)
    if steps or best:
        benchmarks_record(run).update(steps=steps, best=best)


def is_trained(work: Workspace, run: RunDirectory) -> bool:
    """Whether the run's student is finished and still the one that was saved."""
    stored = (run.record.get("student") or {}).get("fingerprint")
    student, training = run.path / "student", run.record.get("train")
    if stored is None or training is None or not (student / "config.json").is_file():
        return False
    if training["steps"] < training.get("max_steps", 0):  # a former version took an interrupted training for a done one
        return False
    try:
        fingerprint = locate(str(student), work.cache_dir).fingerprint
    except InputError:  # the weights are gone: train again from the last checkpoint
        return False
    if fingerprint != stored:
        raise InputError(
            f"{student}: changed since it was saved. Move it away and run again to restore it from the last "
            "checkpoint; nothing was changed."
        )
    return True
