"""What the runs of a study share: scores and teacher caches, one file and one folder for all that they depend on.

The names come from the recipes alone. Should two runs meet in one place by mistake, the stored fingerprints differ and
the stage refuses.
"""

import json
from pathlib import Path
from typing import Any

import xxhash

from selkd.errors import InputError
from selkd.models.loading import n_rows
from selkd.models.sources import ModelSource
from selkd.plugins import Metric
from selkd.recipe.part import parse_part
from selkd.recipe.recipe import Recipe

_PRECISION = ("bf16", "use_cpu")


def with_shared_paths(recipe: Recipe, folder: Path) -> Recipe:
    """The recipe with its scores and its cache below ``folder``, where it does not say itself where they are."""
    content, parts = recipe.resolved(), _what_scores_depend_on(recipe)
    if recipe.samples is not None and recipe.samples.path is None:
        content["samples"]["path"] = str(folder / "scores" / f"{_digest(parts)}.parquet")
    if recipe.cache is not None and recipe.cache.path is None:
        depends = {
            "teacher": content["teacher"],
            "data": content["data"],
            "classes": content["classes"],
            "temperature": content["criterion"]["temperature"],
            "seed": recipe.seed,
            "classes_shared_with": _vocabulary(recipe.student.model),
            "use_cpu": recipe.training.get("use_cpu"),  # it decides the teacher's precision
            # A cache is planned for certain samples.
            "samples": None if recipe.samples is None else [parts, content["samples"]["fraction"]],
        }
        content["cache"]["path"] = str(folder / "caches" / _digest(depends))
    return parse_part(Recipe, content)


def _vocabulary(student: str | None) -> int | str | None:
    """How many classes the student has, which decides those that it shares with the teacher and so the cache.

    None for one that is cut from the teacher; the name for a model of the hub, of which nothing is fetched yet.
    """
    if student is None:
        return None
    folder = Path(student).expanduser()
    try:
        return n_rows(ModelSource(student, folder, "")) if folder.is_dir() else student
    except InputError:  # the run will say what is wrong with it
        return student


def _what_scores_depend_on(recipe: Recipe) -> dict[str, Any]:
    content = recipe.resolved()
    samples = recipe.samples
    options = {key: value for key, value in (content["samples"] or {}).items() if key not in ("fraction", "path")}
    depends = {key: content[key] for key in ("teacher", "student", "data")}
    depends |= {"samples": options, "precision": {key: recipe.training.get(key) for key in _PRECISION}}
    if samples is None or Metric.find(samples.metric).is_noise or samples.scoring == "approximate":
        depends["seed"] = recipe.seed
    return depends


def _digest(content: Any) -> str:
    return xxhash.xxh3_64_hexdigest(json.dumps(content, sort_keys=True).encode())
