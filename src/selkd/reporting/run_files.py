"""Reads and checks the files of a run directory; no other module of the reporting knows their names."""

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import numpy as np

from selkd.errors import InputError
from selkd.files import RECIPE, RECORD
from selkd.reporting.changes import require_shape
from selkd.reporting.formats import dig
from selkd.sealed import EXAMPLES, FILES, HELD_OUT, METRICS, OVERLAP, SCORES, differences, unsealed
from selkd.selection.samples import SampleScores

_Content = TypeVar("_Content")


@dataclass(frozen=True)
class ScoredSamples:
    """The finite scores of N samples, float64 [N], and whether each was kept, bool [N]."""

    scores: np.ndarray
    kept: np.ndarray


@dataclass(frozen=True)
class Overlap:
    """M metrics, and the share of each one's choice in another's: float [M, M] in [0, 1], NaN where unknown."""

    metrics: list[str]
    overlap: np.ndarray


@dataclass(frozen=True)
class RunFiles:
    """The contents of a run directory. metrics is in step order; None and [] stand for stages that did not run."""

    record: dict[str, Any]
    recipe_yaml: str
    metrics: list[dict[str, Any]]
    scored_samples: ScoredSamples | None
    examples: dict[str, Any] | None
    overlaps: dict[str, Overlap]  # of ``positions`` and of ``samples``
    held_out: dict[str, Any] | None = None  # the texts and continuations of held_out.json


def require_run(run_dir: Path) -> None:
    """Raise InputError where the folder is not a run; no file in it is read."""
    for name in (RECORD, RECIPE):
        if not (run_dir / name).is_file():
            raise InputError(
                f"{run_dir} is not a run directory: expected {name} in it, found none. "
                "Give the folder that `selkd distill` wrote."
            )


def read_record(run_dir: Path) -> dict[str, Any]:
    """Read the record alone. Raise InputError where the folder is not a run or its record is damaged."""
    require_run(run_dir)
    return unsealed(run_dir / RECORD)


def read_run(run_dir: Path) -> RunFiles:
    """Read a run directory. Raise InputError where the folder is not a run or a file in it is damaged."""
    record = read_record(run_dir)
    files = record.get(FILES, {})  # of a finished run
    read = [name for name in _READ if name in files and (run_dir / name).exists()]
    if changed := differences(run_dir, files, read):
        raise InputError(
            f"{run_dir}: {' and '.join(changed)} changed since the run was finished. `selkd distill` with the run's "
            "recipe makes it again, or says how it comes back."
        )
    return RunFiles(
        record=record,
        recipe_yaml=_text(run_dir / RECIPE),
        metrics=_if_present(run_dir / METRICS, _metrics) or [],
        scored_samples=_if_present(run_dir / SCORES, _scored_samples),
        examples=_if_present(run_dir / EXAMPLES, _examples),
        overlaps=_if_present(run_dir / OVERLAP, _overlaps) or {},
        held_out=_if_present(run_dir / HELD_OUT, _held_out),
    )


_READ = (RECIPE, METRICS, SCORES, EXAMPLES, OVERLAP, HELD_OUT)
_AGAIN = "Move it away, and `selkd distill` with the run's recipe makes it again."


def _if_present(path: Path, read: Callable[[Path], _Content]) -> _Content | None:
    return read(path) if path.is_file() else None


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise InputError(f"{path}: expected UTF-8 text, found other bytes ({error}). {_AGAIN}") from error


def _json_object(text: str, where: str, remedy: str = _AGAIN) -> dict[str, Any]:
    try:
        value = json.loads(text)
    except (ValueError, RecursionError) as error:  # no JSON, a number too long, or nested too deep
        raise InputError(f"{where}: expected JSON, could not read it ({error}). {remedy}") from error
    if not isinstance(value, dict):
        raise InputError(f"{where}: expected a JSON object, found {type(value).__name__}. {remedy}")
    return value


def _metrics(path: Path) -> list[dict[str, Any]]:
    # A step may have several lines (loss, held-out fidelity), and a resumed run logs the steps after its checkpoint
    # again: the later value of a key is the one that counts.
    by_step: dict[int, dict[str, Any]] = {}
    # The last piece is empty, or a line that was cut off in writing.
    for number, line in enumerate(_text(path).split("\n")[:-1], start=1):
        if not line.strip():
            continue
        entry = _json_object(line, f"{path}, line {number}", "Remove that line.")
        if not isinstance(entry.get("step"), int):
            raise InputError(f'{path}, line {number}: expected an object with a whole "step". Remove that line.')
        by_step[entry["step"]] = by_step.get(entry["step"], {}) | entry
    return [by_step[step] for step in sorted(by_step)]


def _scored_samples(path: Path) -> ScoredSamples:
    stored = SampleScores.read(path)
    finite = np.isfinite(stored.scores)
    return ScoredSamples(scores=stored.scores[finite], kept=stored.kept[finite])


def _examples(path: Path) -> dict[str, Any]:
    examples = _json_object(_text(path), str(path))
    if not isinstance(examples.get("samples"), list):
        raise InputError(f'{path}: expected a list "samples". {_AGAIN}')
    for number, sample in enumerate(examples["samples"]):
        lengths = {}
        for key in ("tokens", "scores", "selected", "valid"):
            column = dig(sample, key)
            if not isinstance(column, list):
                raise InputError(f'{path}, sample {number}: expected a list "{key}". {_AGAIN}')
            lengths[key] = len(column)
        if len(set(lengths.values())) != 1:
            listed = ", ".join(f"{key} {length}" for key, length in lengths.items())
            raise InputError(f"{path}, sample {number}: expected lists of one length, found {listed}.")
    return examples


def _held_out(path: Path) -> dict[str, Any]:
    content = _json_object(_text(path), str(path))
    try:
        require_shape(content)
    except ValueError as error:
        raise InputError(f"{path}: {error}. {_AGAIN}") from None
    return content


def _overlaps(path: Path) -> dict[str, Overlap]:
    overlaps = {}
    for part, content in _json_object(_text(path), str(path)).items():
        if content is None:
            continue
        names = dig(content, "metrics")
        try:
            overlap = np.array(dig(content, "overlap"), dtype=np.float64)  # null becomes NaN
        except (TypeError, ValueError):
            overlap = np.zeros(0)
        if not isinstance(names, list) or not names or overlap.shape != (len(names), len(names)):
            raise InputError(
                f'{path}, {part}: expected "metrics", a list of names, and "overlap", a square of numbers of that '
                f"size. {_AGAIN}"
            )
        overlaps[part] = Overlap([str(name) for name in names], overlap)
    return overlaps
