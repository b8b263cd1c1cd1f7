"""Places the scores and teacher caches that runs of a study share.

A file's or folder's name is a digest of all the recipe's keys that its content depends on. Should two runs with other
content get one name by mistake, the stored fingerprints differ and the stage refuses.
"""

import json
from pathlib import Path
from typing import Any

import xxhash

from selkd.errors import InputError
from selkd.plugins import Metric
from selkd.recipe.choices import SampleOptions
from selkd.recipe.part import parse_part
from selkd.recipe.recipe import Recipe

_PRECISION = ("bf16", "use_cpu")
# Keys that earlier versions did not have count where they are set, so that a study begun then finds what it wrote.
_LATER = ("server", "api_key_env", "requests", "imported", "from_cache")


def with_shared_paths(recipe: Recipe, folder: Path) -> Recipe:
    """Put the recipe's scores and cache below ``folder``, unless the recipe names their paths."""
    content, parts = recipe.resolved(), _what_scores_depend_on(recipe)
    if recipe.samples is not None and recipe.samples.path is None:
        content["samples"]["path"] = str(folder / "scores" / f"{_digest(parts)}.parquet")
    if recipe.cache is not None and recipe.cache.path is None:
        depends = {
            "teacher": _as_before(content["teacher"]),
            "data": content["data"],
            "classes": content["classes"],
            "temperature": content["criterion"]["temperature"],
            "seed": recipe.seed,
            "classes_shared_with": _vocabulary(recipe.student.model),
            "use_cpu": recipe.training.get("use_cpu"),  # it decides the teacher's precision
            "scalars": recipe.cache.scalars,
            # A cache holds certain samples.
            "samples": None if recipe.samples is None else [parts, content["samples"]["fraction"]],
        }
        content["cache"]["path"] = str(folder / "caches" / _digest(depends))
    return parse_part(Recipe, content)


def _vocabulary(student: str | None) -> int | str | None:
    """The student's vocabulary size, on which the classes in the cache depend.

    None for a student cut from the teacher; the name of a model of the hub, of which nothing is downloaded yet.
    """
    if student is None:
        return None
    from selkd.models.loading import n_rows  # here, as a study is refused without torch
    from selkd.models.sources import ModelSource

    folder = Path(student).expanduser()
    try:
        return n_rows(ModelSource(student, folder, "")) if folder.is_dir() else student
    except InputError:  # the run itself will say what is wrong
        return student


def _what_scores_depend_on(recipe: Recipe) -> dict[str, Any]:
    content = recipe.resolved()
    samples = recipe.samples
    # By former names, so that a study that was begun under them finds its scores.
    former = {name: key for key, name in SampleOptions.renamed.items()}
    options = _as_before(content["samples"] or {})
    options = {former.get(k, k): v for k, v in options.items() if k not in ("fraction", "path")}
    depends = {"teacher": _as_before(content["teacher"])} | {key: content[key] for key in ("student", "data")}
    depends |= {"samples": options, "precision": {key: recipe.training.get(key) for key in _PRECISION}}
    if samples is None or Metric.find(samples.metric).is_noise or samples.scoring == "approximate":
        depends["seed"] = recipe.seed
    return depends


def _as_before(part: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in part.items() if value or key not in _LATER}


def _digest(content: Any) -> str:
    return xxhash.xxh3_64_hexdigest(json.dumps(content, sort_keys=True).encode())
