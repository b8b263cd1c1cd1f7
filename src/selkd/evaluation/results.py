"""One task's result on one model: its figures, its examples, and the folder where both are kept for the next call."""

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from selkd.errors import InputError
from selkd.evaluation.intervals import Estimate, Measure, estimate
from selkd.files import write_whole

FORMAT = "selkd-eval-2"
_SUMMARY, _EXAMPLES = "result.json", "examples.jsonl"
Fingerprint = dict[str, Any]


@dataclass(frozen=True, eq=False)
class TaskResult:
    """What a task gave.

    Attributes:
        name: the benchmark or task.
        fingerprint: all that determines the result: ``model``, and everything else under other keys.
        examples: one mapping an example, with ``row`` and ``measures`` (metric -> two numbers); prompts, responses.
        kinds: metric -> the measure's kind, for metrics that can be resampled.
        figures: metric -> the figure, for every metric.
        higher_is_better: metric -> bool.
        details: what else is to be told, as plain data.
        seconds: how long it took to measure.
    """

    name: str
    fingerprint: Fingerprint
    examples: list[dict[str, Any]]
    kinds: Mapping[str, str]
    figures: Mapping[str, float | None]
    higher_is_better: Mapping[str, bool]
    details: Mapping[str, Any]
    seconds: float

    def measure(self, metric: str) -> Measure | None:
        """The per-example numbers of a metric; None where the harness's figure is all there is."""
        if metric not in self.kinds:
            return None
        numbers = np.array([example["measures"][metric] for example in self.examples], dtype=np.float64)
        return Measure(self.kinds[metric], numbers[:, 0], numbers[:, 1])  # type: ignore[arg-type]

    @cached_property
    def estimates(self) -> dict[str, Estimate]:
        """Every metric's figure, with its standard error where it can be resampled."""
        found = {metric: Estimate(value, None) for metric, value in self.figures.items()}
        for metric in self.kinds:
            measure = self.measure(metric)
            assert measure is not None
            found[metric] = estimate(measure)
        return found

    @property
    def question(self) -> Fingerprint:
        """The fingerprint less the model's part: two results of one question can be paired."""
        return {key: value for key, value in self.fingerprint.items() if key not in ("model", "dtype")}

    def summary(self) -> dict[str, Any]:
        """The figures as plain data, for JSON."""
        metrics = {
            metric: {
                "value": found.value,
                "standard_error": found.standard_error,
                "higher_is_better": self.higher_is_better.get(metric, metric != "ece"),
            }
            for metric, found in self.estimates.items()
        }
        return {"examples": len(self.examples), "metrics": metrics, **self.details, "seconds": self.seconds}

    def write(self, folder: Path) -> None:
        """Keep the result below ``folder``, in a folder of its own; the summary comes last.

        Raises:
            RunError: the disk refused.
        """
        own = folder_of(folder, self.name, self.fingerprint)
        text = "".join(json.dumps(example, ensure_ascii=False, allow_nan=False) + "\n" for example in self.examples)
        write_whole(own / _EXAMPLES, text)
        content = {
            "format": FORMAT,
            "name": self.name,
            "fingerprint": self.fingerprint,
            "examples_sha256": _sha256(text),
            "kinds": dict(self.kinds),
            "figures": dict(self.figures),
            "higher_is_better": dict(self.higher_is_better),
            "details": dict(self.details),
            **self.summary(),
        }
        write_whole(own / _SUMMARY, json.dumps(content, indent=2, allow_nan=False) + "\n")


def stored(folder: Path, name: str, fingerprint: Fingerprint) -> TaskResult | None:
    """The kept result of exactly this fingerprint; None if there is none, or if it is not whole.

    Raises:
        InputError: it is of another format.
    """
    own = folder_of(folder, name, fingerprint)
    content = _read(own / _SUMMARY)
    if content is None:
        return None
    if (found := content.get("format")) != FORMAT:
        raise InputError(
            f"{own / _SUMMARY}: expected the format {FORMAT!r}, got {found!r}: another version of selkd kept it. Move "
            "its folder away to measure again, or give another --out; nothing was changed."
        )
    try:
        text = (own / _EXAMPLES).read_text(encoding="utf-8")
        if content["fingerprint"] != fingerprint or content["examples_sha256"] != _sha256(text):
            return None
        examples = [json.loads(line) for line in text.split("\n") if line]
        parts = {key: content[key] for key in ("kinds", "figures", "higher_is_better", "details", "seconds")}
    except (OSError, ValueError, KeyError, TypeError):
        return None
    return TaskResult(name, fingerprint, examples, **parts)


def _read(path: Path) -> dict[str, Any] | None:
    """A summary as it was written; None if it is not there or damaged."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return content if isinstance(content, dict) else None


def folder_of(folder: Path, name: str, fingerprint: Fingerprint) -> Path:
    """Where the result of this fingerprint is kept: other rows, shots or models have other folders."""
    return folder / f"{name.replace('/', '-')}-{digest(fingerprint)[:8]}"


def digest(content: Any) -> str:
    """32 hex digits of plain data."""
    return _sha256(json.dumps(content, sort_keys=True, ensure_ascii=False, default=str))[:32]


def _sha256(text: str) -> str:
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()
