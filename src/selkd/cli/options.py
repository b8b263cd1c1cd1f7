"""Options that several commands share, and the printing of answers."""

import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from typer import Argument, Option

from selkd.errors import InputError

if TYPE_CHECKING:  # a quick ``--help`` loads no recipe
    from selkd.recipe.recipe import Recipe


def named_recipe(incomplete: str) -> list[str]:
    """The named recipes that a shell offers for the beginning of a name; it offers files by itself."""
    from selkd.recipe.files import named_recipes

    return [name for name in named_recipes() if name.startswith(incomplete)]


RecipeName = Annotated[
    str,
    Argument(
        metavar="RECIPE", autocompletion=named_recipe, help="A named recipe (see `selkd recipes`) or a YAML file."
    ),
]


def possible(given: Any) -> Any:
    """Refuse a path, or one of several, that no file can have, before anything is looked for."""
    from selkd.files import possible_path

    for path in given if isinstance(given, list) else [given] if given is not None else []:
        try:
            possible_path(str(path))
        except ValueError as error:
            raise typer.BadParameter(str(error)) from None
    return given


Out = Annotated[
    Path | None,
    Option(callback=possible, help="The run's folder, after which it is called; runs/<recipe name> if not given."),
]
Overrides = Annotated[
    list[str] | None, Option("--set", metavar="KEY=VALUE", help="Override a key, as in --set positions.fraction=0.1.")
]
MaxHours = Annotated[
    float | None,
    Option(metavar="HOURS", help="Save and end after so many hours, with exit code 75; the same command continues."),
]
NoPlugins = Annotated[
    bool,
    Option("--no-plugins", help="Refuse a recipe that names code to run (module:function)."),
]
Markdown = Annotated[bool, typer.Option("--markdown", help="Print the table as Markdown, for a README.")]
Json = Annotated[bool, Option("--json", help="Print the answer as JSON to standard output.")]


def quiet() -> None:
    """Silence Transformers' progress bars of loading and saving; the stages have their own."""
    from transformers.utils import logging

    logging.disable_progress_bar()


@contextmanager
def own_code(no_plugins: bool) -> Iterator[None]:
    """Name the user's own code that a recipe runs on standard error, before it is imported; or refuse it."""
    from selkd.own_code import gated

    told: set[str] = set()

    def gate(key: str, name: str) -> bool:
        if no_plugins:
            raise ValueError(f"{name!r} is code to run, and --no-plugins refuses it")
        if name not in told and os.environ.get("RANK", "0") == "0":
            typer.echo(f"selkd: {key} runs your own code, {name if name.isprintable() else repr(name)}", err=True)
        told.add(name)
        return True

    with gated(gate):
        yield


def read(recipe: str, overrides: list[str] | None, no_plugins: bool = False) -> "Recipe":
    """Read the recipe of a command. One that is refused is so before torch is imported."""
    from selkd.recipe.files import load_recipe

    with own_code(no_plugins):
        return load_recipe(recipe, overrides)


def load(recipe: str, overrides: list[str] | None, no_plugins: bool = False) -> "Recipe":
    """``read`` the recipe of a command that runs models."""
    loaded = read(recipe, overrides, no_plugins)
    require_packages(loaded)
    quiet()
    return loaded


def require_packages(recipe: "Recipe") -> None:
    """Raises InputError for a missing package that the training needs, before torch is imported."""
    from selkd.recipe.packages import check_packages

    try:
        check_packages(recipe.training)
    except ValueError as error:
        raise InputError(f"training.{error}") from None


def limited(overrides: list[str] | None, max_hours: float | None) -> list[str]:
    """The overrides with ``--max-hours`` among them, which is the key ``run.max_hours``."""
    return [*(overrides or []), *([] if max_hours is None else [f"run.max_hours={max_hours}"])]


def print_json(answer: object) -> None:
    """Print the answer of a command with ``--json``."""
    typer.echo(json.dumps(answer, indent=2))


def print_groups(groups: dict[str, dict[str, str]]) -> None:
    """Print names with a line on each below the titles of their groups, wrapped to the terminal's width."""
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    console = Console()
    widest = max(len(name) for group in groups.values() for name in group)
    for title, group in groups.items():
        table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), show_header=False)
        table.add_column(min_width=widest + 2, no_wrap=True)
        table.add_column()
        for name, line in group.items():
            table.add_row(f"  {name}", Text(line))
        console.print(Text(title, style="bold"), table, sep="\n")


def print_answer(answer: dict[str, Any], json_output: bool, empty: str = "") -> None:
    """Print a small mapping as JSON, or one line for each key; ``empty`` stands for a list without entries."""
    if json_output:
        print_json(answer)
        return
    for key, value in answer.items():
        if isinstance(value, dict | list):
            typer.echo(f"{key}:" if value else f"{key}: {empty}")
            lines = value.items() if isinstance(value, dict) else [("-", entry) for entry in value]
            for name, entry in lines:
                typer.echo(f"  {name} {entry}")
        else:
            typer.echo(f"{key}  {f'{value:,.2f}' if isinstance(value, float) else value}")
