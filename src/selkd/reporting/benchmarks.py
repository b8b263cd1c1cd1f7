"""What the record's ``benchmarks`` hold, read without knowing the tasks: any tree of names whose leaves are numbers.

``benchmarks`` is such a tree, or one each under ``before`` and ``after``. ``X_stderr`` (or ``stderr`` beside ``value``)
is the standard error of ``X``.
"""

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from selkd.reporting.formats import dig

ACCURACY_NAMES = ("mean_accuracy", "accuracy", "acc")


@dataclass(frozen=True)
class Score:
    """One measured number and its standard error, if that is known."""

    value: float
    stderr: float | None = None


def scores(record: Mapping[str, Any], when: str = "after") -> dict[tuple[str, ...], Score]:
    """Path of names -> score, in the record's order. A record without before and after is of the trained student."""
    tree = dig(record, "benchmarks")
    if isinstance(tree, Mapping) and {"before", "after"} & tree.keys():
        tree = tree.get(when)
    elif when != "after":
        return {}
    found = dict(_leaves(tree))
    return {
        _named(path): Score(value, found.get(_stderr_of(path)))
        for path, value in found.items()
        if not path[-1].endswith("stderr")
    }


def accuracy(record: Mapping[str, Any]) -> Score | None:
    """The suite's own mean accuracy; else the mean of what calls itself an accuracy, task by task."""
    found = scores(record)
    for name in ACCURACY_NAMES:
        if (name,) in found:
            return found[name,]
    tasks: dict[tuple[str, ...], float] = {}
    for path, score in found.items():
        if path[-1].split(",")[0] in ("acc_norm", *ACCURACY_NAMES):
            tasks[path[:-1]] = score.value  # the length-normalised one comes later in lm-eval's order, and wins
    return Score(sum(tasks.values()) / len(tasks)) if tasks else None


def _named(path: tuple[str, ...]) -> tuple[str, ...]:
    return path[:-1] if path[-1] == "value" else path


def _stderr_of(path: tuple[str, ...]) -> tuple[str, ...]:
    return (*path[:-1], "stderr" if path[-1] == "value" else f"{path[-1]}_stderr")


def _leaves(tree: Any, path: tuple[str, ...] = ()) -> Iterator[tuple[tuple[str, ...], float]]:
    if isinstance(tree, Mapping):
        for name, branch in tree.items():
            yield from _leaves(branch, (*path, str(name)))
    elif path and isinstance(tree, int | float) and not isinstance(tree, bool) and math.isfinite(tree):
        yield path, float(tree)
