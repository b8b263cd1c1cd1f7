"""The stage that trains the student, from its last checkpoint if it has one, and saves it."""

from pathlib import Path

from transformers import PrinterCallback, ProgressCallback

from selkd.cache.reader import TeacherCache
from selkd.data.samples import SampleDataset
from selkd.errors import InputError
from selkd.models.adapters import merged
from selkd.models.sources import locate
from selkd.run import benchmarks
from selkd.run.directory import RunDirectory
from selkd.run.evaluate import FIGURES, benchmarks_record, forget_after, measure_fidelity
from selkd.run.record import PeakMemory, add_seconds, count_teacher_tokens, size
from selkd.run.workspace import Workspace
from selkd.training.callbacks import EverySteps, MetricsFile, TrainingProgress
from selkd.training.trainer import DistillTrainer


def train(work: Workspace, run: RunDirectory, samples: SampleDataset, cache: TeacherCache | None) -> None:
    """Train the student on ``samples``, from its last checkpoint if it has one; save it and record the training."""
    peaks = PeakMemory(run)
    if cache is not None:
        work.models.release_teacher()
    trainer = DistillTrainer(
        model=work.models.student,
        teacher=work.models.teacher if cache is None else cache,
        args=work.arguments,
        train_dataset=samples,
        processing_class=work.tokenizer,
        callbacks=[MetricsFile("../metrics.jsonl"), TrainingProgress()],
    )
    for callback in (PrinterCallback, ProgressCallback):  # both write to standard output, where only the answer belongs
        trainer.remove_callback(callback)
    if (every := work.recipe.evaluation.every_steps) is not None:
        also_last = work.recipe.evaluation.keep_best is not None
        trainer.add_callback(
            EverySteps(every, lambda: _log_held_out(work, trainer, is_cached=cache is not None), also_last)
        )
    last = trainer.last_checkpoint()
    trainer.train(resume_from_checkpoint=None if last is None else str(last))
    student = _save(work, run, trainer)
    trained = sum(parameter.numel() for parameter in work.models.student.parameters() if parameter.requires_grad)
    run.record["student"] |= size(work.models.student) | {"trained_parameters": trained}
    if work.recipe.student.lora is not None:  # the saved student has no adapters
        run.record["student"]["parameters"] -= trained
    _record_training(run, trainer, peaks)
    count_teacher_tokens(work, run, train=trainer.totals.teacher_tokens)
    work.state.wait_for_everyone()
    run.record["student"]["fingerprint"] = locate(str(student), work.cache_dir).fingerprint
    forget_after(run)
    run.save()


def _save(work: Workspace, run: RunDirectory, trainer: DistillTrainer) -> Path:
    """Save the student with its adapters merged, and return its folder."""
    student = run.path / "student"
    saved = run.path / "adapter" if work.recipe.student.lora is not None else student
    trainer.save_model(str(saved))
    if work.state.is_main_process:
        (saved / "training_args.bin").unlink(
            missing_ok=True
        )  # a pickle of the Trainer's, which a student does not need
        if saved != student:
            merged(work.models.student).save_pretrained(student)
            work.tokenizer.save_pretrained(student)
    return student


def _record_training(run: RunDirectory, trainer: DistillTrainer, peaks: PeakMemory) -> None:
    """Record steps, losses, counts, time, and the measurements on the way."""
    # Looked up here, as resuming replaces the callback by the checkpoint's.
    metrics = next(callback for callback in trainer.callback_handler.callbacks if isinstance(callback, MetricsFile))
    add_seconds(run, "train", metrics.seconds - (run.record["seconds"]["train"] or 0.0), peaks)
    lines = metrics.lines.read()
    losses = [line["loss"] for line in lines if "loss" in line]
    run.record["train"] = {
        "steps": trainer.state.global_step,
        "epochs": trainer.state.epoch,
        "loss_first": losses[0] if losses else None,
        "loss_last": losses[-1] if losses else None,
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
    student = run.path / "student"
    if stored is None or run.record.get("train") is None or not (student / "config.json").is_file():
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


def _log_held_out(work: Workspace, trainer: DistillTrainer, is_cached: bool) -> None:
    """Measure the current student, log the figures, and keep it if it is the best so far."""
    options, step = work.recipe.evaluation, trainer.state.global_step
    logs: dict[str, float] = {}
    measured: dict[str, float] = {}
    if "fidelity" in options.suite:
        fidelity = measure_fidelity(work, work.models.student, "evaluating")
        if is_cached:  # training needs no teacher in memory
            work.models.release_teacher()
        trainer.totals.teacher_tokens += fidelity.teacher_tokens
        measured = {name: getattr(fidelity, name) for name in FIGURES}
        logs = {f"held_out_{name}": value for name, value in measured.items()}
    if options.has_benchmarks:
        summary = benchmarks.measure(work, work.models.student, f"step-{step}", f"step {step}", reuse=False)
        if summary is not None:
            logs |= benchmarks.figures(summary)
    trainer.log(logs)
    benchmarks.keep_if_best(work, work.models.student, step, measured | logs)
