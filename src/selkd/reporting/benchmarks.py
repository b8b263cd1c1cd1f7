"""Reads the record's ``benchmarks``: the tasks' figures and the suites' means, under ``before`` and ``after``.

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
    """The score of each task or suite and metric, in the record's order; empty if nothing was measured."""
    content = dig(record, "benchmarks", when)
    paper = dig(content, "paper") or {}
    figures: dict[tuple[str, ...], Any] = {("paper", name): figure for name, figure in paper.items()}
    figures["validation",] = dig(content, "validation")
    for task, result in (dig(content, "tasks") or {}).items():
        figures |= {(str(task), str(metric)): figure for metric, figure in (dig(result, "metrics") or {}).items()}
    return {path: score for path, figure in figures.items() if (score := _score(figure)) is not None}


def cut(record: Mapping[str, Any]) -> list[str]:
    """A sentence for each task whose prompts were too long for the student; they are the same before and after."""
    sentences = dig(record, "benchmarks", "after", "cut") or dig(record, "benchmarks", "before", "cut") or {}
    return [f"{task}: {sentence}." for task, sentence in sentences.items()]


@dataclass(frozen=True)
class Mean:
    """A mean accuracy over ``tasks``: name -> how many examples the model answered."""

    value: float
    tasks: dict[str, int | None]


def accuracies(record: Mapping[str, Any]) -> dict[str, Mean]:
    """The mean accuracies after training, each called by what it is the mean of.

    The suites' own are called ``paper suite`` and ``validation suite``. The other tasks have one mean, of the metric
    that counts in each; it is called by the tasks' names.
    """
    content = dig(record, "benchmarks", "after")
    tasks = dig(content, "tasks") or {}
    examples = {str(name): dig(result, "examples") for name, result in tasks.items()}
    counted = {str(name): _score(dig(result, "metrics", str(dig(result, "counts")))) for name, result in tasks.items()}
    rest = {name: score.value for name, score in counted.items() if score is not None}
    means = {}
    for suite, figure, parts in (
        ("paper", dig(content, "paper", "acc"), dig(content, "paper", "acc_is_the_mean_of")),
        ("validation", dig(content, "validation"), dig(content, "validation", "accuracy_is_the_mean_of")),
    ):
        if (score := _score(figure)) is not None:
            means[f"{suite} suite"] = Mean(score.value, {str(name): examples.get(str(name)) for name in parts or ()})
            rest = {name: value for name, value in rest.items() if name not in SUITES[suite]}
    if rest:
        means[", ".join(sorted(rest))] = Mean(sum(rest.values()) / len(rest), {name: examples[name] for name in rest})
    return means


def _score(figure: Any) -> Score | None:
    value, stderr = dig(figure, "value"), dig(figure, "standard_error")
    return None if not _is_number(value) else Score(float(value), float(stderr) if _is_number(stderr) else None)


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
