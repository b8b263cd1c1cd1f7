"""Prints the answer of ``selkd bench`` in the terminal."""

from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table


def print_table(answer: dict[str, Any], trace: Path | None) -> None:
    """Print the table, the notes and, if there is one, where the plot of memory over time is."""
    console = Console()
    console.print(bench_table(answer))
    for note in answer["notes"]:
        console.print(note, highlight=False, markup=False)
    if trace is not None:
        console.print(f"memory over time  {trace / 'memory.svg'}", soft_wrap=True, highlight=False)


def bench_table(answer: dict[str, Any]) -> Table:
    """One row for each variant: seconds, ratio to the floor, its range, memory above the floor, agreement."""
    shape = answer["shape"]
    title = f"{answer['device']}; {answer['precision']}; B = {shape['batch']}, T = {shape['length']}"
    table = Table(title=title, title_justify="left", box=None, pad_edge=False)
    table.add_column("variant", no_wrap=True)
    for heading in ("seconds", "x floor", "range", "peak above floor", "agreement"):
        table.add_column(heading, justify="right")
    floor = answer["floor_seconds"]
    for variant in answer["variants"]:
        low, high = (seconds / floor for seconds in variant["seconds_range"])
        peak, agreement = variant["peak_bytes_above_floor"], variant["selection_agreement"]
        table.add_row(
            variant["name"],
            f"{variant['seconds']:.3f}",
            f"{variant['ratio_to_floor']:.2f}",
            f"{low:.2f} to {high:.2f}",
            "" if peak is None else f"{peak / 1e9:+.2f} GB",
            "" if agreement is None else f"{agreement:.1%}",
        )
    return table
