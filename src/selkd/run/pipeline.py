"""``distill``: score, cache, train, evaluate and report, in one folder; an interrupted run continues."""

import json
import shutil
import signal
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from selkd.files import RECIPE, new_folder, remove_temporaries_below
from selkd.interrupts import end_with_launcher
from selkd.recipe.files import load_recipe
from selkd.recipe.part import parse_part
from selkd.recipe.recipe import Recipe
from selkd.reporting.publish import require_login
from selkd.run.benchmarks import require_benchmarks
from selkd.run.cache import cache, is_scored_from
from selkd.run.directory import RunDirectory
from selkd.run.evaluate import evaluate, is_measured
from selkd.run.finish import finish, publish
from selkd.run.inputs import revisions_of
from selkd.run.lock import working_in
from selkd.run.prepare import prepare
from selkd.run.restore import restore
from selkd.run.score import score
from selkd.run.shared_paths import check_shared_paths
from selkd.run.train import is_trained, train
from selkd.run.watch import watched
from selkd.run.workspace import Workspace
from selkd.sealed import REPORT


@dataclass(frozen=True)
class Run:
    """A finished run.

    Attributes:
        path: its folder.
        record: the content of ``record.json``.
    """

    path: Path
    record: dict[str, Any]

    @property
    def student(self) -> Path:
        """The student's folder, for ``AutoModelForCausalLM.from_pretrained``."""
        return self.path / "student"


def distill(recipe: Recipe | Mapping[str, Any] | str | Path, out: str | Path | None = None) -> Run:
    """Run a recipe, or finish a run of it that was interrupted.

    Args:
        recipe: a Recipe, a mapping of its keys, or the name or the YAML file of a recipe.
        out: the run's folder; None: ``runs/<recipe name>``.

    Raises:
        InputError: the recipe, the models, the data or the folder can't be used.
        RunError: a stage failed; finished stages are kept, and the same call continues.
        Interrupted: a signal or ``run.max_hours`` asked for the end; what was finished is kept, and the same call
            continues. Within the call SIGTERM, SIGUSR1 and Ctrl-C ask for it, if this is the main thread.
    """
    if not isinstance(recipe, Recipe):
        recipe = load_recipe(recipe) if isinstance(recipe, str | Path) else parse_part(Recipe, dict(recipe))
    with start(recipe, None if out is None else Path(out), pushes=recipe.hub is not None) as (work, run):
        prepare(work, run)
        if run.is_left_as_it_is:
            return Run(run.path, run.record)
        if run.is_finished and is_trained(work, run):
            restore(work, run)
        else:
            run.reopen()
            samples = score(work, run)
            if not is_trained(work, run):
                if not is_measured(work, run, "before"):
                    evaluate(work, run, work.models.student, "before")
                train(work, run, samples, cache(work, run, samples))
            finish(work, run)
        publish(work, run)
    return Run(run.path, run.record)


def score_only(recipe: Recipe, out: Path | None = None) -> Run:
    """Run the scoring stage only; ``distill`` into the same folder goes on from there."""
    with start(recipe, out) as (work, run):
        prepare(work, run)
        if not run.is_left_as_it_is:
            score(work, run)
    return Run(run.path, run.record)


def before_cache(recipe: Recipe, out: Path | None = None) -> Run:
    """Run what comes before the cache: the scoring stage, or, where the cache scores the samples, what precedes it."""
    if not is_scored_from(recipe):
        return score_only(recipe, out)
    with start(recipe, out) as (work, run):
        prepare(work, run)
    return Run(run.path, run.record)


def cache_only(recipe: Recipe, out: Path | None = None) -> Run:
    """Run the scoring and caching stages only; ``distill`` into the same folder goes on from there."""
    with start(recipe, out) as (work, run):
        prepare(work, run)
        if not run.is_left_as_it_is:
            cache(work, run, score(work, run))
    return Run(run.path, run.record)


@contextmanager
def start(recipe: Recipe, out: Path | None, *, pushes: bool = False) -> Iterator[tuple[Workspace, RunDirectory]]:
    """Watch over the block, lock the run's folder for it, and claim it. ``pushes``: its student goes to the hub."""
    path = out or Path("runs") / (recipe.name or "recipe")
    RunDirectory.require_belongs(path, recipe)  # before the lock makes a file in it
    if not (path / REPORT).exists():  # a finished run needs neither scores nor cache
        check_shared_paths(recipe)
    end_with_launcher(signal.SIGKILL)  # while processes find each other, nothing else ends one that waits
    work = Workspace(recipe, path)
    end_with_launcher(signal.SIGTERM)  # from here on it saves what it has
    work.check()
    require_benchmarks(recipe.evaluation)
    with watched(recipe.run), working_in(path, work.state, is_finished=(path / REPORT).exists()):
        run = RunDirectory.claim(path, recipe, is_writer=work.state.is_main_process)
        work.revisions = revisions_of(run.record)
        if pushes and not run.record.get("hub"):
            require_login()
        work.state.wait_for_everyone()  # all have read the folder before the main process writes
        if work.state.is_main_process:
            for folder in (path, work.cache_dir):
                remove_temporaries_below(folder)
        yield work, run


def full_kd_on_same_samples(run: Run) -> Run:
    """Run Full KD with a live teacher on the samples that ``run`` kept, in a folder beside it, for comparison."""
    recipe = load_recipe(run.path / RECIPE)
    changed = recipe.resolved() | {
        "name": f"{run.path.absolute().name}-full-kd",
        "positions": {"policy": "all", "reduction": recipe.positions.reduction},
        "classes": {"sampler": "all"},
        "cache": None,
        "hub": None,  # only the student of `run` is published
    }
    if recipe.samples is not None:
        scores = run.path / "selection" / "samples.parquet"
        changed["samples"] = {**recipe.samples.model_dump(), "path": str(scores)}
    return distill(parse_part(Recipe, changed), run.path.with_name(f"{run.path.name}-full-kd"))


def prune_into(recipe: Recipe, out: Path) -> dict[str, Any]:
    """Cut the student of a ``pruning_recipe`` from its teacher, into the new folder ``out``.

    Raises:
        InputError: ``distill`` would refuse teacher, layers or text.
        RunError: the disk refused.
    """
    source = Workspace(recipe, out).student_source
    with new_folder(out) as new:
        shutil.copytree(source.path, new, dirs_exist_ok=True)
    return {"student": str(out), **json.loads((out / "pruning.json").read_text(encoding="utf-8"))}
