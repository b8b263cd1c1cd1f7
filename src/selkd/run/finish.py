"""The end of a run: its saved student measured, its pages written, its record closed, its student published."""

import json
from functools import partial

import torch
from transformers import PreTrainedModel

from selkd.evaluation.shown import EXAMINED
from selkd.files import write_whole
from selkd.models.loading import load_model
from selkd.models.pair import ModelPair
from selkd.models.sources import locate
from selkd.reporting.card import model_card
from selkd.reporting.page import write_page
from selkd.reporting.publish import push_student
from selkd.run.directory import RunDirectory
from selkd.run.evaluate import evaluate, is_measured
from selkd.run.held_out import write_held_out
from selkd.run.record import count_teacher_tokens, timed
from selkd.run.workspace import Workspace
from selkd.sealed import CARD, EXAMPLES, FILES, HELD_OUT, digests
from selkd.selection.positions import step_context
from selkd.tokens.examine import examine


def finish(work: Workspace, run: RunDirectory) -> None:
    """Measure the saved student; write its card, the examples and the report; close the record."""
    unmeasured = not is_measured(work, run, "after")
    if unmeasured:
        evaluate(work, run, saved_student(work, run), "after")
    if work.state.is_main_process:
        with timed(run, "evaluate"):
            if unmeasured or not (run.path / EXAMPLES).exists():
                write_examples(work, run)
            if unmeasured or not (run.path / HELD_OUT).exists():
                write_held_out(work, run, partial(saved_student, work, run))
        run.save()  # the page reads the record's file
        if unmeasured or not (run.path / CARD).exists():  # keep a card that the user may have edited
            write_card(run)
        write_page(run.path)
        run.close(digests(run.path))
    work.state.wait_for_everyone()


def publish(work: Workspace, run: RunDirectory) -> None:
    """Push the student to the hub, if the recipe asks for it and this student is not there yet."""
    options = work.recipe.hub
    fingerprint = run.record["student"]["fingerprint"]
    if options is not None and (run.record.get("hub") or {}).get("student") != fingerprint:
        if work.state.is_main_process:
            run.record["hub"] = {**push_student(run.path / "student", options), "student": fingerprint}
            run.close(run.record[FILES])
        work.state.wait_for_everyone()


def saved_student(work: Workspace, run: RunDirectory) -> PreTrainedModel:
    """The student as it was saved, not the one that was trained in memory."""
    work.models.release_student()
    return load_model(locate(str(run.path / "student"), work.cache_dir), torch.float32, work.device)


def write_examples(work: Workspace, run: RunDirectory) -> None:
    """Write what the policy picks of a few held-out samples with the saved student, for the report."""
    student = saved_student(work, run)
    samples = work.splits.held_out if len(work.splits.held_out) else work.splits.train
    positions, steps = work.recipe.positions, run.record["train"]["steps"]
    looked_at = [samples[index] for index in range(min(EXAMINED, len(samples)))]
    metric = positions.metric if positions.metric not in (None, "random") else "student_entropy"
    examined = examine(
        ModelPair(lambda: student, lambda: work.models.teacher, work.tokenizer, work.vocab_size, torch.float32),
        looked_at,
        metric,
        [(positions, step_context(positions, steps, steps))],
        work.recipe.seed,
    )
    if positions.needs_teacher:  # it ran on one padded batch
        count_teacher_tokens(run, examples=len(looked_at) * max(len(sample.token_ids) for sample in looked_at))
        run.save()  # before the file, after which nobody counts again
    write_whole(run.path / EXAMPLES, json.dumps(examined) + "\n")


def write_card(run: RunDirectory) -> None:
    write_whole(run.path / CARD, model_card(run.record))
