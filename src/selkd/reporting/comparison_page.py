"""The report of several runs: a folder with the page, the tables and the plots as pictures."""

import json
from pathlib import Path
from typing import Any

from selkd.errors import InputError, RunError
from selkd.files import replacing
from selkd.reporting import comparison_tables as tables
from selkd.reporting import formats, rendering
from selkd.reporting.comparison import RunComparison
from selkd.reporting.figure import Plot, can_draw, no_plots
from selkd.reporting.rendering import write_text

PAGE, TABLE = "report.html", "table.json"


def write_comparison(comparison: RunComparison, out: Path, title: str) -> dict[str, Any]:
    """Write ``report.html``, ``table.md``, ``table.csv``, ``table.json``, ``runs.csv`` and ``plots/`` into ``out``.

    Returns:
        The content of ``table.json``.

    Raises:
        InputError: ``out`` holds something that is no report of several runs; nothing is changed.
        RunError: a file can't be written.
    """
    _claim(out)
    content = tables.as_json(comparison)
    plots = _plots(comparison)
    write_text(out / TABLE, json.dumps(content, indent=1) + "\n")
    write_text(out / "table.md", tables.as_markdown(comparison))
    write_text(out / "table.csv", tables.as_csv(comparison))
    write_text(out / "runs.csv", tables.runs_as_csv(comparison))
    for plot in plots:
        for name, picture in plot.pictures().items():
            with replacing(out / "plots" / name) as file:
                file.write(picture)
    write_text(out / PAGE, render(comparison, title, plots))
    return content


def _plots(comparison: RunComparison) -> list[Plot]:
    """The plots; none without matplotlib, which the page then says."""
    if not can_draw():
        return []
    from selkd.reporting.comparison_plots import comparison_plots

    return comparison_plots(comparison)


def render(comparison: RunComparison, title: str, plots: list[Plot]) -> str:
    """Fill the page's template."""
    return rendering.render(
        "comparison.html.j2",
        title=title,
        n_runs=sum(len(group.members) for group in comparison.groups),
        comparison=comparison,
        cells={group.name: tables.cells(comparison, group) for group in comparison.groups},
        plots=plots,
        no_plots=no_plots(),
        keys=_different_keys(comparison),
        notes=[*tables.legend(comparison), *tables.not_compared(comparison)],
    )


def _different_keys(comparison: RunComparison) -> dict[str, list[str]]:
    """The keys in which the recipes differ: key -> the value in each recipe."""
    flat = [_flat(group.recipe) for group in comparison.groups]
    keys = dict.fromkeys(key for recipe in flat for key in recipe)
    values = {key: [_as_text(recipe.get(key)) for recipe in flat] for key in keys}
    return {key: texts for key, texts in values.items() if len(set(texts)) > 1}


def _flat(tree: Any, key: str = "") -> dict[str, Any]:
    if not isinstance(tree, dict) or not tree:
        return {key: tree}
    leaves: dict[str, Any] = {}
    for name, branch in tree.items():
        leaves |= _flat(branch, f"{key}.{name}" if key else str(name))
    return leaves


def _as_text(value: Any) -> str:
    return formats.DASH if value is None else value if isinstance(value, str) else json.dumps(value)


def _claim(out: Path) -> None:
    if out.exists() and (not out.is_dir() or (any(out.iterdir()) and not (out / TABLE).exists())):
        raise InputError(
            f"{out}: not a report of several runs (no {TABLE}) and not empty. Give another --out; nothing was changed."
        )
    try:
        (out / "plots").mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise RunError(f"{out}: can't be made ({error}). Give another --out.") from None
