"""The plots of one run's page, as SVG text to put inside it."""

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.ticker import FuncFormatter, MaxNLocator, PercentFormatter

from selkd.reporting import formats
from selkd.reporting.figure import ACCENT, INK, MUTED, PAPER, QUIET, one_plot, svg, unit

_MAX_POINTS = 400


def loss_plot(metrics: Sequence[dict[str, Any]]) -> str:
    """The training loss over the optimiser steps."""
    steps, loss = _series(metrics, "loss")
    with one_plot() as (figure, axes):
        _line(axes, steps, loss, ACCENT)
        _step_axes(axes, "loss", loss)
        return svg(figure, "loss", "Training loss by optimiser step")


def entropy_plot(metrics: Sequence[dict[str, Any]]) -> str:
    """The mean entropy of the selected positions beside that of all positions."""
    steps, selected = _series(metrics, "selected_entropy_nats")
    all_steps, mean = _series(metrics, "mean_entropy_nats")
    with one_plot() as (figure, axes):
        _line(axes, all_steps, mean, QUIET, dashed=True)
        _line(axes, steps, selected, ACCENT)
        selected_above = not (len(selected) and len(mean)) or bool(selected[-1] >= mean[-1])
        _label(axes, steps, selected, "selected", ACCENT, above=selected_above)
        _label(axes, all_steps, mean, "all positions", MUTED, above=not selected_above)
        _step_axes(axes, "student's entropy, nats", np.concatenate([selected, mean]))
        return svg(figure, "entropy", "Mean entropy of the selected positions and of all positions, by optimiser step")


def share_plot(metrics: Sequence[dict[str, Any]]) -> str:
    """The share of the positions that was selected, over the optimiser steps."""
    steps, selected = _series(metrics, "selected_share")
    with one_plot() as (figure, axes):
        _line(axes, steps, selected, ACCENT)
        _step_axes(axes, "selected positions", selected)
        axes.yaxis.set_major_formatter(PercentFormatter(1.0, decimals=None))
        return svg(figure, "share", "Share of positions selected, by optimiser step")


def score_histogram(scores: np.ndarray, kept: np.ndarray, axis_label: str) -> str:
    """How the samples' scores spread, the kept ones coloured, with a line at the cut where there is one.

    scores: float [N], finite; kept: bool [N].
    """
    # A random choice has no cut: kept and left samples lie mixed.
    parted = kept.any() and not kept.all() and scores[kept].min() >= scores[~kept].max()
    cut = float(scores[kept].min()) if parted else None
    with one_plot() as (figure, axes):
        below = axes.hist(
            [scores[kept], scores[~kept]],
            bins=_bins(scores, cut),
            stacked=True,
            color=[ACCENT, QUIET],
            edgecolor=PAPER,
            linewidth=0.8,
        )[0]
        tallest = float(np.max(below))
        if cut is not None:
            axes.axvline(cut, color=INK, linewidth=1)
            axes.annotate(f"cut {cut:.2f}", (cut, 1.0), (5, -2), color=INK, va="top", **_IN_AXES)
        axes.set_ylim(0, tallest * 1.12)
        axes.yaxis.set_major_locator(MaxNLocator(4, integer=True))
        unit(axes, "samples")
        axes.set_xlabel(axis_label)
        return svg(figure, "scores", "Histogram of the samples' scores, kept and left out")


def storage_plot(layouts: Sequence[tuple[str, float]]) -> str:
    """Bytes a position under several layouts, first this run's. A logarithmic axis, so dots and not bars."""
    with one_plot(height=46 * len(layouts) + 40) as (figure, axes):
        for row, (name, size) in enumerate(layouts):
            colour = ACCENT if row == 0 else MUTED
            axes.plot([size], [row], marker="o", markersize=8, color=colour, markeredgewidth=0)
            axes.annotate(name, (0, row), (0, 12), color=INK, **(_IN_AXES | {"xycoords": ("axes fraction", "data")}))
            text = formats.bytes_per_position(size)
            axes.annotate(text, (size, row), (9, 0), color=INK, va="center", textcoords="offset points")
        sizes = [size for _, size in layouts]
        axes.set_xscale("log")
        axes.set_xlim(10 ** np.floor(np.log10(min(sizes) / 1.2)), max(sizes) * 30)
        axes.set_ylim(len(layouts) - 0.5, -0.75)
        axes.grid(visible=False, axis="y")
        axes.grid(visible=True, axis="x")
        axes.set_yticks([])
        axes.minorticks_off()
        axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: formats.round_size(value)))
        axes.spines["bottom"].set_visible(False)
        return svg(figure, "storage", "Bytes stored a position, on a logarithmic axis")


_IN_AXES: dict[str, Any] = {"xycoords": ("data", "axes fraction"), "textcoords": "offset points"}


def _bins(scores: np.ndarray, cut: float | None) -> list[float]:
    """Edges of equal bins over the scores; one edge lies on the cut, so that no bin mixes kept and left samples."""
    edges = np.histogram_bin_edges(scores, bins=min(40, max(8, round(np.sqrt(len(scores))))))
    if cut is None:
        return [float(edge) for edge in edges]
    width = float(edges[1] - edges[0])
    left, right = math.ceil((cut - edges[0]) / width), math.floor((edges[-1] - cut) / width) + 1
    return [cut + width * step for step in range(-left, right + 1)]


def _series(metrics: Sequence[dict[str, Any]], key: str) -> tuple[np.ndarray, np.ndarray]:
    """(steps, values) of the lines that have the key; long series as means over equal blocks of lines."""
    lines = [line for line in metrics if line.get(key) is not None]
    steps = np.array([line["step"] for line in lines], dtype=np.float64)
    values = np.array([line[key] for line in lines], dtype=np.float64)
    if len(lines) <= _MAX_POINTS:
        return steps, values
    blocks = np.array_split(np.arange(len(lines)), _MAX_POINTS)
    return np.array([steps[block].mean() for block in blocks]), np.array([values[block].mean() for block in blocks])


def _line(axes: Axes, steps: np.ndarray, values: np.ndarray, colour: str, dashed: bool = False) -> None:
    # The quiet grey is too faint for a thin line: a dashed line takes the text's grey.
    axes.plot(
        steps,
        values,
        color=MUTED if dashed else colour,
        linewidth=1.2 if dashed else 1.8,
        linestyle=(0, (4, 3)) if dashed else "-",
        marker="o" if len(steps) <= 40 and not dashed else "",
        markersize=3.5,
        markeredgewidth=0,
    )


def _label(axes: Axes, steps: np.ndarray, values: np.ndarray, text: str, colour: str, above: bool) -> None:
    """Name a line at its right end, which spares the reader a legend."""
    if len(steps):
        at, gap = (steps[-1], values[-1]), (0, 7) if above else (0, -7)
        va = "bottom" if above else "top"
        axes.annotate(text, at, gap, textcoords="offset points", ha="right", va=va, color=colour)


def _step_axes(axes: Axes, measured: str, values: np.ndarray) -> None:
    finite = values[np.isfinite(values)]
    highest, lowest = (float(finite.max()), float(finite.min())) if len(finite) else (1.0, 0.0)
    # From zero, so that a small change looks small; headroom for the labels.
    axes.set_ylim(min(0.0, lowest), highest * 1.15 if highest > 0 else 1.0)
    axes.xaxis.set_major_locator(MaxNLocator(5, integer=True))
    axes.yaxis.set_major_locator(MaxNLocator(4, steps=[1, 2, 2.5, 5, 10]))
    axes.set_xlabel("optimiser step")
    axes.margins(x=0.02)
    unit(axes, measured)
