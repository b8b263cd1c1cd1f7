"""The keys of a recipe that its author chose: those whose value is not the default."""

import json
from collections.abc import Iterator, Mapping
from typing import Any, get_args

from pydantic.fields import FieldInfo

from selkd.recipe.part import Part
from selkd.recipe.recipe import Recipe

_NO_CHOICE = ("name", "run")  # what the run is called, and how it ends early


def chosen_keys(recipe: Mapping[str, Any] | None) -> dict[str, str]:
    """Dotted key -> value as text, of a resolved recipe. A key that another choice makes meaningless is null there and
    is left out, as is a key that this version does not know.
    """
    if not isinstance(recipe, Mapping):
        return {}
    chosen = _chosen(Recipe, recipe, _defaults(Recipe))
    return {key: _text(value) for key, value in chosen if key.split(".")[0] not in _NO_CHOICE}


def _chosen(
    part: type[Part], content: Mapping[str, Any], defaults: Mapping[str, Any], above: str = ""
) -> Iterator[tuple[str, Any]]:
    for name, field in part.model_fields.items():
        value, default, inner = content.get(name), defaults.get(name), _part_of(field)
        if value is None or value == default:
            continue
        if isinstance(value, Mapping) and inner is not None:
            below = list(_chosen(inner, value, _defaults(inner) if default is None else default, f"{above}{name}."))
            # A part that is there although none is the default is a choice by itself.
            yield from below or ([(f"{above}{name}", value)] if default is None else [])
        elif isinstance(value, Mapping) and name == "training":
            yield from ((f"{above}{name}.{key}", entry) for key, entry in value.items())
        else:
            yield f"{above}{name}", value


def _defaults(part: type[Part]) -> dict[str, Any]:
    """Key -> default; of a part that is there by default all its keys, as its other choices complete them."""
    given = {
        name: None if field.is_required() else field.get_default(call_default_factory=True)
        for name, field in part.model_fields.items()
    }
    return {name: one.model_dump(mode="json") if isinstance(one, Part) else one for name, one in given.items()}


def _part_of(field: FieldInfo) -> type[Part] | None:
    """The class of the part that a key holds, if it holds one."""
    kinds = (field.annotation, *get_args(field.annotation))
    return next((kind for kind in kinds if isinstance(kind, type) and issubclass(kind, Part)), None)


def _text(value: Any) -> str:
    if isinstance(value, Mapping):
        return (
            ", ".join(f"{key}: {_text(entry)}" for key, entry in value.items() if entry is not None) or "as by default"
        )
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
