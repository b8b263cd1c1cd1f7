"""The plots of what was selected: samples by their scores, positions by theirs, and how far metrics agree."""

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.patches import Rectangle
from matplotlib.ticker import MaxNLocator

from selkd.reporting.figure import ACCENT, INK, PAPER, QUIET, one_plot, svg, unit


def score_histogram(scores: np.ndarray, kept: np.ndarray, axis_label: str) -> str:
    """How the samples' scores spread, the kept ones coloured, with a line at the cut where there is one.

    scores: float [N], finite; kept: bool [N].
    """
    # A random choice has no cut: kept and left samples lie mixed.
    parted = kept.any() and not kept.all() and scores[kept].min() >= scores[~kept].max()
    cut = float(scores[kept].min()) if parted else None
    with one_plot() as (figure, axes):
        _stacked(axes, scores, kept, _bins(scores, cut))
        if cut is not None:
            axes.axvline(cut, color=INK, linewidth=1)
            axes.annotate(f"cut {cut:.2f}", (cut, 1.0), (5, -2), color=INK, va="top", **_IN_AXES)
        unit(axes, "samples")
        axes.set_xlabel(axis_label)
        return svg(figure, "scores", "Histogram of the samples' scores, kept and left out")


def position_histogram(scores: np.ndarray, selected: np.ndarray, axis_label: str) -> str:
    """How the positions' scores spread, the selected ones coloured. Every sample has its own cut, so there is no line.

    scores: float [N], finite; selected: bool [N].
    """
    with one_plot() as (figure, axes):
        _stacked(axes, scores, selected, _bins(scores, None))
        unit(axes, "positions")
        axes.set_xlabel(axis_label)
        return svg(figure, "positions", "Histogram of the positions' scores, selected and left out")


def overlap_map(names: Sequence[str], overlap: np.ndarray, title: str, name: str) -> str:
    """Which share of the row's choice is in the column's, as a map of numbers: the stronger the colour, the more.

    names: of the M metrics; overlap: float [M, M] in [0, 1], NaN where unknown; name: the plot's own in its page.
    """
    count = len(names)
    with one_plot(height=50 + 24 * count, width=400) as (figure, axes):
        for row in range(count):
            for column in range(count):
                share = float(overlap[row, column])
                is_known = math.isfinite(share)
                depth = 0.06 + 0.84 * min(1.0, max(0.0, share)) if is_known else 0.0
                cell = (column - 0.5, row - 0.5)
                axes.add_patch(Rectangle(cell, 1, 1, facecolor=ACCENT, alpha=depth, linewidth=0))
                axes.add_patch(Rectangle(cell, 1, 1, facecolor="none", edgecolor=PAPER, linewidth=1.5))
                told = f"{100 * share:.0f}" if is_known else "–"
                axes.text(
                    column, row, told, color=PAPER if depth > 0.65 else INK, ha="center", va="center", fontsize=10
                )
        axes.set_xlim(-0.5, count - 0.5)
        axes.set_ylim(count - 0.5, -0.5)
        axes.grid(visible=False)
        axes.xaxis.tick_top()
        axes.set_xticks(range(count), [str(number) for number in range(1, count + 1)])
        axes.set_yticks(range(count), [f"{_short(text)}  {number}" for number, text in enumerate(names, start=1)])
        for spine in axes.spines.values():
            spine.set_visible(False)
        return svg(figure, name, title)


def _short(text: str, room: int = 30) -> str:
    return text if len(text) <= room else text[: room - 1] + "…"


def _stacked(axes: Axes, scores: np.ndarray, chosen: np.ndarray, bins: list[float]) -> None:
    """A histogram with the chosen part coloured, at the foot."""
    below = axes.hist(
        [scores[chosen], scores[~chosen]],
        bins=bins,
        stacked=True,
        color=[ACCENT, QUIET],
        edgecolor=PAPER,
        linewidth=0.8,
    )[0]
    axes.set_ylim(0, float(np.max(below)) * 1.12)
    axes.yaxis.set_major_locator(MaxNLocator(4, integer=True))


_IN_AXES: dict[str, Any] = {"xycoords": ("data", "axes fraction"), "textcoords": "offset points"}


def _bins(scores: np.ndarray, cut: float | None) -> list[float]:
    """Edges of equal bins over the scores; one edge lies on the cut, so that no bin mixes kept and left samples."""
    edges = np.histogram_bin_edges(scores, bins=min(40, max(8, round(np.sqrt(len(scores))))))
    if cut is None:
        return [float(edge) for edge in edges]
    width = float(edges[1] - edges[0])
    left, right = math.ceil((cut - edges[0]) / width), math.floor((edges[-1] - cut) / width) + 1
    return [cut + width * step for step in range(-left, right + 1)]
