"""Pydantic's validation errors in the user's words: the key, what was given, what is allowed, the nearest name."""

import re
import typing
from collections.abc import Iterator
from typing import Any

from pydantic import BaseModel, ValidationError
from pydantic_core import ErrorDetails

from selkd.errors import nearest

_TAGS = ("<number>", "<schedule>")  # which branch of a choice was read, not a key


def explain(error: ValidationError, model: type[BaseModel], prefix: str = "") -> str:
    """One message for all that is wrong with the input of ``model``, a line a fault."""
    lines = [_explain_one(detail, model, prefix) for detail in error.errors()]
    return "\n".join(dict.fromkeys(lines))


def _explain_one(detail: ErrorDetails, model: type[BaseModel], prefix: str) -> str:
    path = [str(step) for step in detail["loc"] if step not in _TAGS]
    key = ".".join(([prefix] if prefix else []) + path) or "recipe"
    given, context = detail["input"], detail.get("ctx", {})
    match detail["type"]:
        case "extra_forbidden":
            names = [field.alias or name for name, field in _model_at(model, path[:-1]).model_fields.items()]
            return f"{key}: unknown key. Allowed here: {', '.join(names)}.{nearest(path[-1], names)}"
        case "missing":
            return f"{key}: required, but not given."
        case "literal_error":
            names = [name.strip("' ") for name in context["expected"].replace(" or ", ", ").split(",")]
            return f"{key}: {given!r} is not known. Allowed: {', '.join(names)}.{nearest(given, names)}"
        case "value_error":
            message = str(context["error"])
            return message if re.match(r"[a-z_]+\.[a-z]", message) or not path else f"{key}: {message}"
        case _:
            return f"{key}: {detail['msg'][0].lower()}{detail['msg'][1:]}, but got {given!r}."


def _model_at(model: type[BaseModel], path: list[str]) -> type[BaseModel]:
    """The model class that validates the part of ``model`` at ``path``."""
    for step in path:
        model = next(_models_in(model.model_fields[step].annotation))
    return model


def _models_in(annotation: Any) -> Iterator[type[BaseModel]]:
    """The model classes among an annotation's choices."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        yield annotation
    for choice in typing.get_args(annotation):
        yield from _models_in(choice)
