"""The plots of several runs: accuracy against perplexity, quality by budget, and what the runs cost."""

import json
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import takewhile
from typing import TYPE_CHECKING, Any

from selkd.reporting import formats
from selkd.reporting.comparison import Group, RunComparison
from selkd.reporting.figure import DASHED, INK, MUTED, PAPER, SERIES, Plot, in_percent, lying, one_plot, unit
from selkd.reporting.formats import dig
from selkd.reporting.frontier import forest_plot, frontier_plots
from selkd.reporting.measures import (
    KL,
    PERPLEXITY,
    SECONDS,
    STAGES,
    VALIDATION,
    ReportedMeasure,
    Summary,
    cost_alone,
    summarise,
)

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_WIDTH = 420
_MARKERS = "osD^vP"


def comparison_plots(comparison: RunComparison) -> list[Plot]:
    """Draw the plots for which the runs have the figures."""
    accuracies = [measure for measure in comparison.measures if measure.key.startswith("accuracy_")]
    # A budget is a choice, so validation rows decide where there are some, and not the rows to report.
    to_choose_by = [measure for measure in accuracies if measure.key == VALIDATION.key]
    quality_of_budgets = _first_plotted(comparison, [*to_choose_by, *accuracies, KL])
    has_kl = len(comparison.alike(KL)) > 1
    frontier_quality = KL if has_kl else _first_plotted(comparison, [*accuracies, PERPLEXITY])
    is_lower = frontier_quality in (KL, PERPLEXITY)
    plots = [
        forest_plot(comparison),
        *frontier_plots(comparison, frontier_quality, lower_is_better=is_lower),
        _trade(comparison, _first_plotted(comparison, [*accuracies, KL])),
        *(
            _budget(comparison, part, measure)
            for part in ("positions", "samples")
            for measure in (quality_of_budgets, PERPLEXITY)
        ),
        _time(comparison.groups),
        _memory(comparison.groups),
    ]
    return [plot for plot in plots if plot is not None]


def _first_plotted(comparison: RunComparison, measures: Sequence[ReportedMeasure]) -> ReportedMeasure:
    """The first measure that at least two recipes have, else the last."""
    return next((measure for measure in measures if len(comparison.alike(measure)) > 1), measures[-1])


def _left_out(comparison: RunComparison, shown: Iterable[str]) -> str:
    """Name the recipes that are not shown, as they lack the figures or measured them on something else."""
    names = [group.name for group in comparison.groups if group.name not in shown]
    return f" Not measured on the same: {', '.join(names)}." if names else ""


def _trade(comparison: RunComparison, quality: ReportedMeasure) -> Plot | None:
    """Quality against perplexity; None where fewer than two recipes have both."""
    across, up = comparison.alike(PERPLEXITY), comparison.alike(quality)
    shown = [name for name in up if name in across]
    if len(shown) < 2:
        return None
    with one_plot(height=300, width=_WIDTH) as (figure, axes):
        for number, name in enumerate(shown):
            marker_style: dict[str, Any] = {"markersize": 7, "linestyle": "none", "markeredgecolor": PAPER}
            x = across[name]
            _draw_series(axes, number, name, [(x.mean, up[name])], xerr=x.deviation, **marker_style)
        axes.grid(visible=True, axis="both")
        axes.margins(0.15)
        axes.set_xlabel(PERPLEXITY.name)
        _legend(axes)
        _scale(axes, quality)
    caption = f"A point a recipe, the mean over its seeds{_bars_told(comparison, shown)}." + _left_out(
        comparison, shown
    )
    return Plot("quality", f"{quality.title} against perplexity", caption, figure)


def _bars_told(comparison: RunComparison, shown: Iterable[str]) -> str:
    """What the bars are, if any are drawn: a recipe with one seed has none."""
    groups = {group.name: group for group in comparison.groups}
    return "; bars are one deviation over them" if any(len(groups[name].members) > 1 for name in shown) else ""


@dataclass(frozen=True)
class BudgetLine:
    """Recipes that differ in one fraction alone."""

    name: str  # the common beginning of the recipes' names
    points: list[tuple[float, Summary]]  # fraction and figure, in ascending order
    unlimited: tuple[str, Summary] | None  # name and figure of the recipe without a limit, if there is one


def budget_lines(comparison: RunComparison, part: str, measure: ReportedMeasure) -> list[BudgetLine]:
    """Join recipes that differ in ``part``.fraction alone, at least two a line; a schedule of fractions is no point."""
    summaries = comparison.alike(measure)
    lines: dict[tuple[str, str], list[tuple[float, str]]] = {}
    unlimited: dict[str, tuple[str, Summary]] = {}
    for group in comparison.groups:
        recipe, fraction = group.recipe, dig(group.recipe, part, "fraction")
        if group.name not in summaries or isinstance(fraction, dict):
            continue
        rest = json.dumps({**recipe, part: None}, sort_keys=True)
        if fraction is None:
            unlimited[rest] = group.name, summaries[group.name]
        else:
            options = json.dumps({**recipe[part], "fraction": None}, sort_keys=True)
            lines.setdefault((rest, options), []).append((float(fraction), group.name))
    return [
        BudgetLine(
            _common_start([name for _, name in sorted(points)]),
            [(fraction, summaries[name]) for fraction, name in sorted(points)],
            unlimited.get(rest),
        )
        for (rest, _), points in lines.items()
        if len(points) > 1
    ]


def _common_start(names: Sequence[str]) -> str:
    same = takewhile(lambda letters: len(set(letters)) == 1, zip(*names, strict=False))
    return "".join(letters[0] for letters in same).rstrip("0123456789 -_.=(") or names[0]


def _budget(comparison: RunComparison, part: str, measure: ReportedMeasure) -> Plot | None:
    """A measure over the fraction of ``part``; None where no recipes differ in that fraction alone."""
    lines = budget_lines(comparison, part, measure)
    if not lines:
        return None
    with one_plot(height=260, width=_WIDTH) as (figure, axes):
        for number, line in enumerate(lines):
            _draw_series(axes, number, line.name, line.points, markersize=5, linewidth=1.6)
            if line.unlimited is not None:
                name, summary = line.unlimited
                at_left: dict[str, Any] = {"xycoords": ("axes fraction", "data"), "textcoords": "offset points"}
                axes.axhline(summary.mean, **DASHED)
                axes.annotate(_short(name), (0.01, summary.mean), (0, 4), color=MUTED, **at_left)
        fractions = sorted({fraction for line in lines for fraction, _ in line.points})
        axes.set_xscale("log")
        axes.set_xticks(fractions, [formats.fraction(fraction) for fraction in fractions])
        from matplotlib.ticker import NullFormatter

        axes.xaxis.set_minor_formatter(NullFormatter())
        axes.set_xlabel(f"share of the {part}")
        axes.margins(0.08, 0.2)
        if len(lines) > 1:
            _legend(axes)
        _scale(axes, measure)
    has_bars = any(summary.deviation for line in lines for _, summary in line.points)
    caption = f"{measure.rows} Recipes that differ in {part}.fraction alone, joined"
    caption += "; bars are one deviation over seeds." if has_bars else "."
    caption += f" Dashed: every one of the {part}." if any(line.unlimited is not None for line in lines) else ""
    caption += _left_out(comparison, comparison.alike(measure))
    title = f"{measure.title} by budget of {part}"
    return Plot(f"budget-{part}-{measure.key}", title, caption, figure)


def _time(groups: Sequence[Group]) -> Plot | None:
    """The wall time of the stages, end to end; None where no run recorded any."""
    stages = {stage: [_mean_seconds(group, stage) for group in groups] for stage in STAGES}
    if not any(map(any, stages.values())):
        return None
    with _bars(groups, "wall time", formats.duration) as (figure, axes):
        left = [0.0] * len(groups)
        for number, (stage, seconds) in enumerate(stages.items()):
            if any(seconds):
                axes.barh(range(len(groups)), seconds, left=left, color=SERIES[number], height=0.55, label=stage)
                left = [start + more for start, more in zip(left, seconds, strict=True)]
        for row, (group, total) in enumerate(zip(groups, left, strict=True)):
            at_least = "" if group.summary(SECONDS) is not None else "more than "  # a shared part's cost is not known
            _beside(axes, total, row, at_least + formats.duration(total))
        axes.set_xlim(0, max(left) * 1.22 or 1)
        _legend(axes)
    caption = "By stage, the mean over seeds; scores and caches that runs share count in full for each."
    return Plot("time", "Wall time", caption, figure)


def _memory(groups: Sequence[Group]) -> Plot | None:
    """Peak memory, a bar for the accelerator and one for the process; None where no run recorded the process's."""
    peaks = {
        place: [
            max((dig(member.record, "peak_memory_bytes", place) or 0) for member in group.members) for group in groups
        ]
        for place in ("accelerator", "process")
    }
    if not any(peaks["process"]):
        return None
    peaks = {place: values for place, values in peaks.items() if any(values)}
    height = 0.55 / len(peaks)
    with _bars(groups, "peak memory", formats.data_size) as (figure, axes):
        for number, (place, values) in enumerate(peaks.items()):
            rows = [row + (number - (len(peaks) - 1) / 2) * height for row in range(len(groups))]
            axes.barh(rows, values, color=SERIES[number], height=height, label=place)
            for row, value in zip(rows, values, strict=True):
                _beside(axes, value, row, formats.data_size(value))
        axes.set_xlim(0, max(map(max, peaks.values())) * 1.2)
        if len(peaks) > 1:
            _legend(axes)
    return Plot("memory", "Peak memory", "The largest of the seeds' runs.", figure)


@contextmanager
def _bars(groups: Sequence[Group], measured: str, form: Callable[[float], str]) -> Iterator[tuple["Figure", "Axes"]]:
    """Axes with one row for each recipe."""
    with one_plot(height=90 + 30 * len(groups), width=_WIDTH) as (figure, axes):
        axes.set_yticks(range(len(groups)), [_short(group.name) for group in groups])
        axes.set_ylim(len(groups) - 0.5, -0.5)
        lying(axes, form)
        from matplotlib.ticker import MaxNLocator

        axes.xaxis.set_major_locator(MaxNLocator(4))
        axes.tick_params(axis="y", labelcolor=INK)
        unit(axes, measured)
        yield figure, axes


def _beside(axes: "Axes", value: float, row: float, text: str) -> None:
    """Write a bar's value at its end."""
    axes.annotate(text, (value, row), (4, 0), textcoords="offset points", va="center", color=INK, fontsize=10)


def _draw_series(axes: "Axes", number: int, name: str, points: Sequence[tuple[float, Summary]], **style: Any) -> None:
    """Draw means with their deviations; colours that are used up come again with other markers."""
    deviations = [summary.deviation or 0.0 for _, summary in points]
    axes.errorbar(
        [x for x, _ in points],
        [summary.mean for _, summary in points],
        yerr=deviations if any(deviations) else None,
        color=SERIES[number % len(SERIES)],
        marker=_MARKERS[(number // len(SERIES) + number) % len(_MARKERS)],
        elinewidth=1,
        label=_short(name),
        **style,
    )


def _legend(axes: "Axes") -> None:
    axes.legend(frameon=False, fontsize=10, labelcolor=INK, loc="upper left", bbox_to_anchor=(0, -0.18), ncols=2)


def _scale(axes: "Axes", measure: ReportedMeasure) -> None:
    unit(axes, measure.name)
    from matplotlib.ticker import MaxNLocator

    axes.yaxis.set_major_locator(MaxNLocator(5))
    if measure.form is formats.percent:
        in_percent(axes)


def _mean_seconds(group: Group, stage: str) -> float:
    summary = summarise([cost_alone(member.record, stage, "seconds") for member in group.members])
    return 0.0 if summary is None else summary.mean


def _short(text: str, room: int = 24) -> str:
    """Shorten a name in its middle: a study's recipes may differ at the beginning and at the end."""
    half = (room - 1) // 2
    return text if len(text) <= room else f"{text[:half]}…{text[half + 1 - room :]}"
