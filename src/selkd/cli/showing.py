"""What commands print of runs: the closing table of one or several, and recipes side by side."""

from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer

from selkd.cli.options import print_json

if TYPE_CHECKING:
    from selkd.reporting.comparison import RunComparison


def show_comparison(comparison: "RunComparison", page: Path, markdown: bool) -> None:
    """Print several runs as tables that fit the terminal, or as Markdown, and where their page is."""
    if markdown:
        from selkd.reporting.comparison_tables import as_markdown

        typer.echo(f"{as_markdown(comparison)}\nreport  {page}")
        return
    from rich.console import Console

    from selkd.reporting.comparison_terminal import print_comparison

    console = Console()
    print_comparison(console, comparison)
    console.print(f"report  {page}", soft_wrap=True, highlight=False, markup=False)


def show_runs(runs: list[Any], json_output: bool) -> None:
    """Print the closing table of one run or several, and where their students and pages are."""
    records = [run.record for run in runs]
    if json_output:
        print_json(records[0] if len(records) == 1 else records)
        return
    from rich.console import Console

    from selkd.reporting.benchmarks import cut
    from selkd.reporting.tables import fidelity_table

    console = Console()
    console.print(fidelity_table(records))
    for run in runs:
        for sentence in cut(run.record):
            console.print(sentence, highlight=False, markup=False)
        console.print(f"student {run.student}   report {run.path / 'report.html'}", soft_wrap=True, highlight=False)
