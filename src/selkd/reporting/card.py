"""Writes the student's model card as the Hugging Face hub reads it: YAML front matter, then Markdown."""

import re
from functools import partial
from pathlib import Path
from typing import Any

import yaml

from selkd.reporting import words
from selkd.reporting.formats import dig
from selkd.reporting.measures import closeness, few_positions
from selkd.reporting.rendering import render

_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+")
# Keys whose text is no place, whatever characters it has, and keys of the user's own text.
_NO_PATHS = (("data", "template"), ("hub", "repo"))
_OWN_DATA = (("data", "path"), ("evaluation", "data"))


def model_card(record: dict[str, Any]) -> str:
    """Write the student's README.md from a run's record.json.

    The card names a base model and a data set only if they are ids of the hub. It shows no path of this machine: of a
    model the folder's name, and of data that it is local. The licence is the base model's: the hub is told where that
    stands. It leaves out what is not known.
    """
    # The student began with its own model's weights or with those of the teacher that it was cut from.
    pruned = dig(record, "student", "pruned_from_teacher") is not None
    base = dig(record, "teacher" if pruned else "student", "model")
    base_id = _hub_id(words.DEMO_MODEL if base == "demo" else base)
    title = _title(record, base)
    front: dict[str, Any] = {"library_name": "transformers", "pipeline_tag": "text-generation", "model_name": title}
    front |= _license(base_id)
    if base_id is not None:
        front["base_model"] = base_id
    if (data_id := _hub_id(dig(record, "recipe", "data", "path"))) is not None:
        front["datasets"] = [data_id]
    front["tags"] = ["selkd", "knowledge-distillation", "selective-knowledge-distillation"]
    recipe = _portable(record["recipe"])
    recipe_yaml = _yaml(recipe).strip()
    # A fence longer than any run of backticks in it can't be closed from within.
    longest = max((len(run) for run in re.findall(r"`+", recipe_yaml)), default=0)
    return render(
        "card.md.j2",
        front_matter=_yaml(front),
        get=partial(dig, {**record, "recipe": recipe}),
        words=words,
        base=base,
        title=title,
        few=few_positions(record),
        figures=[row for row in closeness(record) if row.after is not None],
        recipe_yaml=recipe_yaml,
        fence="`" * max(3, longest + 1),
    )


def _title(record: dict[str, Any], base: str | None) -> str:
    """The student by its base model's name, which people know: SmolLM2-135M-Instruct, 20 of 30 layers, distilled."""
    if base is None:
        return str(dig(record, "name") or "student")
    kept, layers = dig(record, "student", "pruned_from_teacher", "kept_layers"), dig(record, "teacher", "layers")
    cut = f", {len(kept)} of {layers} layers" if kept is not None and layers is not None else ""
    return f"{words.model(base)}{cut}, distilled"


def _license(base_id: str | None) -> dict[str, str]:
    """The base model's licence holds, which selkd does not know by name but for the embedded default's."""
    if base_id == words.DEMO_MODEL:
        return {"license": "apache-2.0"}
    if base_id is None:
        return {"license": "unknown"}
    return {
        "license": "other",
        "license_name": "that-of-the-base-model",
        "license_link": f"https://huggingface.co/{base_id}",
    }


def _yaml(content: dict[str, Any]) -> str:
    return yaml.safe_dump(content, sort_keys=False, allow_unicode=True)


def _hub_id(name: str | None) -> str | None:
    # selkd loads a folder of that name before a model of the hub.
    return name if name is not None and _HUB_ID.fullmatch(name) and not Path(name).exists() else None


def _portable(recipe: dict[str, Any]) -> dict[str, Any]:
    """The recipe without places of this machine, which mean nothing elsewhere and are nobody's business."""
    return {key: _without_places(value, (key,)) for key, value in recipe.items()}


def _without_places(value: Any, key: tuple[str, ...]) -> Any:
    if isinstance(value, dict):
        return {name: _without_places(inner, (*key, str(name))) for name, inner in value.items()}
    if isinstance(value, list):
        return [_without_places(inner, key) for inner in value]
    if not isinstance(value, str) or key in _NO_PATHS or value == "demo":
        return value
    if key in _OWN_DATA:
        return value if _hub_id(value) is not None else words.LOCAL_FILES
    if key[-1] == "model" and _hub_id(value) is not None:
        return value
    return words.last_part(value)
