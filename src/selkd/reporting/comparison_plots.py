"""The plots of several runs: quality against quality, against budgets, and what the runs cost."""

import json
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import takewhile
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, MaxNLocator, NullFormatter, PercentFormatter

from selkd.reporting import formats
from selkd.reporting.comparison import Comparison, Group
from selkd.reporting.figure import INK, MUTED, PAPER, QUIET, SERIES, one_plot, unit
from selkd.reporting.formats import dig
from selkd.reporting.measures import ACCURACY, KL, PERPLEXITY, Measure

_WIDTH = 420
_MARKERS = "osD^vP"
_STAGES = ("prepare", "score", "cache", "train", "evaluate")


@dataclass(frozen=True)
class Plot:
    """One plot: ``name`` in files, its title and caption, and how it is drawn anew each time."""

    name: str
    title: str
    caption: str
    drawn: Callable[[], Any]  # a context manager that gives the Figure


def comparison_plots(comparison: Comparison) -> list[Plot]:
    """Those plots for which the runs have the figures."""
    groups = comparison.groups
    quality = ACCURACY if sum(group.summary(ACCURACY) is not None for group in groups) > 1 else KL
    plots = []
    if sum(g.summary(quality) is not None and g.summary(PERPLEXITY) is not None for g in groups) > 1:
        plots.append(
            Plot(
                "quality",
                f"{quality.name[:1].upper()}{quality.name[1:]} against perplexity",
                "A point a recipe, the mean over its seeds; bars are one deviation.",
                lambda: _trade(groups, PERPLEXITY, quality),
            )
        )
    for part, what in (("positions", "positions"), ("samples", "samples")):
        for measure in (quality, PERPLEXITY):
            if lines := budget_lines(groups, part, measure):
                plots.append(
                    Plot(
                        f"budget-{part}-{measure.key}",
                        f"{measure.name[:1].upper()}{measure.name[1:]} by budget of {what}",
                        f"Recipes that differ in {part}.fraction alone, joined; bars are one deviation over seeds. "
                        f"Dashed: every one of the {what}.",
                        lambda lines=lines, what=what, measure=measure: _budget(lines, what, measure),  # type: ignore[misc]
                    )
                )
    if any(dig(m.record, "seconds", "total") for g in groups for m in g.members):
        plots.append(Plot("time", "Wall time", "By stage, the mean over seeds.", lambda: _time(groups)))
    if any(dig(m.record, "peak_memory_bytes", "process") for g in groups for m in g.members):
        plots.append(Plot("memory", "Peak memory", "The largest of the seeds' runs.", lambda: _memory(groups)))
    return plots


@dataclass(frozen=True)
class BudgetLine:
    """Recipes that differ in one fraction alone: (fraction, group) in ascending order, and the one without a limit."""

    points: tuple[tuple[float, Group], ...]
    unlimited: Group | None

    @property
    def name(self) -> str:
        """What the recipes' names begin with in common."""
        names = [group.name for _, group in self.points]
        same = takewhile(lambda letters: len(set(letters)) == 1, zip(*names, strict=False))
        return "".join(letters[0] for letters in same).rstrip("0123456789 -_.=(") or names[0]


def budget_lines(groups: Sequence[Group], part: str, measure: Measure) -> list[BudgetLine]:
    """The lines along ``part``.fraction with at least two known points; a fraction that is a schedule is no point."""
    lines: dict[str, list[tuple[float, Group]]] = {}
    unlimited: dict[str, Group] = {}
    for group in groups:
        options, fraction = group.recipe.get(part), dig(group.recipe, part, "fraction")
        if group.summary(measure) is None or isinstance(fraction, dict):
            continue
        rest = json.dumps({**group.recipe, part: None}, sort_keys=True)
        if fraction is None:
            unlimited[rest] = group
        else:
            own = json.dumps({**(options or {}), "fraction": None}, sort_keys=True)
            lines.setdefault(f"{rest} {own}", []).append((float(fraction), group))
    return [
        BudgetLine(
            tuple(sorted(points, key=lambda point: point[0])),
            next((group for rest, group in unlimited.items() if key.startswith(f"{rest} ")), None),
        )
        for key, points in lines.items()
        if len(points) > 1
    ]


@contextmanager
def _trade(groups: Sequence[Group], across: Measure, up: Measure) -> Iterator[Figure]:
    with one_plot(height=300, width=_WIDTH) as (figure, axes):
        for number, group in enumerate(groups):
            x, y = group.summary(across), group.summary(up)
            if x is not None and y is not None:
                _point(axes, number, x.mean, y.mean, x.deviation, y.deviation, _short(group.name))
        axes.grid(visible=True, axis="both")
        axes.margins(0.15)
        axes.set_xlabel(across.name)
        _legend(axes)
        _scale(axes, up)
        yield figure


@contextmanager
def _budget(lines: Sequence[BudgetLine], what: str, measure: Measure) -> Iterator[Figure]:
    with one_plot(height=260, width=_WIDTH) as (figure, axes):
        for number, line in enumerate(lines):
            summaries = [(fraction, group.summary(measure)) for fraction, group in line.points]
            known = [(fraction, found) for fraction, found in summaries if found is not None]
            colour = SERIES[number % len(SERIES)]
            axes.errorbar(
                [fraction for fraction, _ in known],
                [found.mean for _, found in known],
                yerr=[found.deviation or 0.0 for _, found in known],
                color=colour,
                marker=_MARKERS[number % len(_MARKERS)],
                markersize=5,
                linewidth=1.6,
                elinewidth=1,
                label=_short(line.name),
            )
            all_of_them = None if line.unlimited is None else line.unlimited.summary(measure)
            if line.unlimited is not None and all_of_them is not None:
                axes.axhline(all_of_them.mean, color=MUTED, linewidth=1.2, linestyle=(0, (4, 3)))
                axes.annotate(
                    _short(line.unlimited.name),
                    (0.01, all_of_them.mean),
                    (0, 4),
                    xycoords=("axes fraction", "data"),
                    textcoords="offset points",
                    color=MUTED,
                )
        fractions = sorted({fraction for line in lines for fraction, _ in line.points})
        axes.set_xscale("log")
        axes.set_xticks(fractions, [formats.fraction(fraction) for fraction in fractions])
        axes.xaxis.set_minor_formatter(NullFormatter())
        axes.set_xlabel(f"share of the {what}")
        axes.margins(0.08, 0.2)
        if len(lines) > 1:
            _legend(axes)
        _scale(axes, measure)
        yield figure


@contextmanager
def _time(groups: Sequence[Group]) -> Iterator[Figure]:
    stages = {
        stage: [_mean([dig(m.record, "seconds", stage) for m in group.members]) for group in groups]
        for stage in _STAGES
    }
    with _bars(groups, "wall time") as (figure, axes):
        left = [0.0] * len(groups)
        for number, (stage, seconds) in enumerate(stages.items()):
            if any(seconds):
                colour = QUIET if stage == "prepare" else SERIES[(number - 1) % len(SERIES)]
                axes.barh(range(len(groups)), seconds, left=left, color=colour, height=0.55, label=stage)
                left = [begun + more for begun, more in zip(left, seconds, strict=True)]
        for row, total in enumerate(left):
            axes.annotate(formats.duration(total), (total, row), (4, 0), **_BESIDE)
        axes.set_xlim(0, max(left) * 1.22 or 1)
        axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: formats.duration(value) if value else "0"))
        _legend(axes)
        yield figure


@contextmanager
def _memory(groups: Sequence[Group]) -> Iterator[Figure]:
    places = ("accelerator", "process")
    peaks = {
        place: [
            max((dig(member.record, "peak_memory_bytes", place) or 0) for member in group.members) for group in groups
        ]
        for place in places
    }
    shown = [place for place in places if any(peaks[place])]
    height = 0.55 / len(shown)
    with _bars(groups, "peak memory") as (figure, axes):
        for number, place in enumerate(shown):
            rows = [row + (number - (len(shown) - 1) / 2) * height for row in range(len(groups))]
            axes.barh(rows, peaks[place], color=SERIES[number], height=height, label=place)
            for row, value in zip(rows, peaks[place], strict=True):
                axes.annotate(formats.data_size(value), (value, row), (4, 0), **_BESIDE)
        axes.set_xlim(0, max(max(peaks[place]) for place in shown) * 1.2)
        axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: formats.data_size(value) if value else "0"))
        if len(shown) > 1:
            _legend(axes)
        yield figure


_BESIDE: dict[str, Any] = {"textcoords": "offset points", "va": "center", "color": INK, "fontsize": 10}


@contextmanager
def _bars(groups: Sequence[Group], measured: str) -> Iterator[tuple[Figure, Axes]]:
    with one_plot(height=90 + 30 * len(groups), width=_WIDTH) as (figure, axes):
        axes.set_yticks(range(len(groups)), [_short(group.name) for group in groups])
        axes.set_ylim(len(groups) - 0.5, -0.5)
        axes.grid(visible=False, axis="y")
        axes.grid(visible=True, axis="x")
        axes.xaxis.set_major_locator(MaxNLocator(4))
        axes.tick_params(axis="y", labelcolor=INK)
        unit(axes, measured)
        yield figure, axes


def _point(
    axes: Axes, number: int, x: float, y: float, x_deviation: float | None, y_deviation: float | None, name: str
) -> None:
    axes.errorbar(
        [x],
        [y],
        xerr=x_deviation,
        yerr=y_deviation,
        color=SERIES[number % len(SERIES)],
        marker=_MARKERS[(number // len(SERIES) + number) % len(_MARKERS)],
        markersize=7,
        elinewidth=1,
        linestyle="none",
        markeredgecolor=PAPER,
        label=name,
    )


def _legend(axes: Axes) -> None:
    axes.legend(frameon=False, fontsize=10, labelcolor=INK, loc="upper left", bbox_to_anchor=(0, -0.18), ncols=2)


def _scale(axes: Axes, measure: Measure) -> None:
    unit(axes, measure.name)
    axes.yaxis.set_major_locator(MaxNLocator(5))
    if measure.form is formats.percent:
        axes.yaxis.set_major_formatter(PercentFormatter(1.0, decimals=None))


def _mean(values: Sequence[float | None]) -> float:
    known = [value for value in values if value is not None]
    return sum(known) / len(known) if known else 0.0


def _short(text: str, room: int = 24) -> str:
    return text if len(text) <= room else text[: room - 1] + "…"
