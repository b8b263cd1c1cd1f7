"""``distill``: score, cache, train, evaluate and report, in one folder; an interrupted run continues."""

import json
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from selkd.errors import RunError
from selkd.files import RECIPE, remove_temporaries_below, write_whole
from selkd.models.loading import load_model
from selkd.models.pair import ModelPair
from selkd.models.sources import locate
from selkd.recipe.files import load_recipe
from selkd.recipe.part import parse_part
from selkd.recipe.recipe import Recipe
from selkd.reporting.card import model_card
from selkd.reporting.page import write_page
from selkd.reporting.publish import push_student, require_login
from selkd.run.benchmarks import require_benchmarks
from selkd.run.cache import cache
from selkd.run.directory import RunDirectory
from selkd.run.evaluate import evaluate, is_measured
from selkd.run.lock import working_in
from selkd.run.prepare import prepare
from selkd.run.score import score
from selkd.run.train import is_trained, train
from selkd.run.workspace import Workspace
from selkd.selection.positions import step_context
from selkd.tokens.examine import examine

EXAMPLES = 8  # how many held-out samples the report's page shows, or counts in its histogram


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
    """
    if not isinstance(recipe, Recipe):
        recipe = load_recipe(recipe) if isinstance(recipe, str | Path) else parse_part(Recipe, dict(recipe))
    with start(recipe, None if out is None else Path(out), pushes=recipe.hub is not None) as (work, run):
        samples = score(work, run)
        if not is_trained(work, run):
            if not is_measured(work, run, "before"):
                evaluate(work, run, work.models.student, "before")
            train(work, run, samples, cache(work, run, samples))
        _finish(work, run)
    return Run(run.path, run.record)


def score_only(recipe: Recipe, out: Path | None = None) -> Run:
    """Run the scoring stage only; ``distill`` into the same folder goes on from there."""
    with start(recipe, out) as (work, run):
        score(work, run)
    return Run(run.path, run.record)


def cache_only(recipe: Recipe, out: Path | None = None) -> Run:
    """Run the scoring and caching stages only; ``distill`` into the same folder goes on from there."""
    with start(recipe, out) as (work, run):
        cache(work, run, score(work, run))
    return Run(run.path, run.record)


@contextmanager
def start(recipe: Recipe, out: Path | None, *, pushes: bool = False) -> Iterator[tuple[Workspace, RunDirectory]]:
    """Lock the run's folder for the block and find its inputs. ``pushes``: whether its student goes to the hub."""
    path = out or Path("runs") / (recipe.name or "recipe")
    work = Workspace(recipe, path)
    work.check()
    require_benchmarks(recipe.evaluation)
    RunDirectory.require_belongs(path, recipe)  # before the lock makes a file in it
    with working_in(path, work.state, is_finished=(path / "report.html").exists()):
        run = RunDirectory.claim(path, recipe, is_writer=work.state.is_main_process)
        if pushes and not run.record.get("hub"):
            require_login()
        work.state.wait_for_everyone()  # all have read the folder before the main process writes
        if work.state.is_main_process:
            for folder in (path, work.cache_dir):
                remove_temporaries_below(folder)
        prepare(work, run)
        yield work, run


def _finish(work: Workspace, run: RunDirectory) -> None:
    """Measure the saved student; write its card, the examples and the report; push it to the hub."""
    unmeasured = not is_measured(work, run, "after")
    examples = run.path / "selection" / "examples.json"
    if unmeasured or not examples.exists():
        work.models.release_student()  # measure the saved student, not the one in memory
        student = load_model(locate(str(run.path / "student"), work.cache_dir), torch.float32, work.device)
        if unmeasured:
            evaluate(work, run, student, "after")
        if work.state.is_main_process:
            samples = work.splits.held_out if len(work.splits.held_out) else work.splits.train
            positions, steps = work.recipe.positions, run.record["train"]["steps"]
            examined = examine(
                ModelPair(lambda: student, lambda: work.models.teacher, work.tokenizer, work.vocab_size, torch.float32),
                [samples[index] for index in range(min(EXAMPLES, len(samples)))],
                positions.metric if positions.metric not in (None, "random") else "student_entropy",
                [(positions, step_context(positions, steps, steps))],
                work.recipe.seed,
            )
            write_whole(examples, json.dumps(examined) + "\n")
    card = run.path / "student" / "README.md"
    if work.state.is_main_process:
        if unmeasured or not card.exists():  # keep a card that the user may have edited
            write_whole(card, model_card(run.record))
        write_page(run.path)
        _push(work, run)
    work.state.wait_for_everyone()


def _push(work: Workspace, run: RunDirectory) -> None:
    """Push the student to the hub, if the recipe asks for it and this student is not there yet."""
    options = work.recipe.hub
    fingerprint = run.record["student"]["fingerprint"]
    if options is None or (run.record.get("hub") or {}).get("student") == fingerprint:
        return
    run.record["hub"] = {**push_student(run.path / "student", options), "student": fingerprint}
    run.save()


def full_kd_on_same_samples(run: Run) -> Run:
    """Run Full KD with a live teacher on the samples that ``run`` kept, in a folder beside it, for comparison."""
    recipe = load_recipe(run.path / RECIPE)
    changed = recipe.resolved() | {
        "name": f"{recipe.name}-full-kd",
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
    """
    source = Workspace(recipe, out).student_source
    try:
        shutil.copytree(source.path, out)
    except OSError as error:
        raise RunError(f"{out}: can't be written ({error}).") from None
    return {"student": str(out), **json.loads((out / "pruning.json").read_text(encoding="utf-8"))}
