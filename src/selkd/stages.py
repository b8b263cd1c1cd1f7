"""The stages of a run: score -> cache -> train -> evaluate. Each is skipped where its finished output verifies."""

import resource
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path

import numpy as np
import torch
from transformers import PreTrainedModel, PrinterCallback, ProgressCallback

from selkd.build_cache import build_cache
from selkd.cache.reader import TeacherCache
from selkd.data.samples import SampleDataset
from selkd.errors import InputError
from selkd.evaluation.fidelity import Fidelity, fidelity
from selkd.maths.estimate import ClassSubset
from selkd.models.loading import n_parameters
from selkd.models.sources import locate
from selkd.models.tokenizers import tokenizer_fingerprint
from selkd.run_directory import RunDirectory
from selkd.scoring import NEEDS_TEACHER, score_samples
from selkd.selection.noise import sample_generator
from selkd.selection.samples import SampleScores, highest
from selkd.selection.two_stage import by_frequency, class_subset
from selkd.training.callbacks import EverySteps, MetricsFile, TrainingProgress, read_metrics
from selkd.training.checkpoints import last_whole_checkpoint
from selkd.training.trainer import DistillTrainer
from selkd.workspace import Workspace, environment

COMPARED_SAMPLES = 32  # at least so many approximate sample scores are compared with exact ones


@contextmanager
def timed(run: RunDirectory, stage: str) -> Iterator[None]:
    """Add a stage's seconds to the record; the peak of memory, too."""
    started = time.perf_counter()
    yield
    add_seconds(run, stage, time.perf_counter() - started)


def add_seconds(run: RunDirectory, stage: str, seconds: float) -> None:
    """Add to a stage's time in the record, and keep total and peak memory up to date."""
    times = run.record.setdefault("seconds", dict.fromkeys(("prepare", "score", "cache", "train", "evaluate", "total")))
    times[stage] = round((times[stage] or 0.0) + seconds, 3)
    times["total"] = round(sum(value or 0.0 for name, value in times.items() if name != "total"), 3)
    peak = run.record.setdefault("peak_memory_bytes", {"process": None, "accelerator": None})
    unit = 1 if sys.platform == "darwin" else 1024
    peak["process"] = max(peak["process"] or 0, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit)
    if torch.cuda.is_available():
        peak["accelerator"] = max(peak["accelerator"] or 0, torch.cuda.max_memory_allocated())


def prepare(work: Workspace, run: RunDirectory) -> None:
    """Find the models, tokenise the text, cut the student; write down what there is."""
    with timed(run, "prepare"):
        work.require_positions()
        splits, recipe = work.splits, work.recipe
        n_valid = int(splits.train.n_valid.sum())
        run.record.update(
            name=recipe.name or run.path.name,
            recipe=recipe.resolved(),
            environment=environment(work),
            data={
                "documents": splits.documents,
                "train_samples": len(splits.train),
                "train_tokens": splits.train_tokens,
                "train_positions": n_valid,
                "held_out_samples": len(splits.held_out),
                "fingerprint": splits.fingerprint,
            },
        )
        run.record.setdefault("counts", dict.fromkeys(COUNTS))["samples"] = len(splits.train)
        for part in ("fidelity", "train", "teacher_cache"):
            run.record.setdefault(part, None)
        source = work.student_source
        run.record["student"] = {
            "model": recipe.student.model,
            "initial_fingerprint": source.fingerprint,
            "pruned_from_teacher": work.pruning,
        } | {k: v for k, v in (run.record.get("student") or {}).items() if k in ("fingerprint", "parameters", "layers")}
        teacher = {"model": work.teacher_source.name, "fingerprint": work.teacher_source.fingerprint}
        run.record["teacher"] = {**(run.record.get("teacher") or {}), **teacher}
        count_teacher_tokens(work, run)


COUNTS = ("samples", "samples_kept", "positions_valid", "positions_selected", "teacher_tokens")


def count_teacher_tokens(work: Workspace, run: RunDirectory, **tokens: int) -> None:
    """Write down what the teacher ran on, by stage; a stage that ran again replaces its count."""
    by_stage = run.record.setdefault("teacher_tokens", {})
    by_stage.update(work.teacher_tokens | tokens)
    run.record["counts"]["teacher_tokens"] = sum(by_stage.values())


def size(model: PreTrainedModel) -> dict[str, int]:
    """Parameters and layers, for the record."""
    config = model.config.get_text_config(decoder=True)
    return {"parameters": n_parameters(model), "layers": int(config.num_hidden_layers)}


def score(work: Workspace, run: RunDirectory) -> SampleDataset:
    """The samples that are kept: scored by the frozen initial student, or read from where they were scored."""
    train, options = work.splits.train, work.recipe.samples
    if options is None:
        run.record["counts"]["samples_kept"] = len(train)
        return train
    with timed(run, "score"):
        path = Path(options.path).expanduser() if options.path else run.path / "selection" / "samples.parquet"
        fingerprint = {
            "metric": options.metric + _approximation(work),
            "data": work.splits.fingerprint,
            "student": work.student_source.fingerprint,
            "classes": str(work.n_classes),
            "precision": str(work.dtype),
            **({"seed": str(work.recipe.seed)} if options.metric == "random" else {}),
            **(
                {"teacher": work.teacher_source.fingerprint, "teacher_precision": str(work.teacher_dtype)}
                if options.metric in NEEDS_TEACHER
                else {}
            ),
        }
        own = run.path / "selection" / "samples.parquet"
        is_new = not path.exists()
        if not is_new:
            scores = SampleScores.read(path, fingerprint).scores
        else:
            scores, tokens = _score(work, train, _subset(work) if options.scoring == "approximate" else None)
            if options.scoring == "approximate":
                run.record["scoring_agreement"] = _scoring_agreement(work, scores)
            if tokens:
                count_teacher_tokens(work, run, score=tokens)
        kept = highest(scores, options.fraction)
        if work.state.is_main_process:
            found = SampleScores([sample_id.hex() for sample_id in train.ids], scores, fingerprint)
            if is_new:
                found.write(path, kept)
            if own != path:  # a shared file keeps the choice of the run that wrote it
                found.write(own, kept)
        work.state.wait_for_everyone()
    run.record["counts"]["samples_kept"] = len(kept)
    return train.select(kept)


def _score(work: Workspace, samples: SampleDataset, subset: ClassSubset | None) -> tuple[np.ndarray, int]:
    """Scores of some of the training samples, and the tokens that the teacher ran on."""
    assert work.recipe.samples is not None
    return score_samples(
        work.recipe.samples.metric,
        samples,
        lambda: work.student,
        work.teacher,
        work.dtype,
        work.pad_token_id,
        work.n_classes,
        work.recipe.seed,
        subset,
    )


def _approximation(work: Workspace) -> str:
    """What approximate scores depend on beyond exact ones; the classes' order follows from data and classes."""
    options = work.recipe.samples
    if options is None or options.scoring == "exact":
        return ""
    classes = f"{options.frequent_classes} frequent and {options.tail_classes} other classes"
    return f", estimated from {classes}, seed {work.recipe.seed}"


def _subset(work: Workspace) -> ClassSubset:
    options = work.recipe.samples
    assert options is not None and options.frequent_classes and options.tail_classes, "settled with approximate"  # noqa: PT018
    ordered = by_frequency(work.splits.train.token_counts(work.n_classes))
    seed, device = work.recipe.seed, work.device
    return class_subset(ordered, options.frequent_classes, options.tail_classes, seed, "samples", device=device)


def _scoring_agreement(work: Workspace, scores: np.ndarray) -> dict[str, float | int]:
    """Approximate ``scores`` [N] against exact ones on a few samples, drawn by the seed."""
    options, train = work.recipe.samples, work.splits.train
    assert options is not None
    count = min(len(train), max(COMPARED_SAMPLES, len(train) // 50))
    generator = sample_generator(work.recipe.seed, b"", "compared samples")
    some = np.sort(generator.choice(len(train), count, replace=False))
    exact, _ = _score(work, train.select(some), None)
    best, found = highest(exact, options.fraction), highest(scores[some], options.fraction)
    return {
        "samples_compared": count,
        "share_of_exact_choice": len(np.intersect1d(best, found)) / max(1, len(best)),
        "correlation": float(np.corrcoef(exact, scores[some])[0, 1]) if count > 1 else 1.0,
    }


def cache(work: Workspace, run: RunDirectory, samples: SampleDataset) -> TeacherCache | None:
    """The teacher's drawn classes of ``samples`` on disk, or None for a live teacher."""
    recipe = work.recipe
    if recipe.cache is None:
        return None
    directory = cache_directory(work, run)
    with timed(run, "cache"):
        fingerprint = cache_fingerprint(work)
        tokens = build_cache(
            directory,
            fingerprint,
            samples,
            work.teacher,
            recipe.classes,
            recipe.criterion.temperature,
            recipe.seed,
            work.pad_token_id,
        )
        if tokens:
            earlier = run.record.get("teacher_tokens", {}).get("cache", 0)  # of shards that were lost meanwhile
            count_teacher_tokens(work, run, cache=earlier + tokens)
        opened = TeacherCache.open(directory, fingerprint)
    run.record["teacher_cache"] = opened.stats()
    return opened


def cache_directory(work: Workspace, run: RunDirectory) -> Path:
    """Where the recipe keeps its teacher cache."""
    assert work.recipe.cache is not None
    return Path(work.recipe.cache.path).expanduser() if work.recipe.cache.path else run.path / "teacher_cache"


def cache_fingerprint(work: Workspace) -> dict[str, str | int | float]:
    """Everything but the samples that determines the draws; samples are found by their content."""
    recipe = work.recipe
    assert recipe.classes.draws is not None
    return {
        "teacher": work.teacher_source.fingerprint,
        "teacher_dtype": str(work.teacher_dtype),
        "tokenizer": tokenizer_fingerprint(work.tokenizer),
        "vocabulary": work.n_classes,
        "sampler": recipe.classes.sampler,
        "draws": recipe.classes.draws,
        "temperature": recipe.criterion.temperature,
        "seed": recipe.seed,
    }


def train(work: Workspace, run: RunDirectory, samples: SampleDataset, teacher: TeacherCache | None) -> None:
    """Train the student, from its last checkpoint if there is one, and save it."""
    student_path = run.path / "student"
    if teacher is not None:
        work.release_teacher()
    trainer = DistillTrainer(
        model=work.student,
        teacher=work.teacher() if teacher is None else teacher,
        args=work.arguments,
        train_dataset=samples,
        processing_class=work.tokenizer,
        callbacks=[MetricsFile(str(run.path / "metrics.jsonl")), TrainingProgress()],
    )
    for theirs in (PrinterCallback, ProgressCallback):  # both write to standard output, which is for the answer
        trainer.remove_callback(theirs)
    if (every := work.recipe.evaluation.every_steps) is not None:
        trainer.add_callback(EverySteps(every, lambda: _log_held_out(work, trainer, is_cached=teacher is not None)))
    last = last_whole_checkpoint(Path(work.arguments.output_dir))
    trainer.train(resume_from_checkpoint=None if last is None else str(last))
    if trainer.is_fsdp_enabled:  # a sharded state is no student that Transformers loads
        trainer.accelerator.state.fsdp_plugin.set_state_dict_type("FULL_STATE_DICT")
    trainer.save_model(str(student_path))
    if work.state.is_main_process:
        (student_path / "training_args.bin").unlink(missing_ok=True)  # the Trainer's pickle: a student needs none
    # Looked up now: resuming has replaced the callback by the checkpoint's.
    metrics = next(found for found in trainer.callback_handler.callbacks if isinstance(found, MetricsFile))
    add_seconds(run, "train", metrics.seconds - (run.record["seconds"]["train"] or 0.0))
    losses = [line["loss"] for line in read_metrics(metrics.path) if "loss" in line]
    run.record["train"] = {
        "steps": trainer.state.global_step,
        "epochs": trainer.state.epoch,
        "loss_first": losses[0] if losses else None,
        "loss_last": losses[-1] if losses else None,
    }
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


def evaluate(work: Workspace, run: RunDirectory, student: PreTrainedModel, when: str) -> None:
    """Fidelity of ``student`` on the held-out split into ``record.fidelity.before`` or ``.after``."""
    with timed(run, "evaluate"):
        found = _measure(work, student, f"evaluating {when} training")
        record = run.record["fidelity"] or {"before": None, "after": None}
        record[when] = {
            "perplexity": found.perplexity,
            "kl_nats": found.kl_nats,
            "top1_agreement": found.top1_agreement,
        }
        record["teacher"] = {"perplexity": found.teacher_perplexity}
        record["positions"] = found.positions
        run.record["fidelity"] = record
        run.record["teacher"] |= size(work.teacher())
        run.record["student"] |= size(student)
        count_teacher_tokens(work, run, **{f"evaluate_{when}": found.teacher_tokens})


def _measure(work: Workspace, student: PreTrainedModel, description: str) -> Fidelity:
    return fidelity(
        student, work.teacher(), work.splits.held_out, work.dtype, work.pad_token_id, work.n_classes, description
    )


def _log_held_out(work: Workspace, trainer: DistillTrainer, is_cached: bool) -> None:
    found = asdict(_measure(work, work.student, "evaluating"))
    if is_cached:  # the teacher is not to stay in memory while the student trains
        work.release_teacher()
    trainer.totals.teacher_tokens += found["teacher_tokens"]
    trainer.log({f"held_out_{name}": found[name] for name in ("perplexity", "kl_nats", "top1_agreement")})
