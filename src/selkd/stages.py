"""The stages of a run: prepare, train, evaluate; each is skipped where its finished output verifies."""

import json
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel, PrinterCallback, ProgressCallback

from selkd import evaluation_stage
from selkd.accounting import COUNTS, add_seconds, begin_peaks, count_teacher_tokens, timed
from selkd.cache.reader import TeacherCache
from selkd.data.samples import SampleDataset
from selkd.errors import InputError
from selkd.evaluation.fidelity import Fidelity, fidelity
from selkd.evaluation.overlap import overlaps
from selkd.models.adapters import merged
from selkd.models.loading import n_parameters
from selkd.models.sources import locate
from selkd.recipe_choices import FractionSchedule, PositionOptions, SampleOptions
from selkd.run_directory import RunDirectory, write_whole
from selkd.training.callbacks import EverySteps, MetricsFile, TrainingProgress, read_metrics
from selkd.training.checkpoints import last_whole_checkpoint
from selkd.training.trainer import DistillTrainer
from selkd.workspace import Workspace, environment

STUDENT_KEYS = ("fingerprint", "parameters", "layers", "trained_parameters")  # told by later stages


def prepare(work: Workspace, run: RunDirectory) -> None:
    """Find the models, tokenise the text, cut the student; write down what there is."""
    with timed(run, "prepare"):
        work.require_positions()
        splits, recipe = work.splits, work.recipe
        n_valid = int(splits.train.n_valid.sum())
        own = work.own_parts
        changed = [kind for kind, digest in run.record.get("own_parts", own).items() if own.get(kind) != digest]
        if changed:
            raise InputError(
                f"{run.path}: the source of this recipe's own {changed[0]} changed since the run began. Give another "
                "--out, or restore it; nothing was changed."
            )
        run.record.update(
            own_parts=own,
            name=recipe.name or run.path.name,
            recipe=recipe.resolved(),
            environment=environment(work),
            data={
                "documents": splits.documents,
                "train_samples": len(splits.train),
                "train_tokens": splits.train_tokens,
                "train_positions": n_valid,
                "held_out_samples": len(splits.held_out),
                "cut_documents": splits.cut,
                "prompts_too_long": splits.too_long,
                "documents_without_target": splits.unanswered,
                "fingerprint": splits.fingerprint,
                "held_out_fingerprint": splits.held_out.digest,
            },
        )
        run.record.setdefault("counts", dict.fromkeys(COUNTS))["samples"] = len(splits.train)
        for part in ("fidelity", "train", "teacher_cache", "benchmarks", "on_policy"):
            run.record.setdefault(part, None)
        source = work.student_source
        run.record["student"] = {
            "model": recipe.student.model,
            "initial_fingerprint": source.fingerprint,
            "pruned_from_teacher": work.pruning,
        } | {k: v for k, v in (run.record.get("student") or {}).items() if k in STUDENT_KEYS}
        teacher = {"model": work.teacher_source.name, "fingerprint": work.teacher_source.fingerprint}
        run.record["teacher"] = {**(run.record.get("teacher") or {}), **teacher}
        count_teacher_tokens(work, run)


def size(model: PreTrainedModel) -> dict[str, int]:
    """Parameters and layers, for the record."""
    config = model.config.get_text_config(decoder=True)
    return {"parameters": n_parameters(model), "layers": int(config.num_hidden_layers)}


def train(work: Workspace, run: RunDirectory, samples: SampleDataset, teacher: TeacherCache | None) -> None:
    """Train the student, from its last checkpoint if there is one, and save it."""
    student_path = run.path / "student"
    is_alone = begin_peaks(run)
    if teacher is not None:
        work.release_teacher()
    trainer = DistillTrainer(
        model=work.student,
        teacher=work.teacher() if teacher is None else teacher,
        args=work.arguments,
        train_dataset=samples,
        processing_class=work.tokenizer,
        callbacks=[MetricsFile("../metrics.jsonl"), TrainingProgress()],
    )
    for theirs in (PrinterCallback, ProgressCallback):  # both write to standard output, which is for the answer
        trainer.remove_callback(theirs)
    if (every := work.recipe.evaluation.every_steps) is not None:
        also_last = work.recipe.evaluation.keep_best is not None
        trainer.add_callback(
            EverySteps(every, lambda: _log_held_out(work, trainer, is_cached=teacher is not None), also_last)
        )
    last = last_whole_checkpoint(Path(work.arguments.output_dir))
    trainer.train(resume_from_checkpoint=None if last is None else str(last))
    if trainer.is_fsdp_enabled:  # a sharded state is no student that Transformers loads
        trainer.accelerator.state.fsdp_plugin.set_state_dict_type("FULL_STATE_DICT")
    saved = run.path / "adapter" if work.recipe.student.lora is not None else student_path
    trainer.save_model(str(saved))
    if work.state.is_main_process:
        (saved / "training_args.bin").unlink(missing_ok=True)  # the Trainer's pickle: a student needs none
        if saved != student_path:
            merged(work.student).save_pretrained(student_path)
            work.tokenizer.save_pretrained(student_path)
    trained = sum(parameter.numel() for parameter in work.student.parameters() if parameter.requires_grad)
    run.record["student"] |= size(work.student) | {"trained_parameters": trained}
    if work.recipe.student.lora is not None:  # the adapters are none of the saved student's own
        run.record["student"]["parameters"] -= trained
    # Looked up now: resuming has replaced the callback by the checkpoint's.
    metrics = next(found for found in trainer.callback_handler.callbacks if isinstance(found, MetricsFile))
    add_seconds(run, "train", metrics.seconds - (run.record["seconds"]["train"] or 0.0), is_alone)
    lines = read_metrics(metrics.path)
    losses = [line["loss"] for line in lines if "loss" in line]
    run.record["train"] = {
        "steps": trainer.state.global_step,
        "epochs": trainer.state.epoch,
        "loss_first": losses[0] if losses else None,
        "loss_last": losses[-1] if losses else None,
    }
    if work.recipe.on_policy is not None:
        run.record["on_policy"] = trainer.rollouts.figures()
    _record_on_the_way(run, lines)
    totals = trainer.totals
    run.record["counts"].update(positions_valid=totals.positions_valid, positions_selected=totals.positions_selected)
    count_teacher_tokens(work, run, train=totals.teacher_tokens)
    work.state.wait_for_everyone()
    run.record["student"]["fingerprint"] = locate(str(student_path), work.cache_dir).fingerprint


def is_trained(work: Workspace, run: RunDirectory) -> bool:
    """Whether the run's student is finished and still the one that was saved."""
    stored = (run.record.get("student") or {}).get("fingerprint")
    student = run.path / "student"
    if stored is None or run.record.get("train") is None or not (student / "config.json").is_file():
        return False
    try:
        found = locate(str(student), work.cache_dir).fingerprint
    except InputError:  # weights are gone: train again, from the last checkpoint
        return False
    if found != stored:
        raise InputError(
            f"{student}: changed since it was saved. Move it away and run again to restore it from the last "
            "checkpoint; nothing was changed."
        )
    return True


def is_measured(work: Workspace, run: RunDirectory, when: str) -> bool:
    """Whether all of ``evaluation.suite`` was measured ``before`` or ``after`` training."""
    options = work.recipe.evaluation
    wanted = {"fidelity": "fidelity" in options.suite, "benchmarks": evaluation_stage.has_benchmarks(options)}
    return all((run.record[part] or {}).get(when) for part, is_wanted in wanted.items() if is_wanted)


def forget_after(run: RunDirectory) -> None:
    """The student has been trained anew: what was measured after training counts no more."""
    for part in ("fidelity", "benchmarks"):
        if run.record[part]:
            run.record[part]["after"] = None


def evaluate(work: Workspace, run: RunDirectory, student: PreTrainedModel, when: str) -> None:
    """Measure ``student`` ``before`` or ``after`` training, into ``record.fidelity`` and ``record.benchmarks``."""
    options = work.recipe.evaluation
    with timed(run, "evaluate"):
        run.record["student"] |= size(student)
        if "fidelity" in options.suite:
            _record_fidelity(work, run, student, when)
        if evaluation_stage.has_benchmarks(options):
            stored = run.record["student"]
            fingerprint = stored["initial_fingerprint"] if when == "before" else stored["fingerprint"]
            measured = evaluation_stage.measure(work, student, when, fingerprint)
            _benchmarks(run)[when] = measured


def _record_fidelity(work: Workspace, run: RunDirectory, student: PreTrainedModel, when: str) -> None:
    found = _measure(work, student, f"evaluating {when} training")
    record = run.record["fidelity"] or {"before": None, "after": None}
    record[when] = {
        "perplexity": found.perplexity,
        "kl_nats": found.kl_nats,
        "top1_agreement": found.top1_agreement,
    }
    record["teacher"] = {"perplexity": found.teacher_perplexity}
    record["positions"] = found.positions
    record.setdefault("by_entropy", {})[when] = found.by_entropy()
    run.record["fidelity"] = record
    run.record["teacher"] |= size(work.teacher())
    count_teacher_tokens(work, run, **{f"evaluate_{when}": found.teacher_tokens})
    if when == "before" and work.state.is_main_process:
        (run.path / "selection").mkdir(exist_ok=True)
        write_whole(run.path / "selection" / "overlap.json", json.dumps(_overlaps(work, found)) + "\n")


def _overlaps(work: Workspace, found: Fidelity) -> dict[str, Any]:
    """How far the metrics agree on the held-out split under the initial student, at the recipe's fractions."""
    recipe = work.recipe
    fraction = recipe.positions.fraction
    if isinstance(fraction, FractionSchedule):
        fraction = fraction.to
    kept = SampleOptions().fraction if recipe.samples is None else recipe.samples.fraction
    usual = PositionOptions.model_fields["fraction"].default
    return overlaps(found.statistics, found.sample_of, fraction or usual, kept)


def _benchmarks(run: RunDirectory) -> dict[str, Any]:
    """``record.benchmarks``, made when there is something to write."""
    if run.record["benchmarks"] is None:
        run.record["benchmarks"] = {"before": None, "after": None, "steps": [], "best": None}
    benchmarks: dict[str, Any] = run.record["benchmarks"]
    return benchmarks


def _record_on_the_way(run: RunDirectory, lines: list[dict[str, Any]]) -> None:
    """What was measured during training, and which student was best, into ``record.benchmarks``."""
    steps = []
    for line in lines:
        found = {name: value for name, value in line.items() if name.startswith(evaluation_stage.LOGGED)}
        if found:
            steps.append({"step": line["step"], **found})
    best = evaluation_stage.read_best(run.path)
    if steps or best:
        _benchmarks(run).update(steps=steps, best=best)


def _measure(work: Workspace, student: PreTrainedModel, description: str) -> Fidelity:
    return fidelity(
        student, work.teacher(), work.splits.held_out, work.dtype, work.pad_token_id, work.n_classes, description
    )


def _log_held_out(work: Workspace, trainer: DistillTrainer, is_cached: bool) -> None:
    """Measure the student as it is now, log the figures, and keep it if it is the best so far."""
    options, step = work.recipe.evaluation, trainer.state.global_step
    logs: dict[str, float] = {}
    measured: dict[str, float] = {}
    if "fidelity" in options.suite:
        found = _measure(work, work.student, "evaluating")
        if is_cached:  # the teacher is not to stay in memory while the student trains
            work.release_teacher()
        trainer.totals.teacher_tokens += found.teacher_tokens
        measured = {name: getattr(found, name) for name in ("perplexity", "kl_nats", "top1_agreement")}
        logs = {f"held_out_{name}": value for name, value in measured.items()}
    if evaluation_stage.has_benchmarks(options):
        summary = evaluation_stage.measure(work, work.student, f"step-{step}", f"step {step}", reuse=False)
        if summary is not None:
            logs |= evaluation_stage.figures(summary)
    trainer.log(logs)
    evaluation_stage.keep_if_best(work, work.student, step, measured | logs)
