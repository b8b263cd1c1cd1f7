"""The plots of one run's page, as SVG text to put inside it."""

from collections.abc import Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.ticker import FuncFormatter, MaxNLocator, PercentFormatter

from selkd.reporting import formats
from selkd.reporting.figure import ACCENT, INK, MUTED, QUIET, one_plot, svg, unit

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


def divergence_plot(metrics: Sequence[dict[str, Any]], held_out: Sequence[tuple[int, float]]) -> str:
    """The divergence at the selected positions of the training text, and KL on held-out text where it was measured.

    held_out: (optimiser step, nats), in step order.
    """
    steps, selected = _series(metrics, "kd_nats")
    points = np.array(held_out, dtype=np.float64).reshape(-1, 2)
    with one_plot() as (figure, axes):
        _line(axes, steps, selected, ACCENT)
        if len(points):
            axes.plot(points[:, 0], points[:, 1], color=MUTED, linewidth=1.2, linestyle=(0, (4, 3)), marker="o")
        ends = [line[-1] for line in (selected, points[:, 1]) if len(line)]
        is_above = len(ends) < 2 or bool(ends[0] >= ends[1])
        _label(axes, steps, selected, "selected, training", ACCENT, above=is_above)
        _label(axes, points[:, 0], points[:, 1], "all, held-out", MUTED, above=not is_above)
        _step_axes(axes, "divergence from the teacher, nats", np.concatenate([selected, points[:, 1]]))
        return svg(figure, "divergence", "Divergence from the teacher, by optimiser step")


def agreement_plot(metrics: Sequence[dict[str, Any]], key: str) -> str:
    """How much of the exact selection the approximate scoring found, over the optimiser steps; shares in [0, 1]."""
    steps, agreed = _series(metrics, key)
    with one_plot() as (figure, axes):
        _line(axes, steps, agreed, ACCENT)
        _step_axes(axes, "of the exact selection", agreed)
        lowest = float(np.nanmin(agreed))
        axes.set_ylim(min(0.9, lowest - 0.02), 1.0 + 0.1 * (1.0 - min(0.9, lowest)))
        axes.yaxis.set_major_formatter(PercentFormatter(1.0, decimals=None))
        return svg(figure, "agreement", "Agreement of approximate with exact selection, by optimiser step")


def share_plot(metrics: Sequence[dict[str, Any]]) -> str:
    """The share of the positions that was selected, over the optimiser steps."""
    steps, selected = _series(metrics, "selected_share")
    with one_plot() as (figure, axes):
        _line(axes, steps, selected, ACCENT)
        _step_axes(axes, "selected positions", selected)
        axes.yaxis.set_major_formatter(PercentFormatter(1.0, decimals=None))
        return svg(figure, "share", "Share of positions selected, by optimiser step")


_LEFT: dict[str, Any] = {"xycoords": ("axes fraction", "data"), "textcoords": "offset points"}


def storage_plot(layouts: Sequence[tuple[str, float]]) -> str:
    """Bytes a position under several layouts, first this run's. A logarithmic axis, so dots and not bars."""
    with one_plot(height=46 * len(layouts) + 40) as (figure, axes):
        for row, (name, size) in enumerate(layouts):
            colour = ACCENT if row == 0 else MUTED
            axes.plot([size], [row], marker="o", markersize=8, color=colour, markeredgewidth=0)
            axes.annotate(name, (0, row), (0, 12), color=INK, **_LEFT)
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
