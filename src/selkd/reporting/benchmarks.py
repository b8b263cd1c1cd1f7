"""What the record's ``benchmarks`` hold: under ``before`` and ``after`` the tasks' figures and the suites' means.

{"after": {"tasks": {TASK: {"counts": METRIC, "metrics": {METRIC: {"value", "standard_error"}}}},
           "paper": {"acc": {"value", "standard_error"}, …}, "validation": {"value", "standard_error"},
           "cut": {TASK: how many prompts were too long for the model, in words}}}
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from selkd.recipe.evaluation import SUITES
from selkd.reporting.formats import dig


@dataclass(frozen=True)
class Score:
    """One measured number and its standard error, if that is known."""

    value: float
    stderr: float | None = None


def scores(record: Mapping[str, Any], when: str = "after") -> dict[tuple[str, ...], Score]:
    """(task or suite, metric) -> score, in the record's order; empty if nothing was measured."""
    content = dig(record, "benchmarks", when)
    found: dict[tuple[str, ...], Score | None] = {}
    for suite in ("paper", "validation"):
        figures = dig(content, suite)
        for name, figure in (figures or {}).items() if suite == "paper" else [("", figures)]:
            found[(suite, name) if name else (suite,)] = _score(figure)
    for task, result in (dig(content, "tasks") or {}).items():
        for metric, figure in (dig(result, "metrics") or {}).items():
            found[str(task), str(metric)] = _score(figure)
    return {path: score for path, score in found.items() if score is not None}


def cut(record: Mapping[str, Any]) -> list[str]:
    """A sentence for each task whose prompts were too long for the student; they are the same before and after."""
    told = dig(record, "benchmarks", "after", "cut") or dig(record, "benchmarks", "before", "cut") or {}
    return [f"{task}: {sentence}." for task, sentence in told.items()]


@dataclass(frozen=True)
class Mean:
    """A mean accuracy over ``tasks``: name -> how many examples were asked."""

    value: float
    tasks: dict[str, int | None]


def accuracies(record: Mapping[str, Any]) -> dict[str, Mean]:
    """The mean accuracies after training, by what each is the mean of.

    The suites' own, as ``paper suite`` and ``validation suite``; and, called by its tasks, the mean of what counts in
    the tasks that are part of neither.
    """
    content = dig(record, "benchmarks", "after")
    tasks = dig(content, "tasks") or {}
    found = {}
    suites = {
        "paper": (dig(content, "paper", "acc"), dig(content, "paper", "acc_is_the_mean_of")),
        "validation": (dig(content, "validation"), dig(content, "validation", "accuracy_is_the_mean_of")),
    }
    counted = {name: _score(dig(result, "metrics", str(dig(result, "counts")))) for name, result in tasks.items()}
    rest = {str(name): score.value for name, score in counted.items() if score is not None}
    for suite, (figure, parts) in suites.items():
        if (mean := _score(figure)) is not None:
            found[f"{suite} suite"] = Mean(mean.value, {str(n): dig(tasks, n, "examples") for n in parts or ()})
            rest = {name: value for name, value in rest.items() if name not in SUITES[suite]}
    if rest:
        asked = {name: dig(tasks, name, "examples") for name in rest}
        found[", ".join(sorted(rest))] = Mean(sum(rest.values()) / len(rest), asked)
    return found


def _score(figure: Any) -> Score | None:
    value, stderr = dig(figure, "value"), dig(figure, "standard_error")
    return None if not _is_number(value) else Score(float(value), float(stderr) if _is_number(stderr) else None)


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
