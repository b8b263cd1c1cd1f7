"""``selkd verify``: read every byte of a run's folder, and say what is whole and what is not."""

import math
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from selkd.errors import InputError
from selkd.files import RECIPE, RECORD
from selkd.recipe.files import recipe_content
from selkd.reporting.run_files import read_run
from selkd.run.inputs import recipe_digest
from selkd.sealed import CACHE_COST, CARD, DIGEST, FILES, INPUTS, REPORT, SCORES, differences, require_begun, unsealed
from selkd.selection.samples import SampleScores
from selkd.training.sealing import DIGESTS, fault_of
from selkd_cache.manifest import MANIFEST
from selkd_cache.verify import verify_cache

# What the record of every finished run has, and of which type; null where a stage did not run.
FORM: dict[str, tuple[type, ...]] = {
    **dict.fromkeys((DIGEST, "name"), (str,)),
    **dict.fromkeys((INPUTS, FILES, "own_parts", "recipe", "environment", "data", "teacher", "student"), (dict,)),
    **dict.fromkeys(("counts", "seconds", "peak_memory_bytes", "teacher_tokens", "train"), (dict,)),
    **{key: (dict, type(None)) for key in ("fidelity", "teacher_cache", "benchmarks", "on_policy")},
}
_MAY_DIFFER = {
    CARD: "the run wrote another card: it was edited",
    REPORT: "the run wrote another page: it was written anew",
    CACHE_COST: "the run noted another cost of the cache: a part of it was built again, or the note is damaged",
}


@dataclass(frozen=True)
class Checked:
    """What ``verify_run`` found.

    Attributes:
        finished: whether the run was finished, so that digests of all its files are known.
        whole: the parts that are as they were written.
        problems: what is damaged or missing; empty if the run is whole.
        notes: what is no damage, and yet good to know.
    """

    finished: bool = False
    whole: list[str] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    def add(self, part: str, problems: list[str]) -> None:
        """A part, which is whole if it has no problems."""
        if problems:
            self.problems.extend(problems)
        else:
            self.whole.append(part)


def verify_run(run_path: Path) -> Checked:
    """Check a run's files against the digests in its record, and the record, cache and checkpoints against their own.

    Raises:
        InputError: the folder is no run.
    """
    require_begun(run_path)
    try:
        record = unsealed(run_path / RECORD)
    except (InputError, OSError) as error:
        return _verified(Checked(), run_path, {}, [str(error)])
    checked = Checked(finished=FILES in record)
    return _verified(checked, run_path, record, list(_form_problems(record)))


def _verified(checked: Checked, run_path: Path, record: dict[str, Any], record_problems: list[str]) -> Checked:
    checked.add(RECORD, record_problems)
    if record and not checked.finished:
        sealed = "it is not finished" if INPUTS in record else "it is of a version that wrote no digests"
        checked.notes.append(f"the run's files have no digests, as {sealed}; what is there was read, no more")
    changed = _check_files(checked, run_path, record)
    if not changed:
        checked.add("the form of recipe, metrics and selection", list(_content_problems(run_path, record)))
    _check_cache(checked, run_path)
    for checkpoint in sorted((run_path / "checkpoints").glob("checkpoint-*")):
        _check_checkpoint(checked, checkpoint)
    return checked


def _form_problems(record: dict[str, Any]) -> Iterator[str]:
    """What of a record is not as selkd writes it."""
    for key, types in FORM.items() if FILES in record else ():
        if key not in record:
            yield f"{RECORD}: {key} is missing"
        elif not isinstance(record[key], types):
            yield f"{RECORD}: {key} is a {type(record[key]).__name__}"
    for key in _not_finite(record):
        yield f"{RECORD}: {key} is not finite"


def _not_finite(value: Any, key: str = "") -> Iterator[str]:
    if isinstance(value, float) and not math.isfinite(value):
        yield key
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for name, inner in items:
        yield from _not_finite(inner, f"{key}.{name}" if key else str(name))


def _check_files(checked: Checked, run_path: Path, record: dict[str, Any]) -> bool:
    """Compare the files with the record's digests. Returns whether one that is read is not as it was."""
    files: dict[str, str] = record.get(FILES, {})
    found = differences(run_path, files)
    for name in files:
        problem = found.get(name)
        if problem == "changed" and name in _MAY_DIFFER:
            checked.notes.append(f"{name}: {_MAY_DIFFER[name]}")
            del found[name]
        elif name == CACHE_COST and not (run_path / name).parent.exists():
            checked.notes.append("teacher_cache: it is gone; the finished run does without")
            del found[name]
        else:
            checked.add(name, [] if problem is None else [f"{name} is {problem}"])
    return bool(found)


def _content_problems(run_path: Path, record: dict[str, Any]) -> Iterator[str]:
    """What of the files that other commands read can't be read, or does not belong to the record."""
    try:
        began = record.get(INPUTS, {}).get("recipe")
        if began is not None and recipe_digest(recipe_content(run_path / RECIPE)) != began:
            yield f"{RECIPE} is not the recipe that the run began with"
        if (run_path / SCORES).is_file():
            SampleScores.read(run_path / SCORES)
        if record:
            read_run(run_path)
    except (InputError, OSError) as error:
        yield str(error)


def _check_cache(checked: Checked, run_path: Path) -> None:
    """The cache in the run's own folder; a shared one is another folder's matter."""
    cache = run_path / "teacher_cache"
    if not cache.is_dir():
        return
    if not checked.finished and not (cache / MANIFEST).exists():
        checked.notes.append(f"{cache.name}: not built to its end; `selkd distill` goes on with it")
    else:
        checked.add(cache.name, [f"{cache.name}: {problem}" for problem in verify_cache(cache)])


def _check_checkpoint(checked: Checked, checkpoint: Path) -> None:
    name, fault = f"checkpoints/{checkpoint.name}", fault_of(checkpoint)
    if fault is not None and not (checkpoint / DIGESTS).exists():
        checked.notes.append(f"{name}: {fault}; a run that goes on passes over it")
    else:
        checked.add(name, [] if fault is None else [f"{name}: {fault}"])
