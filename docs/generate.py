"""Fills what pages show of the code: ``python docs/generate.py``. A test fails where a page is stale.

A page has marks, ``<!-- generated: NAME -->`` and ``<!-- end -->``; what stands between them is written here, from the
recipe's models, the entries of its choices, the named recipes and the command line. All else in a page is by hand.
"""

import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, TypeVar

import typer
from pydantic import BaseModel

from selkd.cli.main import app
from selkd.plugins import Criterion, Entry, Metric, Policy, Sampler
from selkd.recipe.errors import _models_in
from selkd.recipe.files import named_recipes
from selkd.recipe.recipe import Recipe
from selkd.recipe.training import OWNED, RECIPE_RANGES, REFUSED

E = TypeVar("E", bound=Entry)
HERE = Path(__file__).parent
PAGES = ("recipe.md", "commands.md")
WORDS = {"string": "text", "integer": "integer", "number": "number", "boolean": "true or false", "null": "null"}
SIGNS = {"exclusiveMinimum": ">", "minimum": "≥", "exclusiveMaximum": "<", "maximum": "≤"}


def filled(page: str) -> str:
    """The text of a page with what is generated written anew."""
    text = (HERE / page).read_text(encoding="utf-8")
    return re.sub(
        r"(<!-- generated: (.+?) -->\n).*?(<!-- end -->)",
        lambda found: f"{found[1]}\n{generated(found[2])}\n\n{found[3]}",
        text,
        flags=re.DOTALL,
    )


def generated(name: str) -> str:
    """What stands between the marks of ``name``: a block's name, or ``keys`` and a part of the recipe."""
    block, _, part = name.partition(" ") if name.startswith("keys ") else (name, "", "")
    blocks: dict[str, Callable[[], str]] = {
        "ranges": lambda: table("key | allowed", [[f"`{key}`", told] for key, (_, told) in RECIPE_RANGES.items()]),
        "owned": lambda: table("key | instead", [[f"`{key}`", told] for key, told in OWNED.items()]),
        "refused": lambda: table(
            "key | why, or what to do", [[f"`{key}`", told] for key, (_, told) in REFUSED.items()]
        ),
        "recipes": lambda: table("name | what it is", [[f"`{n}`", first_line(t)] for n, t in named_recipes().items()]),
        "commands": commands_text,
        "criteria": lambda: table(
            "`name` | D(p, q) | options", [[*cells(c), options_of(c)] for c in entries(Criterion)]
        ),
        "metrics": lambda: table(
            "`metric` | score u, at temperature 1 | needs the teacher",
            [[*cells(m), yes(m.needs_teacher)] for m in entries(Metric)],
        ),
        "policies": lambda: table("`policy` | coefficients a", [cells(policy) for policy in entries(Policy)]),
        "samplers": lambda: table("`sampler` | what is compared", [cells(sampler) for sampler in entries(Sampler)]),
        "sample metrics": lambda: table(
            "`metric` | score of a sample | needs the teacher",
            [[f"`{m.name}`", escape(m.of_sample or ""), yes(m.needs_teacher)] for m in Metric.of_samples().values()],
        ),
        "keys": lambda: table("key | type | default | meaning", keys_of(part)),
    }
    return blocks[block]()


def keys_of(part: str) -> list[list[str]]:
    """A row for each key of a part of the recipe, or of the recipe itself."""
    if part == "recipe":
        return rows_of(Recipe, "", nested=False)
    (model,) = _models_in(Recipe.model_fields[part].annotation)
    return rows_of(model, f"{part}.")


def rows_of(model: type[BaseModel], prefix: str, nested: bool = True) -> list[list[str]]:
    schema = model.model_json_schema()["properties"]
    rows = []
    for name, field in model.model_fields.items():
        key = field.alias or name
        if not field.description:
            raise ValueError(f"{model.__name__}.{name} has no description")
        default = "see below" if field.default_factory else default_of(schema[key].get("default"))
        default = "required" if field.is_required() else default
        rows.append([f"`{prefix}{key}`", type_of(schema[key]), default, escape(field.description)])
        for inner in _models_in(field.annotation) if nested else ():
            rows += rows_of(inner, f"{prefix}{key}.")
    return rows


def entries(kind: type[E]) -> list[E]:
    """The built-in metrics, policies, criteria or samplers."""
    return list(kind.builtin().values())


def cells(entry: Entry) -> list[str]:
    return [f"`{entry.name}`", escape(entry.description)]


def options_of(criterion: Criterion) -> str:
    """A criterion's options with their defaults, and between what they must lie."""
    options = [f"`{key}` {value:g}" for key, value in criterion.options.items()]
    return ", ".join(options + ["between 0 and 1"] * criterion.mixes)


def yes(answer: bool) -> str:
    return "yes" if answer else "no"


def type_of(schema: dict[str, Any]) -> str:
    """A JSON schema in words."""
    if choices := schema.get("anyOf") or schema.get("oneOf"):
        return " or ".join(type_of(choice) for choice in choices)
    if "const" in schema:
        return f"`{schema['const']}`"
    if "enum" in schema:
        return ", ".join(f"`{value}`" for value in schema["enum"])
    if "$ref" in schema or schema.get("type") == "object":
        return "mapping"
    if schema.get("type") == "array":
        return f"list of {type_of(schema['items'])}"
    limits = ", ".join(f"{sign} {schema[key]}" for key, sign in SIGNS.items() if key in schema)
    return f"{WORDS[schema['type']]} {limits}".strip()


def default_of(value: Any) -> str:
    """A default as YAML shows it."""
    match value:
        case dict():
            return "see below" if value else "`{}`"
        case None:
            return "`null`"
        case bool():
            return f"`{str(value).lower()}`"
        case list():
            return f"`[{', '.join(map(str, value))}]`"
    return f"`{value}`"


def commands_text() -> str:
    """A section for each command."""
    sections = []
    for name, command in commands().items():
        shown = [p for p in command.params if p.name != "help"]
        needed = [usage_of(p) for p in shown if is_argument(p) or p.required]
        rows = [
            [
                f"`{usage_of(p)}`" if p.metavar or not getattr(p, "is_flag", False) else flags(p),
                "required" if p.required else "" if p.default in (None, False) else f"`{p.default}`",
                escape(getattr(p, "help", None) or ""),
            ]
            for p in shown
        ]
        usage = f"    selkd {' '.join([name, *needed])} [OPTIONS]"
        listed = table("argument or option | default | meaning", rows)
        sections.append(f"## selkd {name}\n\n{escape(command.help or '')}\n\n{usage}\n\n{listed}")
    return "\n\n".join(sections)


def flags(parameter: Any) -> str:
    """A flag, and what turns it off if there is such a one."""
    return ", ".join(f"`{option}`" for option in [parameter.opts[0], *parameter.secondary_opts])


def commands() -> dict[str, Any]:
    """Every command: ``cache build`` and what Typer makes of it."""

    def below(command: Any, path: str) -> Iterator[tuple[str, Any]]:
        for name, inner in command.commands.items():
            if hasattr(inner, "commands"):
                yield from below(inner, f"{path}{name} ")
            else:
                yield f"{path}{name}", inner

    return dict(below(typer.main.get_command(app), ""))


def is_argument(parameter: Any) -> bool:
    return not parameter.opts[0].startswith("-")


def usage_of(parameter: Any) -> str:
    """``[TEXT]``, ``--layers LAYERS``."""
    name = str(parameter.metavar or parameter.name.upper())
    if not is_argument(parameter):
        return f"{parameter.opts[0]} {name}"
    return name if parameter.required or name.startswith("[") else f"[{name}]"


def table(heads: str, rows: list[list[str]]) -> str:
    names = heads.split(" | ")
    return "\n".join(f"| {' | '.join(row)} |" for row in [names, ["---"] * len(names), *rows])


def escape(text: str) -> str:
    """Text for a cell or a paragraph of Markdown."""
    return re.sub(r"([|<*])", r"\\\1", re.sub(r"\s+", " ", text)).strip()


def first_line(text: str) -> str:
    return escape(text.splitlines()[0].removeprefix("# "))


if __name__ == "__main__":
    for page in PAGES:
        (HERE / page).write_text(filled(page), encoding="utf-8")
