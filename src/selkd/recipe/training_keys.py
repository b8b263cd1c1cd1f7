"""The keys of ``transformers.TrainingArguments`` and what each takes, from its source: importing it takes seconds."""

import ast
import functools
import operator
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Literal, Union, get_args

from pydantic import TypeAdapter

# The modules of Transformers that hold the class and the enumerations that its fields take.
_MODULES = ("training_args.py", "trainer_utils.py", "debug_utils.py")


@functools.cache
def training_keys() -> dict[str, TypeAdapter[Any]]:
    """Each field that ``TrainingArguments`` can be made with, and what checks and converts its value."""
    (arguments,) = (found for found in _classes() if found.name == "TrainingArguments")
    names = _Names()
    return {
        field.target.id: TypeAdapter(_without_text(eval(ast.unparse(field.annotation), {}, names)))
        for field in arguments.body
        if isinstance(field, ast.AnnAssign) and isinstance(field.target, ast.Name) and _is_given(field.value)
    }


@functools.cache
def _classes() -> list[ast.ClassDef]:
    spec = find_spec("transformers")
    assert spec is not None, "selkd requires transformers"
    assert spec.origin is not None, "transformers has its source"
    folder = Path(spec.origin).parent
    trees = [ast.parse((folder / name).read_text(encoding="utf-8")) for name in _MODULES]
    return [node for tree in trees for node in tree.body if isinstance(node, ast.ClassDef)]


class _Names(dict[str, Any]):
    """What the names in an annotation stand for: an enumeration of texts for its values, another class for anything."""

    def __init__(self) -> None:
        types = {kind.__name__: kind for kind in (bool, dict, float, int, list, str)}
        super().__init__(Any=Any, Union=Union, Literal=Literal, **types)

    def __missing__(self, name: str) -> Any:
        values = tuple(value for found in _classes() if found.name == name for value in _texts(found))
        return Literal[values] if values else Any


def _texts(enumeration: ast.ClassDef) -> Iterator[str]:
    for line in enumeration.body:
        if isinstance(line, ast.Assign) and isinstance(line.value, ast.Constant) and isinstance(line.value.value, str):
            yield line.value.value


def _without_text(annotation: Any) -> Any:
    """``Enumeration | str``, as which Transformers writes the values of an enumeration, without the ``str``."""
    choices = get_args(annotation)
    if str in choices and any(isinstance(value, str) for choice in choices for value in get_args(choice)):
        return functools.reduce(operator.or_, (choice for choice in choices if choice is not str))
    return annotation


def _is_given(default: ast.expr | None) -> bool:
    """Whether a field with this default is a parameter."""
    keywords = default.keywords if isinstance(default, ast.Call) else []
    return not any(keyword.arg == "init" and ast.unparse(keyword.value) == "False" for keyword in keywords)
