"""What a run began with: digests of all that it reads, which every later start of it must meet again."""

import json
import re
from typing import Any

import xxhash

from selkd.errors import InputError
from selkd.files import RECIPE, file_digest
from selkd.models.sources import revision_of
from selkd.recipe.files import recipe_content
from selkd.recipe.foreign import without_address
from selkd.run.directory import RunDirectory
from selkd.run.workspace import Workspace
from selkd.sealed import INPUTS, REPORT

Inputs = dict[str, str | int]
_TEXT = {"data", "held_out"}
_PRECISIONS = {"student_precision", "teacher_precision"}
PROCESSES = "processes"  # recorded alone: the training's schedule says whether another number may continue it
_PRECISION = re.compile(r"student (\S+) over float32 weights, teacher (.+)")


def held_inputs(work: Workspace, run: RunDirectory) -> Inputs:
    """What the run began with, or, of a new run, what it begins with. Nothing is written into the run's folder.

    Raises:
        InputError: something is not what the run began with; every field that differs is named, with both values.
    """
    began = inputs_of(run.record)
    found = _found(work, run)
    if INPUTS not in run.record and run.record.get("train") is not None and (run.path / REPORT).exists():
        run.is_left_as_it_is = any(began.get(field, found[field]) != found[field] for field in _TEXT)
    _require_same(run, began, found)
    if run.is_left_as_it_is:
        return began
    # A student that is cut from the teacher only now: from what is known to be the same teacher and text.
    found |= {"student": work.student_source.fingerprint}
    generation = work.student_source.path / "generation_config.json"  # has the tokens that end an answer
    if work.recipe.on_policy is not None and generation.exists():
        found["student_generation"] = file_digest(generation)
    _require_same(run, began, found)
    return began or found


def revisions_of(record: dict[str, Any]) -> dict[str, str]:
    """The hub's commits of ``teacher`` and ``student`` that the run began with, whatever the hub has by now."""
    began = inputs_of(record)
    return {part: str(began[f"{part}_revision"]) for part in ("teacher", "student") if f"{part}_revision" in began}


def _found(work: Workspace, run: RunDirectory) -> Inputs:
    """What is there now, but for a student that is cut from the teacher."""
    sources = {} if work.recipe.teacher.is_foreign else {"teacher": work.teacher_source}
    if work.recipe.student.model is not None:
        sources["student"] = work.student_source
    revisions = {part: revision for part, source in sources.items() if (revision := revision_of(source)) is not None}
    splits = work.splits
    return {
        "recipe": _recipe_digest(run),
        "teacher": work.teacher_fingerprint,
        **{part: source.fingerprint for part, source in sources.items()},
        **{f"{part}_revision": revision for part, revision in revisions.items()},
        "tokenizer": work.tokenizer_fingerprint,
        "data": splits.fingerprint,
        "samples": splits.train.digest,
        "held_out": splits.held_out.digest,
        "student_precision": str(work.dtype).removeprefix("torch."),
        "teacher_precision": work.teacher_precision.removeprefix("torch."),
        **{f"own_{kind}": digest for kind, digest in work.own_parts.items()},
        PROCESSES: work.state.num_processes,
    }


def _recipe_digest(run: RunDirectory) -> str:
    """The digest of the recipe as the run's folder has it, but for where scores and cache are kept, which may move.

    Not of the recipe as it is resolved now: a later version of selkd may know more keys.
    """
    path = run.path / RECIPE
    content = recipe_content(path) if path.exists() else run.record.get("recipe") or run.recipe.resolved()
    return recipe_digest(content)


def recipe_digest(content: dict[str, Any]) -> str:
    """The digest of a resolved recipe's content, but for how a run ends early, how a server is asked, and the paths of
    scores and cache."""
    content = json.loads(json.dumps(content))
    content.pop("run", None)
    content["teacher"] = without_address(content["teacher"])
    for part in ("samples", "cache"):
        (content.get(part) or {}).pop("path", None)
    return xxhash.xxh3_128_hexdigest(json.dumps(content, sort_keys=True).encode())


def inputs_of(record: dict[str, Any]) -> Inputs:
    """What the run of this record began with. A record of an earlier version says some of it in other places."""
    if INPUTS in record or not record:
        return dict(record.get(INPUTS, {}))
    data, environment = record.get("data") or {}, record.get("environment") or {}
    precisions = _PRECISION.fullmatch(str(environment.get("precision"))) or (None, None, None)
    known = {
        "teacher": (record.get("teacher") or {}).get("fingerprint"),
        "student": (record.get("student") or {}).get("initial_fingerprint"),
        "data": data.get("fingerprint"),
        "held_out": data.get("held_out_fingerprint"),
        "student_precision": precisions[1],
        "teacher_precision": precisions[2],
        **{f"own_{kind}": digest for kind, digest in record.get("own_parts", {}).items()},
        PROCESSES: environment.get("world_size"),
    }
    return {field: value for field, value in known.items() if value is not None}


def _require_same(run: RunDirectory, began: Inputs, found: Inputs) -> None:
    passed_over = {PROCESSES}
    if run.is_left_as_it_is:
        passed_over |= _TEXT
    if run.is_finished:  # on a machine of another default precision, too: nothing is computed any more
        passed_over |= _PRECISIONS
    compared = [field for field in began if field in found and field not in passed_over]
    different = [field for field in compared if began[field] != found[field]]
    if not different:
        return
    listed = "; ".join(f"{_WORDS.get(field, field)}: then {began[field]}, now {found[field]}" for field in different)
    earlier = " An earlier version of selkd began it, which may split the same text otherwise: use that one."
    earlier = "" if INPUTS in run.record else earlier
    raise InputError(
        f"{run.path}: other inputs than those that the run began with: {listed}. Put back what changed to continue the "
        f"run, or give another --out for a new one; nothing was changed.{earlier}"
    )


_WORDS = {
    "recipe": f"recipe ({RECIPE} in the run's folder)",
    "data": "data (the text, or how it is read)",
    "samples": "samples (the tokenised training text)",
    "held_out": "held_out (the tokenised held-out text)",
    "student": "student (the initial one)",
}
