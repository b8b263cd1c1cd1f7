"""``selkd verify``: whether a run is whole."""

from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer

from selkd.cli.options import Json, possible, print_answer


def verify(
    run: Annotated[
        Path, typer.Argument(callback=possible, metavar="RUN", help="The folder that `selkd distill` wrote.")
    ],
    json_output: Json = False,
) -> None:
    """Read every byte of a run, and name what is damaged or missing. The exit code is 1 if anything is."""
    from selkd.sealed import require_begun

    require_begun(run)  # before torch is imported
    from selkd.run.verify import verify_run

    checked = verify_run(run)
    print_answer(asdict(checked), json_output, empty="none")
    if checked.problems:
        raise typer.Exit(1)
