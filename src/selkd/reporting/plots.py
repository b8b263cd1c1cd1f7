"""The plots of one run's page: logged values over the optimiser steps, and the size of its cache."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from matplotlib.axes import Axes
from matplotlib.ticker import MaxNLocator

from selkd.reporting import formats
from selkd.reporting.figure import ACCENT, DASHED, INK, MUTED, Plot, in_percent, lying, one_plot, unit

_MAX_POINTS = 400
_FEW_POINTS = 40


@dataclass(frozen=True)
class Line:
    """Values over the optimiser steps, float64 [N] each; ``label`` names the line at its right end.

    A line to compare with (``is_reference``) is grey and dashed; ``is_marked`` puts a dot on each of its points.
    """

    steps: np.ndarray
    values: np.ndarray
    label: str = ""
    is_reference: bool = False
    is_marked: bool = False


def logged(metrics: Sequence[dict[str, Any]], key: str, label: str = "", is_reference: bool = False) -> Line:
    """The line of what the training log has under ``key``; a long series becomes means over equal blocks."""
    lines = [line for line in metrics if line.get(key) is not None]
    steps = np.array([line["step"] for line in lines], dtype=np.float64)
    values = np.array([line[key] for line in lines], dtype=np.float64)
    if len(lines) > _MAX_POINTS:
        steps, values = (
            np.array([block.mean() for block in np.array_split(series, _MAX_POINTS)]) for series in (steps, values)
        )
    return Line(steps, values, label, is_reference)


def step_plot(
    name: str,
    title: str,
    caption: str,
    measured: str,
    lines: Sequence[Line],
    scale: Literal["number", "share", "agreement"] = "number",
) -> Plot:
    """Lines over the optimiser steps.

    Args:
        measured: what the vertical axis measures, with its unit.
        scale: ``number`` and ``share`` (in percent) begin at zero, so that a small change looks small; ``agreement``
            shows shares near 100%.
    """
    with one_plot() as (figure, axes):
        for line in lines:
            _draw(axes, line)
        named = [line for line in lines if line.label and len(line.values)]
        highest = max(named, key=lambda line: float(line.values[-1]), default=None)
        for line in named:
            _label(axes, line, above=line is highest)
        values = np.concatenate([line.values for line in lines])
        finite = values[np.isfinite(values)]
        top, bottom = (float(finite.max()), float(finite.min())) if len(finite) else (1.0, 0.0)
        if scale == "agreement":
            axes.set_ylim(min(0.9, bottom - 0.02), 1.0 + 0.1 * (1.0 - min(0.9, bottom)))
        else:
            axes.set_ylim(min(0.0, bottom), top * 1.15 if top > 0 else 1.0)  # headroom for the labels
        if scale != "number":
            in_percent(axes)
        axes.xaxis.set_major_locator(MaxNLocator(5, integer=True))
        axes.yaxis.set_major_locator(MaxNLocator(4, steps=[1, 2, 2.5, 5, 10]))
        axes.set_xlabel("optimiser step")
        axes.margins(x=0.02)
        unit(axes, measured)
    return Plot(name, title, caption, figure)


def _draw(axes: Axes, line: Line) -> None:
    if line.is_reference:
        axes.plot(line.steps, line.values, marker="o" if line.is_marked else "", zorder=1.9, **DASHED)
    else:
        marker = "o" if len(line.steps) <= _FEW_POINTS else ""
        style: dict[str, Any] = {"linewidth": 1.8, "markersize": 3.5, "markeredgewidth": 0}
        axes.plot(line.steps, line.values, color=ACCENT, marker=marker, **style)


def _label(axes: Axes, line: Line, above: bool) -> None:
    """Name a line at its right end, so that the plot needs no legend."""
    axes.annotate(
        line.label,
        (line.steps[-1], line.values[-1]),
        (0, 7 if above else -7),
        textcoords="offset points",
        ha="right",
        va="bottom" if above else "top",
        color=MUTED if line.is_reference else ACCENT,
    )


def storage_plot(layouts: Sequence[tuple[str, float]]) -> Plot:
    """Bytes a position under several layouts, this run's first. Dots and not bars, as the axis is logarithmic."""
    with one_plot(height=46 * len(layouts) + 40) as (figure, axes):
        for row, (name, size) in enumerate(layouts):
            colour = ACCENT if row == 0 else MUTED
            beside: dict[str, Any] = {"textcoords": "offset points", "color": INK}
            axes.plot([size], [row], marker="o", markersize=8, color=colour, markeredgewidth=0)
            axes.annotate(name, (0, row), (0, 12), xycoords=("axes fraction", "data"), **beside)
            axes.annotate(formats.bytes_per_position(size), (size, row), (9, 0), va="center", **beside)
        sizes = [size for _, size in layouts]
        axes.set_xscale("log")
        axes.set_xlim(10 ** np.floor(np.log10(min(sizes) / 1.2)), max(sizes) * 30)
        axes.set_ylim(len(layouts) - 0.5, -0.75)
        lying(axes, formats.round_size)
        axes.set_yticks([])
        axes.minorticks_off()
        axes.spines["bottom"].set_visible(False)
    caption = "What it takes to store the teacher’s answer at one position; each gridline is ten times the one before."
    return Plot("storage", "Bytes a position", caption, figure)
