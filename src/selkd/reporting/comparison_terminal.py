"""A comparison as tables for the terminal: as many columns beside each other as its width has room for."""

from collections.abc import Iterator, Sequence

from rich.console import Console
from rich.table import Table
from rich.text import Text

from selkd.reporting.comparison import RunComparison
from selkd.reporting.comparison_tables import cells, legend, not_compared
from selkd.reporting.differences import difference_in_kl
from selkd.reporting.formats import counted, nats, signed
from selkd.reporting.measures import KL

_NAME, _GAP = 34, 2  # the widest name of a recipe on one line, and the room between columns
_HEADING = 14  # the room that a heading gets even where its figures are narrower


def print_comparison(console: Console, comparison: RunComparison) -> None:
    """Print the recipes with their figures, and beneath each the paired difference to the baseline."""
    rows = {group.name: cells(comparison, group) for group in comparison.groups}
    names = {group.name: f"{group.name} ({counted(len(group.members), 'seed')})" for group in comparison.groups}
    first = min(_NAME, max(map(len, names.values())))
    widths = [
        max(_widest(measure.name), *(max(len(mean), len(difference)) for mean, difference in column))
        for measure, column in zip(comparison.measures, zip(*rows.values(), strict=True), strict=True)
    ]
    for block in _blocks(widths, console.width - first - _GAP):
        table = Table(box=None, pad_edge=False, padding=(0, _GAP, 0, 0), header_style="bold")
        table.add_column("", width=first, overflow="fold")
        for index in block:
            table.add_column(Text(comparison.measures[index].name), justify="right", width=widths[index])
        for name, figures in rows.items():
            shown = [_cell(*figures[index]) for index in block]
            style = "bold" if name == comparison.baseline else ""
            table.add_row(Text(names[name], style=style), *shown)
        console.print(table)
        console.print()
    for sentence in _sentences(comparison):
        console.print(sentence, highlight=False, markup=False, style="dim")
    for name, why in comparison.failed.items():  # the terminal wraps these, as a path is to be copied whole
        console.print(f"Failed: {name} ({why}).", highlight=False, markup=False, soft_wrap=True)


def _widest(name: str) -> int:
    """The room for a heading, which may be broken between words."""
    return max(*map(len, name.split()), min(len(name), _HEADING))


def _cell(mean: str, difference: str) -> Text:
    return Text.assemble(mean, *([("\n" + difference, "dim")] if difference else []))


def _blocks(widths: Sequence[int], room: int) -> Iterator[list[int]]:
    """The columns in order, as many in a block as fit beside the names; one at least."""
    block: list[int] = []
    for index, width in enumerate(widths):
        if block and sum(widths[i] + _GAP for i in block) + width + _GAP > room:
            yield block
            block = []
        block.append(index)
    if block:
        yield block


def _sentences(comparison: RunComparison) -> Iterator[str]:
    yield "Mean ± deviation over seeds."
    if comparison.baseline is not None and len(comparison.groups) > 1:
        yield f"Beneath: the difference to {comparison.baseline}, paired seed by seed."
    for group in comparison.groups:
        row = difference_in_kl(comparison, group)
        if row is not None:
            span = f"95% interval {signed(row.low, nats)} to {signed(row.high, nats)} over {row.over}"
            told = "" if row.is_clear else "; it can't be told apart from none"
            yield f"{group.name}, {KL.name}: {signed(row.mean, nats)}, {span}{told}."
    yield from legend(comparison)
    yield from not_compared(comparison)
