"""A finished run that lost something: what can be made again is made again, the rest is told with its remedy."""

import tempfile
from functools import partial
from pathlib import Path

from selkd.errors import InputError
from selkd.files import RECIPE, file_digest, write_whole
from selkd.recipe.yaml_text import dump_yaml
from selkd.reporting.page import write_page
from selkd.run.cache import open_cache
from selkd.run.directory import RunDirectory
from selkd.run.evaluate import measure_fidelity, write_overlaps
from selkd.run.finish import saved_student, write_card, write_examples
from selkd.run.held_out import write_held_out, write_sums
from selkd.run.score import scored, shared_scores
from selkd.run.workspace import Workspace
from selkd.sealed import CACHE_COST, CARD, EXAMPLES, FIDELITY, FILES, HELD_OUT, OVERLAP, REPORT, SCORES, differences

_STUDENT = "student"


def restore(work: Workspace, run: RunDirectory) -> None:
    """Make again what a finished run has lost. Of a whole run, no byte is touched.

    The weights of the student are compared before, see ``is_trained``; they come back by training.

    Raises:
        InputError: something is damaged that can't be made again, or that the user may have edited; with the remedy.
        RunError: the disk refused.
    """
    files: dict[str, str] = run.record[FILES]
    weights = {name for name in files if Path(name).parts[0] == _STUDENT and name.endswith(".safetensors")}
    lost = differences(run.path, files, files.keys() - weights)
    if lost.get(CARD) == "changed":  # by the user, who may
        del lost[CARD]
    lost.pop(CACHE_COST, None)  # what the cache's builds noted: a finished run needs neither it nor its cache
    work.state.wait_for_everyone()  # all have seen what is lost before the main process writes it
    if not lost:
        return
    made = _make(work, run, lost)
    if work.state.is_main_process:
        _note(run, made)
        if made or REPORT in lost:
            write_page(run.path)
            _note(run, {REPORT})
    work.state.wait_for_everyone()
    if left := {name: problem for name, problem in lost.items() if name not in made | {REPORT}}:
        listed = "; ".join(f"{name} is {problem}: {_remedy(name)}" for name, problem in left.items())
        raise InputError(f"{run.path}: the run is finished, but {listed}.")


def _make(work: Workspace, run: RunDirectory, lost: dict[str, str]) -> set[str]:
    """Make the lost files again that come from others, whose names are returned."""
    makers = {
        SCORES: _scores,
        OVERLAP: _overlaps,
        FIDELITY: _sums,
        EXAMPLES: _examples,
        HELD_OUT: _held_out,
        RECIPE: _recipe,
        CARD: _card,
    }
    made = {name for name in makers if name in lost}
    for name in makers:
        if name in made:
            makers[name](work, run)
    missing = {Path(name).name for name, problem in lost.items() if problem == "missing" and _is_students(name)}
    return made | {f"{_STUDENT}/{name}" for name in _tokenizer_files(work, run, missing)}


def _scores(work: Workspace, run: RunDirectory) -> None:
    """From a file that several runs share, or by the initial student again."""
    scores = shared_scores(work) or scored(work, open_cache(work))
    if work.state.is_main_process:
        scores.write(run.path / SCORES)


def _overlaps(work: Workspace, run: RunDirectory) -> None:
    write_overlaps(work, run, measure_fidelity(work, work.models.student, "comparing metrics"))


def _sums(work: Workspace, run: RunDirectory) -> None:
    """From the initial student and from the saved one, both measured again."""
    (run.path / FIDELITY).unlink(missing_ok=True)
    work.state.wait_for_everyone()
    for when, student in (("before", work.models.student), ("after", None)):
        measured = measure_fidelity(work, student or saved_student(work, run), "measuring fidelity again")
        if work.state.is_main_process:
            write_sums(run, measured, when)


def _held_out(work: Workspace, run: RunDirectory) -> None:
    if work.state.is_main_process:
        write_held_out(work, run, partial(saved_student, work, run))


def _examples(work: Workspace, run: RunDirectory) -> None:
    if work.state.is_main_process:
        write_examples(work, run)


def _recipe(work: Workspace, run: RunDirectory) -> None:
    """As the run began with it, which the record tells."""
    if work.state.is_main_process:
        write_whole(run.path / RECIPE, dump_yaml(run.record["recipe"]))


def _card(work: Workspace, run: RunDirectory) -> None:
    if work.state.is_main_process:
        write_card(run)


def _tokenizer_files(work: Workspace, run: RunDirectory, missing: set[str]) -> set[str]:
    """Write those of the ``missing`` files of the student that are its tokenizer's. Returns their names."""
    if not missing:
        return set()
    with tempfile.TemporaryDirectory() as folder:
        work.tokenizer.save_pretrained(folder)
        names = missing & {path.name for path in Path(folder).iterdir()}
        for name in names if work.state.is_main_process else ():
            write_whole(run.path / _STUDENT / name, Path(folder, name).read_bytes())
    return names


def _is_students(name: str) -> bool:
    return Path(name).parent.as_posix() == _STUDENT


def _note(run: RunDirectory, made: set[str]) -> None:
    """Write the digests of what was made again into the record where they are others, as another machine rounds."""
    files = run.record[FILES]
    changed = {name: digest for name in made if (digest := file_digest(run.path / name)) != files[name]}
    if changed:
        run.close(files | changed)


def _remedy(name: str) -> str:
    part = Path(name).parts[0]
    if part == _STUDENT:
        return f"move it away and run again (if it is missing: move the folder {_STUDENT} away) to have it made again"
    if part == "adapter":
        return f"move the folder {_STUDENT} away and run again to have both saved from the last checkpoint"
    return f"put it back, or move {_STUDENT} and checkpoints away and run again to train anew"
