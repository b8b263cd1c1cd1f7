"""What a run directory holds, read and checked: the only place of the reporting that knows its file names."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from selkd.errors import InputError
from selkd.reporting.formats import dig


@dataclass(frozen=True)
class SampleScores:
    """scores float64 [N] (the finite ones) and kept bool [N], one a sample."""

    scores: np.ndarray
    kept: np.ndarray


@dataclass(frozen=True)
class Overlap:
    """metrics: M names; overlap float [M, M] in [0, 1], the share of one metric's choice in another's; NaN: unknown."""

    metrics: list[str]
    overlap: np.ndarray


@dataclass(frozen=True)
class RunFiles:
    """A run directory's contents. metrics is in step order; None and [] stand for stages that were not run."""

    record: dict[str, Any]
    recipe_yaml: str
    metrics: list[dict[str, Any]]
    sample_scores: SampleScores | None
    examples: dict[str, Any] | None
    position_overlap: Overlap | None
    sample_overlap: Overlap | None


def read_run(run_dir: Path) -> RunFiles:
    """Read a run directory.

    Raises InputError where the folder is not a run, or a file in it can't be read as what it should be.
    """
    record_path, recipe_path = run_dir / "record.json", run_dir / "recipe.yaml"
    for path in (record_path, recipe_path):
        if not path.is_file():
            raise InputError(
                f"{run_dir} is not a run directory: expected {path.name} in it, found none. "
                "Give the folder that `selkd distill` wrote."
            )
    record = _json_object(record_path)
    examples_path, scores_path = run_dir / "selection" / "examples.json", run_dir / "selection" / "samples.parquet"
    overlap_path = run_dir / "selection" / "overlap.json"
    overlaps = _json_object(overlap_path) if overlap_path.is_file() else {}
    return RunFiles(
        record=record,
        recipe_yaml=_text(recipe_path),
        metrics=_metrics(run_dir / "metrics.jsonl"),
        sample_scores=_sample_scores(scores_path) if scores_path.is_file() else None,
        examples=_examples(examples_path) if examples_path.is_file() else None,
        position_overlap=_overlap(overlap_path, overlaps, "positions"),
        sample_overlap=_overlap(overlap_path, overlaps, "samples"),
    )


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise InputError(f"{path}: expected UTF-8 text, found other bytes ({error}). Run the stage again.") from error


def _json_object(path: Path) -> dict[str, Any]:
    try:
        value = json.loads(_text(path))
    except json.JSONDecodeError as error:
        raise InputError(f"{path}: expected JSON, could not read it ({error}). Run the stage again.") from error
    if not isinstance(value, dict):
        raise InputError(f"{path}: expected a JSON object, found {type(value).__name__}. Run the stage again.")
    return value


def _metrics(path: Path) -> list[dict[str, Any]]:
    if not path.is_file():
        return []
    # A step may have several lines (loss, held-out fidelity), and a resumed run logs the steps after its checkpoint
    # again: the later value of a key is the one that counts.
    by_step: dict[int, dict[str, Any]] = {}
    for number, line in enumerate(_text(path).splitlines(keepends=True), start=1):
        if not line.strip() or not line.endswith("\n"):  # a last line without its end was cut off while written
            continue
        try:
            entry = json.loads(line)
        except json.JSONDecodeError as error:
            raise InputError(f"{path}, line {number}: expected JSON ({error}). Remove that line.") from error
        if not isinstance(entry, dict) or not isinstance(entry.get("step"), int):
            raise InputError(f'{path}, line {number}: expected an object with a whole "step". Remove that line.')
        by_step[entry["step"]] = by_step.get(entry["step"], {}) | entry
    return [by_step[step] for step in sorted(by_step)]


def _sample_scores(path: Path) -> SampleScores:
    try:
        table = pq.read_table(path, columns=["score", "kept"])
    except (pa.ArrowInvalid, KeyError) as error:
        raise InputError(f"{path}: expected a Parquet table of samples ({error}). Run the scoring again.") from error
    missing = {"score", "kept"} - set(table.column_names)
    if missing:
        raise InputError(f"{path}: expected the columns score and kept, missing {', '.join(sorted(missing))}.")
    scores = np.asarray(table["score"].to_numpy(), dtype=np.float64)
    finite = np.isfinite(scores)
    return SampleScores(scores=scores[finite], kept=np.asarray(table["kept"].to_numpy(), dtype=bool)[finite])


def _examples(path: Path) -> dict[str, Any]:
    examples = _json_object(path)
    if not isinstance(examples.get("samples"), list):
        raise InputError(f'{path}: expected a list "samples". Run the stage again.')
    for number, sample in enumerate(examples["samples"]):
        lengths = {}
        for key in ("tokens", "scores", "selected", "valid"):
            column = dig(sample, key)
            if not isinstance(column, list):
                raise InputError(f'{path}, sample {number}: expected a list "{key}". Run the stage again.')
            lengths[key] = len(column)
        if len(set(lengths.values())) != 1:
            told = ", ".join(f"{key} {length}" for key, length in lengths.items())
            raise InputError(f"{path}, sample {number}: expected lists of one length, found {told}.")
    return examples


def _overlap(path: Path, overlaps: dict[str, Any], part: str) -> Overlap | None:
    if overlaps.get(part) is None:
        return None
    names, rows = dig(overlaps, part, "metrics"), dig(overlaps, part, "overlap")
    try:
        overlap = np.array(rows, dtype=np.float64)  # null becomes NaN
    except (TypeError, ValueError):
        overlap = np.zeros(0)
    if not isinstance(names, list) or not names or overlap.shape != (len(names), len(names)):
        raise InputError(
            f'{path}, {part}: expected "metrics", a list of names, and "overlap", a square of numbers of that size. '
            "Run the stage again."
        )
    return Overlap([str(name) for name in names], overlap)
