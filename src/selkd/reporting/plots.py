"""The plots of one run's page: logged values by step, histograms of scores, overlaps of metrics, the cache's size."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from matplotlib.axes import Axes
from matplotlib.patches import Rectangle
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator

from selkd.reporting import formats
from selkd.reporting.figure import (
    ACCENT,
    DASHED,
    INK,
    MUTED,
    PAPER,
    QUIET,
    Plot,
    in_percent,
    lying,
    one_plot,
    tip,
    unit,
)
from selkd.reporting.run_files import Overlap

Side = Literal["left", "center", "right"]
Scored = Literal["samples", "positions"]

_MAX_POINTS = 400
_FEW_POINTS = 40
_FIDELITY_WIDTH = 380
_STOPS = 5  # points of a line that the keyboard reaches


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
        form = formats.percent if scale != "number" else formats.nats
        for line in lines:
            _tips(axes, line, form)
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


def _tips(axes: Axes, line: Line, form: formats.Form) -> None:
    """The values of some points, the first and the last among them, for pointer and keyboard."""
    shown = np.unique(np.linspace(0, len(line.steps) - 1, min(len(line.steps), _FEW_POINTS)).astype(int))
    stops = set(shown[np.unique(np.linspace(0, len(shown) - 1, min(len(shown), _STOPS)).astype(int))].tolist())
    for index in shown.tolist():
        x, y = float(line.steps[index]), float(line.values[index])
        if np.isfinite(y):
            name = f"{line.label}, " if line.label else ""
            tip(axes, x, y, f"{name}step {formats.count(x)}: {form(y)}", is_stop=index in stops)


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
        bbox={"facecolor": PAPER, "edgecolor": "none", "pad": 0.6, "alpha": 0.85},
    )


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


def by_entropy_plot(before: Sequence[dict[str, Any]], after: Sequence[dict[str, Any]]) -> Plot:
    """KL before and after training by the teacher's entropy, a row a bucket that has positions."""
    rows = [(old, new) for old, new in zip(before, after, strict=True) if old["positions"] and new["positions"]]
    total = sum(old["positions"] for old, _ in rows)
    highest = max(max(old["kl_nats"], new["kl_nats"]) for old, new in rows) or 1.0
    with one_plot(height=64 + 34 * len(rows), width=_FIDELITY_WIDTH) as (figure, axes):
        names = []
        for row, (old, new) in enumerate(rows):
            start, end = old["kl_nats"], new["kl_nats"]
            axes.plot([start, end], [row, row], color=QUIET, linewidth=2, zorder=1.8)
            axes.plot([start], [row], marker="o", markersize=7, color=MUTED, markerfacecolor=PAPER, markeredgewidth=1.4)
            axes.plot([end], [row], marker="o", markersize=7.5, color=ACCENT, markeredgewidth=0)
            if row == 0:
                sides = _apart(start, end, near=0.15 * highest)
                for x, text, colour, side in ((start, "before", MUTED, sides[0]), (end, "after", ACCENT, sides[1])):
                    axes.annotate(text, (x, row), (0, 8), textcoords="offset points", ha=side, color=colour)
            low, high = old["from_nats"], old["to_nats"]
            name = f"below {high:g}" if not low else f"{low:g} to {high:g}" if high is not None else f"from {low:g}"
            share = formats.percent(old["positions"] / total, 0)
            names.append(name)
            axes.annotate(share, (1.0, row), (6, 0), ("axes fraction", "data"), textcoords="offset points", va="center")
            told = f"{formats.nats(start)} → {formats.nats(end)} nats, {formats.counted(old['positions'], 'position')}"
            tip(axes, (start + end) / 2, row, told)
        axes.set_yticks(range(len(rows)), names)
        axes.set_ylim(len(rows) - 0.5, -0.75)
        axes.set_xlim(0, 1.06 * highest)
        lying(axes, formats.nats)
        axes.xaxis.set_major_locator(MaxNLocator(5))
        axes.set_xlabel("KL to the teacher, nats a position")
        unit(axes, "teacher’s entropy, nats")
    caption = (
        "Every held-out position, by how undecided the teacher is there; at the right the share of the positions. The "
        "shorter the way left to zero, the nearer the student is."
    )
    return Plot("by-entropy", "Where it came nearer", caption, figure)


def distances_plot(before: np.ndarray, after: np.ndarray, measured: str) -> Plot:
    """How many positions lie how far from the teacher, before and after training: two outlines over equal ratios."""
    lowest = max(1e-3, float(np.percentile(np.concatenate([before, after]), 2)))
    highest = max(2 * lowest, float(np.max([before.max(), after.max()])))
    edges = np.geomspace(lowest, highest, 19)
    with one_plot(height=264, width=_FIDELITY_WIDTH) as (figure, axes):
        counts = [np.histogram(np.clip(values, lowest, highest), edges)[0] for values in (before, after)]
        sides = _apart(int(np.argmax(counts[0])), int(np.argmax(counts[1])), near=3)
        rows = zip((before, after), ("before", "after"), (MUTED, ACCENT), counts, sides, strict=True)
        for values, label, colour, heights, side in rows:
            shares = heights / len(values)
            axes.stairs(shares, edges, color=colour, fill=True, alpha=0.12)
            axes.stairs(shares, edges, color=colour, linewidth=1.8, linestyle="-" if label == "after" else (0, (4, 3)))
            median = float(np.median(values))
            at = int(np.argmax(shares))
            place = (float(np.sqrt(edges[at] * edges[at + 1])), float(shares[at]))
            axes.annotate(label, place, (0, 6), textcoords="offset points", ha=side, color=colour)
            tip(axes, *place, f"{label}: median {formats.nats(median)} nats")
        axes.set_xscale("log")
        axes.xaxis.set_major_locator(LogLocator(subs=(1.0,) if highest > 100 * lowest else (1.0, 2.0, 5.0)))
        axes.set_ylim(0, axes.get_ylim()[1] * 1.15)
        axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
        axes.minorticks_off()
        axes.yaxis.set_major_locator(MaxNLocator(4))
        in_percent(axes)
        axes.set_xlabel(f"{measured}, nats")
        unit(axes, "positions")
    caption = (
        f"Half of the positions below lie within {formats.nats(float(np.median(after)))} nats after training; "
        f"before, {formats.nats(float(np.median(before)))}."
    )
    return Plot("distances", "Position by position", caption, figure)


def _apart(first: float, second: float, near: float) -> tuple[Side, Side]:
    """How two words over two places are aligned, so that they do not lie upon each other where those are near."""
    if abs(first - second) > near:
        return "center", "center"
    return ("right", "left") if first < second else ("left", "right")


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
