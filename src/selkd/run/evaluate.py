"""The stage that measures a student before or after training: fidelity to its teacher, and benchmarks."""

import json
from typing import Any

from transformers import PreTrainedModel

from selkd.evaluation.fidelity import Fidelity, fidelity
from selkd.evaluation.overlap import overlaps
from selkd.files import write_whole
from selkd.recipe.choices import FractionSchedule, PositionOptions, SampleOptions
from selkd.run import benchmarks
from selkd.run.directory import RunDirectory
from selkd.run.enough import warn_if_short
from selkd.run.held_out import standard_errors, write_sums
from selkd.run.record import count_teacher_tokens, size, timed
from selkd.run.workspace import Workspace
from selkd.sealed import OVERLAP

FIGURES = ("perplexity", "kl_nats", "top1_agreement")  # of fidelity, for the record and the metrics' file


def is_measured(work: Workspace, run: RunDirectory, when: str) -> bool:
    """Whether all of ``evaluation.suite`` was measured ``before`` or ``after`` training."""
    options = work.recipe.evaluation
    wanted = {"fidelity": "fidelity" in options.suite, "benchmarks": options.has_benchmarks}
    return all((run.record[part] or {}).get(when) for part, is_wanted in wanted.items() if is_wanted)


def forget_after(run: RunDirectory) -> None:
    """Remove what was measured after training, as the student has been trained again."""
    for part in ("fidelity", "benchmarks"):
        if run.record[part]:
            run.record[part]["after"] = None


def evaluate(work: Workspace, run: RunDirectory, student: PreTrainedModel, when: str) -> None:
    """Measure ``student`` ``before`` or ``after`` training, and record fidelity and benchmarks."""
    options = work.recipe.evaluation
    warn_if_short(work, "evaluate")
    with timed(run, "evaluate"):
        run.record["student"] |= size(student)
        if "fidelity" in options.suite:
            _record_fidelity(work, run, student, when)
        if options.has_benchmarks:
            fingerprint = run.record["student"]["initial_fingerprint" if when == "before" else "fingerprint"]
            measured = benchmarks.measure(work, student, when, fingerprint)
            benchmarks_record(run)[when] = measured
    run.save()


def _record_fidelity(work: Workspace, run: RunDirectory, student: PreTrainedModel, when: str) -> None:
    measured = measure_fidelity(work, student, f"evaluating {when} training")
    record = run.record["fidelity"] or {"before": None, "after": None}
    record[when] = {name: getattr(measured, name) for name in (*FIGURES, "calibration_error")}
    record["teacher"] = {"perplexity": measured.teacher_perplexity}
    record["positions"] = measured.positions
    record.setdefault("by_entropy", {})[when] = measured.by_entropy()
    record.setdefault("standard_errors", {})[when] = standard_errors(measured)
    run.record["fidelity"] = record
    run.record["teacher"] |= size(work.models.teacher)
    count_teacher_tokens(run, **{f"evaluate_{when}": measured.teacher_tokens})
    if work.state.is_main_process:
        write_sums(run, measured, when)
    if when == "before":
        write_overlaps(work, run, measured)


def write_overlaps(work: Workspace, run: RunDirectory, measured: Fidelity) -> None:
    """Write how far the metrics of the initial student, ``measured`` on the held-out split, agree."""
    if work.state.is_main_process:
        write_whole(run.path / OVERLAP, json.dumps(_overlaps(work, measured)) + "\n")


def _overlaps(work: Workspace, measured: Fidelity) -> dict[str, Any]:
    """The overlaps of the metrics at the recipe's fractions."""
    recipe = work.recipe
    fraction = recipe.positions.fraction
    if isinstance(fraction, FractionSchedule):
        fraction = fraction.to
    if fraction is None:
        fraction = PositionOptions.model_fields["fraction"].default
    samples = recipe.samples or SampleOptions()
    return overlaps(measured.statistics, measured.sample_of, fraction, samples.fraction)


def benchmarks_record(run: RunDirectory) -> dict[str, Any]:
    """``record.benchmarks``, which is made when there is something to write."""
    if run.record["benchmarks"] is None:
        run.record["benchmarks"] = {"before": None, "after": None, "steps": [], "best": None}
    record: dict[str, Any] = run.record["benchmarks"]
    return record


def measure_fidelity(work: Workspace, student: PreTrainedModel, description: str) -> Fidelity:
    return fidelity(work.models.with_student(lambda: student), work.splits.held_out, description)
