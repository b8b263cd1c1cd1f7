"""Benchmarks' rows from local JSON Lines with their original fields, in the shape that the hub's rows have."""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from selkd.data.text_files import json_lines
from selkd.errors import InputError
from selkd.evaluation.benchmarks import Benchmark

if TYPE_CHECKING:
    from datasets import Dataset


def find_file(folders: Sequence[str | Path], name: str) -> Path | None:
    """The file ``name`` in the first of ``folders`` that has one; None if none has."""
    paths = (Path(folder).expanduser() / name for folder in folders)
    return next((path for path in paths if path.is_file()), None)


def require_folders(folders: Sequence[str | Path]) -> None:
    """Raises InputError if one of the folders does not exist."""
    for folder in folders:
        if not Path(folder).expanduser().is_dir():
            raise InputError(f"data: no folder {str(folder)!r}. Give a folder with the benchmarks' .jsonl files.")


def local_splits(benchmark: Benchmark, folders: Sequence[str | Path], shots: int) -> dict[str, "Dataset"]:
    """The benchmark's splits from local files: the measured split and, with ``shots``, the training rows.

    The other splits, from which the harness takes no rows, are empty.

    Raises:
        InputError: a file is missing or has no rows, a line is not an object, or a field is missing.
    """
    from datasets import Dataset  # here, as options are checked without it

    needed = {benchmark.split, "train"} if shots and benchmark.few_shot else {benchmark.split}
    return {
        split: Dataset.from_list(_rows(benchmark, split, folders) if split in needed else [])
        for split in dict.fromkeys(("train", *benchmark.files))
    }


def _rows(benchmark: Benchmark, split: str, folders: Sequence[str | Path]) -> list[dict[str, Any]]:
    name = benchmark.files[split]
    path = find_file(folders, name)
    if path is None:
        searched = ", ".join(map(str, folders))
        raise InputError(f"{benchmark.name}: no file {name} in {searched}; its {split} rows are read from there.")
    rows = [_checked(row, benchmark, where) for where, row in json_lines(path, "data")]
    if not rows:
        raise InputError(f"{path}: no rows.")
    return rows


def _checked(row: Any, benchmark: Benchmark, where: str) -> dict[str, Any]:
    """The benchmark's fields of a row."""
    fields = ", ".join(benchmark.fields)
    if not isinstance(row, dict):
        raise InputError(f"{where}: expected an object with {fields}, got {row!r:.40}.")
    row = _flat_arc(row)
    if missing := [name for name in benchmark.fields if name not in row]:
        raise InputError(f"{where}: {benchmark.name} rows have {fields}; missing: {', '.join(missing)}.")
    return {name: row[name] for name in benchmark.fields}


def _flat_arc(row: dict[str, Any]) -> dict[str, Any]:
    """A row of ARC as published, whose choices stand inside the question, made flat; any other row unchanged."""
    question = row.get("question")
    if not isinstance(question, dict) or "stem" not in question:
        return row
    choices = question.get("choices", [])
    flat = {name: [choice[name] for choice in choices] for name in ("text", "label")}
    return {**row, "question": question["stem"], "choices": flat}
