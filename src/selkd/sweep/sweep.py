"""``sweep`` runs a study into one folder, continues it where it was interrupted, and writes one table of all runs."""

import json
import os
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from selkd.errors import InputError
from selkd.files import LOCK, RECIPE, is_temporary, write_whole
from selkd.recipe.files import stored_recipe
from selkd.recipe.recipe import Recipe
from selkd.reporting.comparison import RunComparison, compare
from selkd.reporting.comparison_page import write_comparison
from selkd.reporting.formats import duration
from selkd.reporting.run_files import read_record
from selkd.run.directory import write_moved_recipe
from selkd.sweep.runner import run_apart
from selkd.sweep.sharing import with_shared_paths
from selkd.sweep.study import Study, expand

STATUS, SHARED = "study.json", "shared"
Tell = Callable[[str], None]


@dataclass(frozen=True)
class SweepResult:
    """The outcome of a study.

    Attributes:
        table: the content of ``comparison/table.json``; None if no run was finished.
        comparison: what it was made from; None, too, then.
        failed: run -> why it failed.
    """

    out: Path
    table: dict[str, Any] | None
    failed: dict[str, str]
    comparison: RunComparison | None = None


def sweep(
    name: str, study: Study, folder: Path, out: Path, overrides: dict[str, Any] | None = None, tell: Tell | None = None
) -> SweepResult:
    """Run a study into ``out``: ``runs/<recipe>/seed-<seed>/``, ``shared/``, ``logs/`` and ``comparison/``.

    The same study into the same folder continues: finished runs are kept, interrupted and failed ones run on. The study
    may have got more variants, values or seeds, and the folder may have been moved.

    Args:
        folder: where the study's own paths start.
        tell: called with each line of progress; None prints them to standard error.

    Raises:
        Interrupted: the study was asked to end; its current run has saved what it had.
        InputError: the study is not valid, ``out`` is no study's folder, or it holds other recipes of these names.
    """
    tell = tell or (lambda line: print(line, file=sys.stderr, flush=True))
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise InputError("sweep: its runs are processes of its own, one after another. Start it without torchrun.")
    planned = expand(study, folder, overrides)
    from selkd.run.lock import working_in  # here, as a study is refused without torch

    _claim(out)  # before the lock makes a file in it
    with working_in(out):
        status = _claim(out)
        recipes = {run.id: with_shared_paths(run.recipe, (out / SHARED).absolute()) for run in planned}
        paths = {run_id: out / "runs" / run_id for run_id in recipes}
        moved = [run_id for run_id, recipe in recipes.items() if _has_moved(paths[run_id], recipe)]
        _save(out, name, status)  # marks the folder as a study's
        for run_id in moved:
            write_moved_recipe(paths[run_id], recipes[run_id])
        _run_each(name, out, recipes, status, tell)
        failed = {run_id: str(status[run_id]["error"]) for run_id in paths if status[run_id]["status"] == "failed"}
        finished = [run for run in planned if run.id not in failed]
        if not finished:
            return SweepResult(out, None, failed)
        names = [run.name for run in finished]
        # A recipe without a finished run can't be the baseline.
        baseline = study.baseline if study.baseline in names else names[0]
        comparison = compare([paths[run.id] for run in finished], baseline, failed)
        return SweepResult(out, write_comparison(comparison, out / "comparison", name), failed, comparison)


def _run_each(name: str, out: Path, recipes: dict[str, Recipe], status: dict[str, dict[str, Any]], tell: Tell) -> None:
    """Run what is not done yet, one after another, and keep in ``status`` how each ended."""
    for number, (run_id, recipe) in enumerate(recipes.items(), start=1):
        path, log = out / "runs" / run_id, out / "logs" / f"{run_id}.log"
        prefix = f"[{number}/{len(recipes)}] {run_id}"
        if status.get(run_id, {}).get("status") == "done" and _is_finished(path):
            tell(f"{prefix}: done before")
            continue
        tell(f"{prefix}: running (log: {log})")
        started = time.perf_counter()
        why = run_apart(recipe, path, log)
        seconds = round(time.perf_counter() - started, 1)
        status[run_id] = {"status": "failed" if why else "done", "error": why, "seconds": seconds}
        _save(out, name, status)
        left = _seconds_left(list(recipes)[number:], status)
        tell(
            f"{prefix}: {'failed: ' + why if why else 'done'} ({duration(seconds)}"
            + (")" if left is None else f"; about {duration(left)} left)")
        )


def _seconds_left(to_come: list[str], status: dict[str, dict[str, Any]]) -> float | None:
    """The time for the runs to come, each as long as a done one on average; None for none, or where none is done."""
    done = [entry["seconds"] for entry in status.values() if entry["status"] == "done" and "seconds" in entry]
    again = [run_id for run_id in to_come if status.get(run_id, {}).get("status") != "done"]
    return len(again) * sum(done) / len(done) if done and again else None


def _save(out: Path, name: str, status: dict[str, dict[str, Any]]) -> None:
    write_whole(out / STATUS, json.dumps({"study": name, "runs": status}, indent=1) + "\n")


def _claim(out: Path) -> dict[str, dict[str, Any]]:
    """Read the status of the folder's runs; refuse a folder that is neither new nor empty nor a study's."""
    if not out.exists():
        return {}
    is_studys = (out / STATUS).is_file()
    if not out.is_dir() or not (is_studys or all(e.name == LOCK or is_temporary(e.name) for e in out.iterdir())):
        raise InputError(f"{out}: not a study's folder and not empty. Give another --out; nothing was changed.")
    if not is_studys:
        return {}
    try:
        content: dict[str, dict[str, Any]] = json.loads((out / STATUS).read_text(encoding="utf-8"))["runs"]
    except (ValueError, KeyError, TypeError) as error:
        raise InputError(f"{out / STATUS}: damaged ({error}). Move it away to run again; runs continue.") from None
    return content


def _has_moved(path: Path, recipe: Recipe) -> bool:
    """Whether the study's folder was elsewhere when the run began, so that its shared files have other paths.

    Raises:
        InputError: the run is of another recipe, which ``distill`` would refuse only when its turn comes.
    """
    try:
        stored = stored_recipe(path / RECIPE) if (path / RECIPE).is_file() else None
    except InputError:
        stored = None  # the run itself will say that it is damaged
    if stored is not None and _without_shared_folder(stored) != _without_shared_folder(recipe):
        raise InputError(
            f"{path}: the run of another recipe of that name. Rename the variant or give another --out; nothing was "
            "changed."
        )
    return stored is not None and stored.identity() != recipe.identity()


def _without_shared_folder(recipe: Recipe) -> dict[str, Any]:
    """The recipe with only the names of shared scores and caches, which hold all that they depend on."""
    content = recipe.identity()
    for part in ("samples", "cache"):
        place = (content[part] or {}).get("path")
        if place is not None and Path(place).parent.parent.name == SHARED:
            content[part]["path"] = str(Path(*Path(place).parts[-3:]))
    return content


def _is_finished(path: Path) -> bool:
    """Whether the run has all that the table needs; a damaged run runs again, and fails if that does not mend it."""
    try:
        read_record(path)
    except InputError:
        return False
    return (path / "student" / "config.json").is_file()
