"""What the commands share: options of several of them, and how an answer is printed."""

import json
from pathlib import Path
from typing import Annotated, Any

import typer

RecipeName = Annotated[
    str, typer.Argument(metavar="RECIPE", help="A named recipe (see `selkd recipes`) or a YAML file.")
]
Out = Annotated[Path | None, typer.Option(help="The run's folder; runs/<recipe name> if not given.")]
Overrides = Annotated[
    list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="Override a key: --set positions.fraction=0.1")
]
Json = Annotated[bool, typer.Option("--json", help="Print the answer as JSON to standard output.")]


def quiet() -> None:
    """Silence Transformers' bars for loading and saving; the stages have their own."""
    from transformers.utils import logging

    logging.disable_progress_bar()


def print_answer(answer: dict[str, Any], json_output: bool, empty: str = "") -> None:
    """A small mapping, as JSON or a line a key."""
    if json_output:
        typer.echo(json.dumps(answer, indent=2))
        return
    for key, value in answer.items():
        if isinstance(value, dict | list):
            typer.echo(f"{key}:" if value else f"{key}: {empty}")
            lines = value.items() if isinstance(value, dict) else [("-", entry) for entry in value]
            for name, entry in lines:
                typer.echo(f"  {name} {entry}")
        else:
            typer.echo(f"{key}  {f'{value:,.2f}' if isinstance(value, float) else value}")
