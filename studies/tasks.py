"""Benchmarks on the students of one seed of a table: a check that no arm lost what the held-out KL does not see.

    python studies/run.py headline --data TEXTS --out RUNS --seeds 4 --keep
    python studies/tasks.py headline --seed 4 --out RUNS --data BENCHMARKS --limit 400

``run.py --keep`` leaves each student's weights in its run's folder; here the students that have them are measured,
beside the one that all began with and the teacher, and docs/results/study_tasks.json gets the table's figures.
"""

import argparse
import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from tables import TABLES, StudyTables

from selkd.errors import InputError
from selkd.evaluation.benchmarks import KNOWN
from selkd.evaluation.command import evaluate_models
from selkd.evaluation.options import BenchmarkOptions, FidelityOptions

TASKS = ("lambada", "hellaswag", "piqa", "arc_easy")
RESULTS = Path(__file__).parents[1] / "docs" / "results" / "study_tasks.json"
BEFORE = "before training"


def main(arguments: Sequence[str] | None = None) -> int:
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("table")
    options.add_argument("--seed", type=int, required=True, help="the seed whose students are measured")
    options.add_argument("--out", type=Path, required=True, help="the folder of the runs")
    options.add_argument("--data", required=True, help="the folder of the benchmarks' rows (docs/evaluation.md)")
    options.add_argument("--limit", type=int, help="at most so many rows of a benchmark, spread evenly")
    options.add_argument("--dtype", default="auto", help="the weights' precision, as of selkd eval")
    options.add_argument("--tables", type=Path, default=TABLES, help="the file of the tables (studies/tables.yaml)")
    options.add_argument("--results", type=Path, default=RESULTS, help="the file that gets the figures")
    given = options.parse_args(arguments)
    try:
        measured = _measure(given)
    except InputError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    file: Path = given.results
    of_tables = json.loads(file.read_text(encoding="utf-8")) if file.exists() else {}
    file.write_text(json.dumps(of_tables | {given.table: measured}, indent=1) + "\n", encoding="utf-8")
    return 0


def _measure(given: argparse.Namespace) -> dict[str, Any]:
    """``seed``, ``limit``, ``dtype`` and ``rows``: model -> task -> figure and difference to the first arm's."""
    tables = StudyTables.read(given.tables, Path(), given.out)
    models = _students(tables, given.table, given.seed)
    answer = evaluate_models(
        [f"{name}={model}" for name, model in models.items()],
        BenchmarkOptions(TASKS, data=[given.data], limit=given.limit),
        FidelityOptions(),
        dtype=given.dtype,
        out=given.out / "evals",
    )
    apart = {one["against"]: one["tasks"] for one in answer["comparisons"]}
    rows = {
        model["name"]: {task: _row(task, model["tasks"], apart.get(model["name"])) for task in TASKS}
        for model in answer["models"]
    }
    return {"seed": given.seed, "limit": given.limit, "dtype": given.dtype, "rows": rows}


def _students(tables: StudyTables, table: str, seed: int) -> dict[str, str]:
    """Name -> model: the arms whose weights are there, the first arm first, the start, and the teacher."""
    content = tables.content["tables"].get(table)
    if content is None:
        raise InputError(f"{table}: no such table. Allowed: {', '.join(tables.content['tables'])}.")
    runs = {
        arm: tables.out / "runs" / table / arm / f"seed-{tables.arms[arm].get('seeds_from', 0) + seed}"
        for arm in content["arms"]
    }
    kept = {arm: str(run) for arm, run in runs.items() if list((run / "student").glob("*.safetensors"))}
    first = content["arms"][0]
    if first not in kept:
        raise InputError(
            f"{table}: no weights of {first} with seed {seed}. If the record has its line, take the line out; then run "
            "it with --keep."
        )
    start = tables.out / content["start"] / "student"
    before = {BEFORE: str(start)} if start.exists() else {}
    return kept | before | {"teacher": tables.content["base"]["teacher"]["model"]}


def _row(task: str, figures: Mapping[str, Any], apart: Mapping[str, Any] | None) -> dict[str, float]:
    metric = KNOWN[task].metric
    found = figures[task]["metrics"][metric]
    row = {"value": found["value"], "standard_error": found["standard_error"]}
    if apart is not None:  # the first arm less this one
        against = apart[task][metric]
        row |= {"difference": 0.0 - against["value"], "difference_error": against["standard_error"]}
    return {name: round(value, 5) for name, value in row.items()}


if __name__ == "__main__":
    sys.exit(main())
