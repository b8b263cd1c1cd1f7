"""What a run's record tells of its stages: seconds, peaks of memory, the tokens that the teacher ran on."""

import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from selkd.peaks import PLACES, peaks, restart_peaks
from selkd.run_directory import RunDirectory
from selkd.workspace import Workspace


@contextmanager
def timed(run: RunDirectory, stage: str) -> Iterator[None]:
    """Add a stage's seconds to the record; the peak of memory, too."""
    is_alone, started = begin_peaks(run), time.perf_counter()
    yield
    add_seconds(run, stage, time.perf_counter() - started, is_alone)


def add_seconds(run: RunDirectory, stage: str, seconds: float, is_alone: bool) -> None:
    """Add to a stage's time in the record, and keep total and peak memory up to date.

    ``is_alone``: the peaks were begun anew for this stage, so they are its own.
    """
    times = run.record.setdefault("seconds", dict.fromkeys(("prepare", "score", "cache", "train", "evaluate", "total")))
    times[stage] = round((times[stage] or 0.0) + seconds, 3)
    times["total"] = round(sum(value or 0.0 for name, value in times.items() if name != "total"), 3)
    by_stage = note_peaks(run).setdefault("by_stage", {}).setdefault(stage, dict.fromkeys(PLACES))
    for place, value in peaks().items():
        if value is not None and is_alone:
            by_stage[place] = max(by_stage[place] or 0, value)


def begin_peaks(run: RunDirectory) -> bool:
    """Begin anew to look for a stage's peak of memory; False where the system can't tell it from the whole run's."""
    note_peaks(run)
    return restart_peaks()


def note_peaks(run: RunDirectory) -> dict[str, Any]:
    """The record's peaks of the whole run, with what the present one adds."""
    whole: dict[str, Any] = run.record.setdefault("peak_memory_bytes", dict.fromkeys(PLACES))
    for place, value in peaks().items():
        if value is not None:
            whole[place] = max(whole[place] or 0, value)
    return whole


COUNTS = ("samples", "samples_kept", "positions_valid", "positions_selected", "teacher_tokens")


def count_teacher_tokens(work: Workspace, run: RunDirectory, **tokens: int) -> None:
    """Write down what the teacher ran on, by stage; a stage that ran again replaces its count."""
    by_stage = run.record.setdefault("teacher_tokens", {})
    by_stage.update(work.teacher_tokens | tokens)
    run.record["counts"]["teacher_tokens"] = sum(by_stage.values())
