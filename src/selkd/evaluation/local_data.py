"""Benchmarks' rows from local JSON Lines in their original fields, in the shape in which the hub gives them."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from datasets import Dataset

from selkd.errors import InputError
from selkd.evaluation.benchmarks import Benchmark


def find_file(folders: Sequence[str | Path], name: str) -> Path | None:
    """The first of ``folders`` that holds the file ``name``."""
    paths = (Path(folder).expanduser() / name for folder in folders)
    return next((path for path in paths if path.is_file()), None)


def require_folders(folders: Sequence[str | Path]) -> None:
    """Raises InputError if one of the folders is not there."""
    for folder in folders:
        if not Path(folder).expanduser().is_dir():
            raise InputError(f"data: no folder {str(folder)!r}. Give a folder with the benchmarks' .jsonl files.")


def local_splits(benchmark: Benchmark, folders: Sequence[str | Path], shots: int) -> dict[str, Dataset]:
    """The benchmark's splits from local files: the measured one and, with ``shots``, the training rows.

    The others are empty: the harness looks at them, but takes nothing from them.

    Raises:
        InputError: no such file, a line that is no object, a field that is missing, or a file without rows.
    """
    needed = {benchmark.split, "train"} if shots and benchmark.few_shot else {benchmark.split}
    return {
        split: Dataset.from_list(_rows(benchmark, split, folders) if split in needed else [])
        for split in dict.fromkeys(("train", *benchmark.files))
    }


def _rows(benchmark: Benchmark, split: str, folders: Sequence[str | Path]) -> list[dict[str, Any]]:
    name = benchmark.files[split]
    path = find_file(folders, name)
    if path is None:
        where = ", ".join(map(str, folders))
        raise InputError(f"{benchmark.name}: no file {name} in {where}; its {split} rows are read from there.")
    try:
        lines = path.read_text(encoding="utf-8").split("\n")
    except UnicodeDecodeError as error:
        raise InputError(f"{path}: not UTF-8 text ({error}).") from None
    rows = [
        _row(line, benchmark, f"{path}, line {number}") for number, line in enumerate(lines, start=1) if line.strip()
    ]
    if not rows:
        raise InputError(f"{path}: no rows.")
    return rows


def _row(line: str, benchmark: Benchmark, where: str) -> dict[str, Any]:
    fields = ", ".join(benchmark.fields)
    try:
        row = json.loads(line)
    except ValueError as error:
        raise InputError(f"{where}: not valid JSON ({error}).") from None
    if not isinstance(row, dict):
        raise InputError(f"{where}: expected an object with {fields}, got {line[:40]!r}.")
    row = _flat_arc(row)
    if missing := [name for name in benchmark.fields if name not in row]:
        raise InputError(f"{where}: {benchmark.name} rows have {fields}; missing: {', '.join(missing)}.")
    return {name: row[name] for name in benchmark.fields}


def _flat_arc(row: dict[str, Any]) -> dict[str, Any]:
    """ARC's published shape, its choices inside the question, as the flat one; any other row as it is."""
    question = row.get("question")
    if not isinstance(question, dict) or "stem" not in question:
        return row
    choices = question.get("choices", [])
    flat = {name: [choice[name] for choice in choices] for name in ("text", "label")}
    return {**row, "question": question["stem"], "choices": flat}
