"""The plots of what was selected: histograms of the scores, and how far metrics agree."""

import math
from typing import Literal

import numpy as np
from matplotlib.patches import Rectangle
from matplotlib.ticker import MaxNLocator

from selkd.reporting.figure import ACCENT, INK, PAPER, QUIET, Plot, one_plot, unit
from selkd.reporting.run_files import Overlap

Scored = Literal["samples", "positions"]


def score_histogram(what: Scored, caption: str, scores: np.ndarray, chosen: np.ndarray, axis_label: str) -> Plot:
    """A histogram of scores, the chosen ones coloured; of samples also with a line at the cut, if there is one.

    Among positions every sample has its own cut, so there is no line.

    Args:
        scores: float [N], finite.
        chosen: bool [N].
    """
    # A random choice has no cut: kept and dropped samples lie mixed.
    is_separated = chosen.any() and not chosen.all() and scores[chosen].min() >= scores[~chosen].max()
    cut = float(scores[chosen].min()) if what == "samples" and is_separated else None
    with one_plot() as (figure, axes):
        heights = axes.hist(
            [scores[chosen], scores[~chosen]],
            bins=_bins(scores, cut),
            stacked=True,
            color=[ACCENT, QUIET],
            edgecolor=PAPER,
            linewidth=0.8,
        )[0]
        axes.set_ylim(0, float(np.max(heights)) * 1.12)
        axes.yaxis.set_major_locator(MaxNLocator(4, integer=True))
        if cut is not None:
            at_top = ("data", "axes fraction")
            axes.axvline(cut, color=INK, linewidth=1)
            axes.annotate(
                f"cut {cut:.2f}", (cut, 1.0), (5, -2), at_top, textcoords="offset points", color=INK, va="top"
            )
        unit(axes, what)
        axes.set_xlabel(axis_label)
    return Plot(f"scores-of-{what}", f"Scores of the {what}", caption, figure)


def overlap_map(what: Scored, title: str, overlap: Overlap) -> Plot:
    """A map of the shares of the row's choice that are in the column's: the stronger the colour, the larger."""
    count = len(overlap.metrics)
    with one_plot(height=50 + 24 * count, width=400) as (figure, axes):
        for (row, column), share in np.ndenumerate(overlap.overlap):
            is_known = math.isfinite(share)
            depth = 0.06 + 0.84 * min(1.0, max(0.0, share)) if is_known else 0.0
            cell = (column - 0.5, row - 0.5)
            axes.add_patch(Rectangle(cell, 1, 1, facecolor=ACCENT, alpha=depth, linewidth=0))
            axes.add_patch(Rectangle(cell, 1, 1, facecolor="none", edgecolor=PAPER, linewidth=1.5))
            text, colour = f"{100 * share:.0f}" if is_known else "–", PAPER if depth > 0.65 else INK
            axes.text(column, row, text, color=colour, ha="center", va="center", fontsize=10)
        names = [name if len(name) <= 30 else name[:29] + "…" for name in overlap.metrics]
        axes.set_xlim(-0.5, count - 0.5)
        axes.set_ylim(count - 0.5, -0.5)
        axes.grid(visible=False)
        axes.xaxis.tick_top()
        axes.set_xticks(range(count), [str(number) for number in range(1, count + 1)])
        axes.set_yticks(range(count), [f"{name}  {number}" for number, name in enumerate(names, start=1)])
        axes.spines[:].set_visible(False)
    caption = f"Which percent of the {what} that the metric of the row chooses the metric of the column chooses too."
    return Plot(f"overlap-{what}", f"{title}: how far they agree", caption, figure)


def _bins(scores: np.ndarray, cut: float | None) -> list[float]:
    """Edges of equal bins over the scores; one edge is the cut, so that no bin mixes kept and dropped samples."""
    edges = np.histogram_bin_edges(scores, bins=min(40, max(8, round(np.sqrt(len(scores))))))
    if cut is None:
        return [float(edge) for edge in edges]
    width = float(edges[1] - edges[0])
    left, right = math.ceil((cut - edges[0]) / width), math.floor((edges[-1] - cut) / width) + 1
    return [cut + width * step for step in range(-left, right + 1)]
