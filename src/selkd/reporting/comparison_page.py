"""The report of several runs: a folder with the page, the tables and the plots as pictures."""

import json
from pathlib import Path
from typing import Any

from selkd.errors import InputError, RunError
from selkd.reporting import comparison as tables
from selkd.reporting import figure, formats
from selkd.reporting.comparison import Comparison
from selkd.reporting.comparison_plots import Plot, comparison_plots
from selkd.reporting.page import template, write_bytes, write_text

PAGE, TABLE = "report.html", "table.json"


def write_comparison(comparison: Comparison, out: Path, title: str) -> dict[str, Any]:
    """Write ``report.html``, ``table.md``, ``table.csv``, ``table.json``, ``runs.csv`` and ``plots/`` into ``out``.

    Returns:
        What ``table.json`` holds.

    Raises:
        InputError: ``out`` holds something that is no such report; nothing is changed.
        RunError: the disk refused.
    """
    _claim(out)
    content = tables.as_json(comparison)
    plots = comparison_plots(comparison)
    write_text(out / TABLE, json.dumps(content, indent=1) + "\n")
    write_text(out / "table.md", tables.as_markdown(comparison))
    write_text(out / "table.csv", tables.as_csv(comparison))
    write_text(out / "runs.csv", tables.runs_as_csv(comparison))
    for plot in plots:
        with plot.drawn() as drawn:
            png, svg = figure.pictures(drawn, plot.name)
        write_bytes(out / "plots" / f"{plot.name}.png", png)
        write_bytes(out / "plots" / f"{plot.name}.svg", svg)
    write_text(out / PAGE, render(comparison, title, plots))
    return content


def render(comparison: Comparison, title: str, plots: list[Plot]) -> str:
    """The page's HTML."""
    measures = comparison.measures
    rows = [
        {
            "name": group.name,
            "seeds": ", ".join(str(member.seed) for member in group.members),
            "is_baseline": group.name == comparison.baseline,
            "cells": [
                (
                    tables.cell(group.summary(measure), measure),
                    tables.difference_cell(comparison.difference(group, measure), measure),
                )
                for measure in measures
            ],
        }
        for group in comparison.groups
    ]
    drawn = []
    for plot in plots:
        with plot.drawn() as made:
            drawn.append({"title": plot.title, "caption": plot.caption, "svg": figure.svg(made, plot.name, plot.title)})
    return template("comparison.html.j2").render(
        title=title,
        n_runs=sum(len(group.members) for group in comparison.groups),
        baseline=comparison.baseline,
        measures=[measure.name for measure in measures],
        rows=rows,
        plots=drawn,
        keys=_different_keys(comparison),
        failed=comparison.failed,
        text={"levels": 1},
        dash=formats.DASH,
    )


def _different_keys(comparison: Comparison) -> list[dict[str, Any]]:
    """The recipes' keys whose values differ between them: key, and the value of each recipe."""
    flat = [_flat(group.recipe) for group in comparison.groups]
    names = dict.fromkeys(name for recipe in flat for name in recipe)
    return [
        {"key": name, "values": [_told(recipe.get(name)) for recipe in flat]}
        for name in names
        if len({_told(recipe.get(name)) for recipe in flat}) > 1
    ]


def _flat(tree: Any, key: str = "") -> dict[str, Any]:
    if not isinstance(tree, dict) or not tree:
        return {key: tree}
    found: dict[str, Any] = {}
    for name, branch in tree.items():
        found |= _flat(branch, f"{key}.{name}" if key else str(name))
    return found


def _told(value: Any) -> str:
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
