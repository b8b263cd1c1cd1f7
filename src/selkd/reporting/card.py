"""Writes the student's model card as the Hugging Face hub reads it: YAML front matter, then Markdown."""

import copy
import re
from functools import partial
from pathlib import Path
from typing import Any

import yaml

from selkd.reporting import words
from selkd.reporting.formats import dig
from selkd.reporting.measures import closeness
from selkd.reporting.rendering import render

_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+")
_PATHS = (("teacher", "model"), ("student", "model"), ("data", "path"), ("samples", "path"), ("cache", "path"))


def model_card(record: dict[str, Any]) -> str:
    """Write the student's README.md from a run's record.json.

    The card names a base model and a data set only if they are ids of the hub; of a path on this machine it shows the
    last part. It claims no licence, as the base model's holds. It leaves out what is not known.
    """
    # The student began with its own model's weights or with those of the teacher that it was cut from.
    pruned = dig(record, "student", "pruned_from_teacher") is not None
    base = dig(record, "teacher" if pruned else "student", "model")
    front: dict[str, Any] = {"library_name": "transformers", "pipeline_tag": "text-generation"}
    if (base_id := _hub_id(words.DEMO_MODEL if base == "demo" else base)) is not None:
        front["base_model"] = base_id
    if (data_id := _hub_id(dig(record, "recipe", "data", "path"))) is not None:
        front["datasets"] = [data_id]
    front["tags"] = ["selkd", "knowledge-distillation", "selective-knowledge-distillation"]
    recipe_yaml = _yaml(_portable(record["recipe"])).strip()
    # A fence longer than any run of backticks in it can't be closed from within.
    longest = max((len(run) for run in re.findall(r"`+", recipe_yaml)), default=0)
    return render(
        "card.md.j2",
        front_matter=_yaml(front),
        get=partial(dig, record),
        words=words,
        base=base,
        figures=[row for row in closeness(record) if row.after is not None],
        recipe_yaml=recipe_yaml,
        fence="`" * max(3, longest + 1),
    )


def _yaml(content: dict[str, Any]) -> str:
    return yaml.safe_dump(content, sort_keys=False, allow_unicode=True)


def _hub_id(name: str | None) -> str | None:
    # selkd loads a folder of that name before a model of the hub.
    return name if name is not None and _HUB_ID.fullmatch(name) and not Path(name).exists() else None


def _portable(recipe: dict[str, Any]) -> dict[str, Any]:
    """Shorten each local path of the recipe to its last part: a folder of this machine means nothing elsewhere."""
    recipe = copy.deepcopy(recipe)
    for part, key in _PATHS:
        if isinstance(value := dig(recipe, part, key), str) and value != "demo" and _hub_id(value) is None:
            recipe[part][key] = Path(value).name
    return recipe
