"""What the report shows of held-out text: the change at each token, what the models write, and each sample's sums."""

import json
import logging
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import PreTrainedModel

from selkd.evaluation.fidelity import Fidelity
from selkd.evaluation.intervals import ExampleMeasures, estimate
from selkd.evaluation.shown import MAPPED_TOKENS, NEW_TOKENS
from selkd.files import write_whole
from selkd.models.loading import load_model
from selkd.run.directory import RunDirectory
from selkd.run.record import count_teacher_tokens
from selkd.run.workspace import Workspace
from selkd.sealed import FIDELITY, FIDELITY_STEPS, HELD_OUT
from selkd.tokens.changes import (
    Seen,
    changed,
    mapped_texts,
    prompts_of,
    see,
    side_by_side,
    tokens_run,
    written,
)

_logger = logging.getLogger(__name__)
_NO_TEACHER = "evaluation.suite has no fidelity, so the teacher was not loaded"
_NOT_HERE = "the teacher’s model is not here"
_SUMS = {"cross_entropy_nats": 1, "kl_nats": 3, "top1_agreement": 4}  # the columns of Fidelity.sums
_FIGURES = {"perplexity": ("exp_ratio", 1), "kl_nats": ("ratio", 3), "top1_agreement": ("ratio", 4)}


def standard_errors(measured: Fidelity) -> dict[str, float | None]:
    """The standard error of each figure, by resampling the held-out samples; None for a single sample."""
    sums = measured.sums.sum(dim=1).numpy()
    return {
        name: estimate(ExampleMeasures(kind, sums[:, column], sums[:, 0])).standard_error
        for name, (kind, column) in _FIGURES.items()
    }


def write_sums(run: RunDirectory, measured: Fidelity, when: str) -> None:
    """Write the sums over each held-out sample, ``before`` or ``after`` training, beside the other's."""
    path = run.path / FIDELITY
    content: dict[str, Any] = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    sums = measured.sums.sum(dim=1)
    content["positions"] = [int(count) for count in sums[:, 0].tolist()]
    content[when] = _sums_by_sample(measured)
    write_whole(path, json.dumps(content) + "\n")


def write_step_sums(run_path: Path, measured: Fidelity, step: int) -> None:
    """Add a line with the sums over each held-out sample at an optimiser step. Lines of later steps go: the training
    went on from an earlier checkpoint."""
    path = run_path / FIDELITY_STEPS
    lines = path.read_text(encoding="utf-8").splitlines(keepends=True) if path.exists() else []
    kept = [line for line in lines if json.loads(line)["step"] < step]
    write_whole(path, "".join(kept) + json.dumps({"step": step, **_sums_by_sample(measured)}) + "\n")


def _sums_by_sample(measured: Fidelity) -> dict[str, list[float]]:
    sums = measured.sums.sum(dim=1)
    return {name: [round(value, 6) for value in sums[:, column].tolist()] for name, column in _SUMS.items()}


def write_held_out(work: Workspace, run: RunDirectory, saved_student: Callable[[], PreTrainedModel]) -> None:
    """Write what training changed on a few held-out texts, and what teacher and student write after a few prompts.

    The saved student is loaded first, then the initial one, which takes its place in memory. The teacher runs if
    fidelity is measured, which needs it in memory anyway; without it, the change is that of the cross-entropy with the
    text, and no teacher writes.
    """
    recipe = work.recipe
    samples = work.splits.held_out if len(work.splits.held_out) else work.splits.train
    with_teacher = "fidelity" in recipe.evaluation.suite
    texts = mapped_texts(samples)
    is_cut = any(len(samples[index].token_ids) > MAPPED_TOKENS for index in range(len(texts)))
    prompts = prompts_of(samples, recipe.evaluation.generations, recipe.data.max_length)
    seen: dict[str, list[Seen]] = {}
    answers: dict[str, list[list[int]] | None] = {"teacher": None, "before": None, "after": None}
    failed: list[str] = []
    work.models.release_student()
    initial_student = partial(load_model, work.student_source, torch.float32, work.device)
    for when, load in (("after", saved_student), ("before", initial_student)):
        models = work.models.with_student(load)
        seen[when] = see(models, texts, with_teacher=with_teacher)
        answers[when] = _answers(work, models.student, prompts, failed)
        models.release_student()
    if with_teacher:
        answers["teacher"] = _answers(work, work.models.teacher, prompts, failed)
        # Of the two passes over the texts, one beside each student.
        tokens = tokens_run(texts, (), None) + tokens_run(texts, prompts, answers["teacher"])
        count_teacher_tokens(run, held_out=tokens)
        run.save()  # before the file, after which nobody counts again
    if recipe.evaluation.generations and not prompts:
        failed.append("no prompt leaves room for an answer within data.max_length")
    content = {
        "nats_of": "kl" if with_teacher else "student_ce",
        "is_held_out": len(work.splits.held_out) > 0,
        "texts": changed(texts, seen["before"], seen["after"], work.tokenizer),
        "cut_at": MAPPED_TOKENS if is_cut else None,
        "new_tokens": NEW_TOKENS,
        "continuations": side_by_side(work.tokenizer, prompts, answers),
        "why_no_teacher": None if with_teacher else _NOT_HERE if recipe.teacher.is_foreign else _NO_TEACHER,
        "why_not_written": failed[0] if failed else None,
    }
    write_whole(run.path / HELD_OUT, json.dumps(content) + "\n")


def _answers(
    work: Workspace, model: PreTrainedModel, prompts: list[np.ndarray], failed: list[str]
) -> list[list[int]] | None:
    """What a model writes. If it can't, the reason goes to ``failed``: the student is trained and measured, and the
    page says what is missing."""
    try:
        return written(model, work.tokenizer, prompts, work.vocab_size, work.recipe.data.max_length)
    except (RuntimeError, ValueError, TypeError, AttributeError, NotImplementedError) as error:
        failed.append(f"{type(error).__name__}: {str(error).partition(chr(10))[0]}")
        _logger.warning("The report shows no continuations, as a model could not write them (%s).", failed[-1])
        return None
