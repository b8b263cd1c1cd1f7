"""What the record's ``benchmarks`` hold: under ``before`` and ``after`` the tasks' figures and the suites' means.

{"after": {"tasks": {TASK: {"counts": METRIC, "metrics": {METRIC: {"value", "standard_error"}}}},
           "paper": {"acc": {"value", "standard_error"}, …}, "validation": {"value", "standard_error"}}}
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

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


def accuracy(record: Mapping[str, Any]) -> Score | None:
    """The paper suite's Acc; else the validation suite's mean; else the mean of the metric that counts in each task."""
    content = dig(record, "benchmarks", "after")
    for figure in (dig(content, "paper", "acc"), dig(content, "validation")):
        if (found := _score(figure)) is not None:
            return found
    tasks = dig(content, "tasks") or {}
    counted = [_score(dig(result, "metrics", str(dig(result, "counts")))) for result in tasks.values()]
    known = [score.value for score in counted if score is not None]
    return Score(sum(known) / len(known)) if known else None


def _score(figure: Any) -> Score | None:
    value, stderr = dig(figure, "value"), dig(figure, "standard_error")
    return None if not _is_number(value) else Score(float(value), float(stderr) if _is_number(stderr) else None)


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
