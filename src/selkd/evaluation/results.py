"""One task's result on one model: its figures, its examples, and the folder that keeps both for the next call."""

import hashlib
import json
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from selkd.errors import InputError
from selkd.evaluation.intervals import Estimate, ExampleMeasures, estimate
from selkd.files import write_whole

FORMAT = "selkd-eval-2"
_SUMMARY, _EXAMPLES = "result.json", "examples.jsonl"
Fingerprint = dict[str, Any]


@dataclass(frozen=True)
class Measured:
    """What was measured on a task.

    Attributes:
        examples: one mapping for each example, with ``row`` and ``measures`` (the two numbers of ``ExampleMeasures`` by
            metric); for a benchmark also ``prompt``, ``target``, ``responses`` and ``cut``.
        kinds: the kind of ``ExampleMeasures`` of each metric that can be resampled.
        figures: the figure of every metric.
        higher_is_better: whether higher is better, by metric.
        details: further plain data for the reader.
    """

    examples: list[dict[str, Any]]
    kinds: dict[str, str]
    figures: Mapping[str, float]
    higher_is_better: Mapping[str, bool]
    details: Mapping[str, Any]


@dataclass(frozen=True, eq=False)
class TaskResult(Measured):
    """A result with all that determined it.

    Attributes:
        name: the benchmark or task.
        fingerprint: all that determines the result: ``model`` and ``dtype``, and the task's part under other keys.
        seconds: the time that measuring took.
    """

    name: str
    fingerprint: Fingerprint
    seconds: float

    def measure(self, metric: str) -> ExampleMeasures:
        """The numbers of all examples for a metric of ``kinds``."""
        numbers = np.array([example["measures"][metric] for example in self.examples], dtype=np.float64)
        return ExampleMeasures(self.kinds[metric], numbers[:, 0], numbers[:, 1])

    @cached_property
    def estimates(self) -> dict[str, Estimate]:
        """Every metric's figure, with a standard error if the metric can be resampled."""
        figures = {metric: Estimate(value, None) for metric, value in self.figures.items()}
        return figures | {metric: estimate(self.measure(metric)) for metric in self.kinds}

    @property
    def question(self) -> Fingerprint:
        """The fingerprint without the model's part. Results with equal questions can be compared in pairs."""
        return {key: value for key, value in self.fingerprint.items() if key not in ("model", "dtype")}

    def summary(self) -> dict[str, Any]:
        """The figures as plain data, for JSON."""
        metrics = {
            metric: {**vars(figure), "higher_is_better": self.higher_is_better.get(metric, metric != "ece")}
            for metric, figure in self.estimates.items()
        }
        return {"examples": len(self.examples), "metrics": metrics, **self.details, "seconds": self.seconds}


def find_or_measure(
    folder: Path | None, name: str, fingerprint: Fingerprint, measure: Callable[[], Measured], reuse: bool = True
) -> TaskResult:
    """Read the result that ``folder`` keeps with exactly this fingerprint, or measure it and keep it there.

    A damaged or incomplete result is measured again. Each result has a folder of its own.

    Args:
        folder: where results are kept; None: nowhere.
        reuse: whether a kept result is read instead of measured again.

    Raises:
        InputError: the kept result has another format.
        RunError: the disk refused.
    """
    task_folder = None if folder is None else folder / f"{name.replace('/', '-')}-{digest(fingerprint)[:8]}"
    if task_folder is not None and reuse and (kept := _read(task_folder, name, fingerprint)) is not None:
        return kept
    started = time.perf_counter()
    measured = measure()
    seconds = round(time.perf_counter() - started, 3)
    result = TaskResult(**vars(measured), name=name, fingerprint=fingerprint, seconds=seconds)
    if task_folder is not None:
        _write(task_folder, result)
    return result


def _write(folder: Path, result: TaskResult) -> None:
    """Write the examples and then the summary, so that a summary never stands beside incomplete examples."""
    text = "".join(json.dumps(example, ensure_ascii=False, allow_nan=False) + "\n" for example in result.examples)
    write_whole(folder / _EXAMPLES, text)
    content = {
        "format": FORMAT,
        "name": result.name,
        "fingerprint": result.fingerprint,
        "examples_sha256": _sha256(text),
        "kinds": result.kinds,
        "figures": dict(result.figures),
        "higher_is_better": dict(result.higher_is_better),
        "details": dict(result.details),
        **result.summary(),
    }
    write_whole(folder / _SUMMARY, json.dumps(content, indent=2, allow_nan=False) + "\n")


def _read(folder: Path, name: str, fingerprint: Fingerprint) -> TaskResult | None:
    """The result that the folder keeps; None if it has none with this fingerprint, or a damaged one."""
    try:
        content = json.loads((folder / _SUMMARY).read_text(encoding="utf-8"))
        format_name = content.get("format")
    except (OSError, ValueError, AttributeError):
        return None
    if format_name != FORMAT:
        raise InputError(
            f"{folder / _SUMMARY}: expected the format {FORMAT!r}, got {format_name!r}, of another version of selkd. "
            "Move its folder away to measure again, or give another --out; nothing was changed."
        )
    try:
        text = (folder / _EXAMPLES).read_text(encoding="utf-8")
        if content["fingerprint"] != fingerprint or content["examples_sha256"] != _sha256(text):
            return None
        parts = {key: content[key] for key in ("kinds", "figures", "higher_is_better", "details", "seconds")}
        examples = [json.loads(line) for line in text.split("\n") if line]
    except (OSError, ValueError, KeyError):
        return None
    return TaskResult(examples=examples, name=name, fingerprint=fingerprint, **parts)


def digest(content: Any) -> str:
    """A digest of plain data: 32 hex digits."""
    return _sha256(json.dumps(content, sort_keys=True, ensure_ascii=False, default=str))[:32]


def _sha256(text: str) -> str:
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()
