"""Quality against cost as a frontier, and paired differences as a forest plot: what a study is run for."""

from collections.abc import Sequence
from dataclasses import dataclass

from matplotlib.ticker import FuncFormatter, MaxNLocator, NullFormatter

from selkd.reporting import formats
from selkd.reporting.comparison import RunComparison
from selkd.reporting.differences import Interval, difference_in_kl, interval
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
from selkd.reporting.measures import KL, MEASURES, ReportedMeasure

_COSTS = {"total_seconds": "time", "teacher_tokens": "teacher tokens", "cache_bytes": "bytes of the cache"}
_NAMED = 14  # more recipes than these have their names under the pointer alone
_NAMES_APART = (0.25, 0.12)  # points nearer than these shares of the axes have their names stacked
_LOG_FROM = 8.0  # the ratio of the dearest to the cheapest from which on costs are on a logarithmic axis
_ALIKE = 0.02  # costs that differ by less than this share make no axis


@dataclass(frozen=True)
class Point:
    """A recipe's cost and its figure with its interval, if that is known."""

    name: str
    cost: float
    figure: float
    interval: Interval | None


def frontier_plots(comparison: RunComparison, quality: ReportedMeasure, *, lower_is_better: bool) -> list[Plot]:
    """A plot for each kind of cost in which at least two recipes differ."""
    figures = comparison.alike(quality)
    by_name = {group.name: group for group in comparison.groups}
    drawn = []
    for measure in MEASURES:
        if measure.key not in _COSTS:
            continue
        points = []
        for name, summary in figures.items():
            cost = by_name[name].summary(measure)
            if cost is not None and cost.mean > 0:
                points.append(Point(name, cost.mean, summary.mean, interval(by_name[name], quality)))
        costs = [point.cost for point in points]
        if len(points) > 1 and max(costs) - min(costs) > _ALIKE * max(costs):
            drawn.append(_frontier_plot(comparison, measure, quality, points, lower_is_better))
    return drawn


def on_frontier(points: Sequence[Point], *, lower_is_better: bool) -> list[Point]:
    """The points that no other equals or beats in both cost and figure, by ascending cost."""
    sign = 1 if lower_is_better else -1
    best: list[Point] = []
    for point in sorted(points, key=lambda point: (point.cost, sign * point.figure)):
        if not best or sign * point.figure < sign * best[-1].figure:
            best.append(point)
    return best


def _frontier_plot(
    comparison: RunComparison, cost: ReportedMeasure, quality: ReportedMeasure, points: list[Point], is_lower: bool
) -> Plot:
    best = on_frontier(points, lower_is_better=is_lower)
    with one_plot(height=300, width=420) as (figure, axes):
        axes.plot([point.cost for point in best], [point.figure for point in best], zorder=1.9, **DASHED)
        for point in points:
            colour = ACCENT if point in best else MUTED
            bar = None
            if point.interval is not None:
                bar = [[point.figure - point.interval.low], [point.interval.high - point.figure]]
            axes.errorbar(
                [point.cost], [point.figure], yerr=bar, color=colour, ecolor=QUIET, elinewidth=1.2, marker="o",
                markersize=6.5, markeredgecolor=PAPER,
            )  # fmt: skip
        if max(point.cost for point in points) > _LOG_FROM * min(point.cost for point in points):
            axes.set_xscale("log")
            axes.xaxis.set_minor_formatter(NullFormatter())
        else:
            axes.xaxis.set_major_locator(MaxNLocator(4))
        axes.margins(0.18, 0.18)
        axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: cost.form(value)))
        middle = sum(axes.get_xlim()) / 2 if axes.get_xscale() == "linear" else 0.0
        in_axes = axes.transScale + axes.transLimits
        placed: list[tuple[float, float]] = []
        for point in sorted(points, key=lambda point: (point.cost, point.figure)):
            span = "" if point.interval is None else f" ({_span(point.interval, quality)})"
            tip(
                axes,
                point.cost,
                point.figure,
                f"{point.name}: {quality.form(point.figure)}{span}, {cost.form(point.cost)}",
            )
            if len(points) <= _NAMED:
                is_right = middle > 0 and point.cost > middle
                at = in_axes.transform((point.cost, point.figure))
                beside = sum(abs(at[0] - x) < _NAMES_APART[0] and abs(at[1] - y) < _NAMES_APART[1] for x, y in placed)
                placed.append((at[0], at[1]))
                place = (-6 if is_right else 6, 12 * beside - 6 if beside else -12)
                axes.annotate(
                    _short(point.name), (point.cost, point.figure), place,
                    textcoords="offset points", ha="right" if is_right else "left", fontsize=9,
                    color=INK if point in best else MUTED,
                    bbox={"facecolor": PAPER, "edgecolor": "none", "pad": 0.6, "alpha": 0.85},
                )  # fmt: skip
        axes.grid(visible=True, axis="both")
        axes.set_xlabel(f"{_COSTS[cost.key]}, of a recipe alone")
        axes.yaxis.set_major_locator(MaxNLocator(5))
        if quality.form is formats.percent:
            in_percent(axes)
        unit(axes, quality.name)
    caption = f"Coloured and joined: no other recipe is {'nearer' if is_lower else 'better'} for the same or less."
    overs = sorted({point.interval.over for point in points if point.interval is not None})
    caption += f" Bars are 95% intervals over {'; or over '.join(overs)}." if overs else ""
    left = [group.name for group in comparison.groups if group.name not in {point.name for point in points}]
    caption += f" Not measured on the same, or without this cost: {', '.join(left)}." if left else ""
    return Plot(
        f"frontier-{cost.key}", f"{quality.title.partition(',')[0]} against {_COSTS[cost.key]}", caption, figure
    )


def forest_plot(comparison: RunComparison) -> Plot | None:
    """The differences in KL to the baseline, a row a recipe, the nearest first; None where there is none."""
    found = [(group.name, difference_in_kl(comparison, group)) for group in comparison.groups]
    rows = sorted(((name, row) for name, row in found if row is not None), key=lambda pair: pair[1].mean)
    if not rows:
        return None
    with one_plot(height=80 + 24 * len(rows), width=420) as (figure, axes):
        axes.axvline(0, **DASHED)
        for number, (name, row) in enumerate(rows):
            colour = MUTED if not row.is_clear else ACCENT if row.mean < 0 else INK
            axes.plot([row.low, row.high], [number, number], color=colour, linewidth=1.6)
            axes.plot([row.mean], [number], marker="s", markersize=5.5, color=colour, markeredgewidth=0)
            tip(axes, row.mean, number, f"{name}: {formats.signed(row.mean, formats.nats)} ({_span(row, KL)})")
        axes.set_yticks(range(len(rows)), [_short(name) for name, _ in rows])
        axes.tick_params(axis="y", labelcolor=INK)
        axes.set_ylim(len(rows) - 0.5, -0.6)
        lying(axes, formats.nats)
        axes.xaxis.set_major_locator(MaxNLocator(5))
        axes.set_xlabel("nats a position; left of zero is nearer to the teacher")
        unit(axes, f"KL, difference to {_short(comparison.baseline or '', 40)}")
    overs = sorted({row.over for _, row in rows})
    clear = sum(row.is_clear for _, row in rows)
    caption = (
        f"Paired, with 95% intervals over {'; or over '.join(overs)}. "
        f"{formats.counted(clear, 'difference')} of {formats.count(len(rows))} can be told apart from zero."
    )
    if any("seeds" not in row.over for _, row in rows):
        caption += " With one seed the interval is that of two students, not of their recipes."
    return Plot("differences", "Difference in KL to the teacher", caption, figure)


def _span(row: Interval, measure: ReportedMeasure) -> str:
    return f"{measure.form(row.low)} to {measure.form(row.high)}"


def _short(text: str, room: int = 26) -> str:
    half = (room - 1) // 2
    return text if len(text) <= room else f"{text[:half]}…{text[half + 1 - room :]}"
