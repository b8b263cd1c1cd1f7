"""The study's pictures: KL against cost beside the first arm's own way, a forest of differences, and curves of k."""

from collections.abc import Mapping

from compare import WAYS, Arm, Compared
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator, PercentFormatter

from selkd.reporting.figure import ACCENT, DASHED, INK, MUTED, PAPER, QUIET, SERIES, Plot, lying, one_plot, unit
from selkd.reporting.frontier import Point, on_frontier

_NAMED = 14  # names that a frontier has room for; in one of more arms, the first arm's and the best ones'
TITLES = {
    "frontier": "KL after all steps against their work; dashed: the first arm on its way; green: better at equal work; "
    f"of more than {_NAMED} arms the best are named",
    "differences": "Paired differences in KL with 95% intervals over seeds and documents",
    "curve": "KL by the share of positions, ranked and random",
}
CURVES = ("entropy", "random")  # the names of arms before their percentage
WORK = "work_in_steps"


def pictures(name: str, table: Compared) -> dict[str, bytes]:
    """File name -> SVG, of a table with at least two arms."""
    draw = {"frontier": frontier, "differences": forest, "curve": curve}
    return {
        f"study-{name}-{kind}.svg": draw[kind](name, table).pictures()[f"study-{name}-{kind}.svg"]
        for kind in _kinds(name)
    }


def file_names(name: str) -> dict[str, str]:
    """File name -> title, of a table's pictures."""
    return {f"study-{name}-{kind}.svg": TITLES[kind] for kind in _kinds(name)}


def frontier(table_name: str, table: Compared) -> Plot:
    """Each arm at its last step, and the first arm at each measured step, joined: what is below it is better."""
    first = table.first
    with one_plot(height=380, width=560) as (figure, axes):
        way = [(step / first.steps, first.kl(step)) for step in first.measured if step]
        axes.plot(*zip(*way, strict=True), zorder=1.5, **DASHED)
        places = {name: place(table, arm) for name, arm in table.arms.items()}
        named = set(places) if len(places) <= _NAMED else {first.name, *_unbeaten(places)}
        for name, arm in table.arms.items():
            x, y = places[name]
            # The bar is of the step that is drawn; the colour says what is below the dashed line beyond doubt.
            found = table.differences["equal steps"].get(name) if arm.steps == first.steps else None
            of_work = table.differences["equal work"].get(name)
            bar = None if found is None else [[found.value - found.low], [found.high - found.value]]
            is_better = of_work is not None and of_work.seeds > 1 and of_work.high < 0  # one seed decides nothing
            colour = INK if arm is first else ACCENT if is_better else MUTED
            axes.errorbar(
                [x], [y], yerr=bar, color=colour, ecolor=QUIET, elinewidth=1.2, marker="o", markersize=6,
                markeredgecolor=PAPER,
            )  # fmt: skip
            if name not in named:
                continue
            side = -1 if _name_goes_left((x, y), list(places.values())) else 1
            axes.annotate(
                name, (x, y), (7 * side, -4), textcoords="offset points", fontsize=9, color=colour,
                ha="left" if side > 0 else "right",
            )  # fmt: skip
        axes.margins(0.15, 0.12)
        axes.grid(visible=True, axis="both")
        axes.xaxis.set_major_formatter(PercentFormatter(1.0, decimals=0))
        axes.set_xlabel(f"multiply-adds of all steps, as a share of those of {first.name}")
        unit(axes, "KL to the teacher, nats a position")
    return _plot(table_name, "frontier", figure)


def place(table: Compared, arm: Arm) -> tuple[float, float]:
    """The work of the arm's steps as a share of the first arm's, and its KL, as if both had all the same seeds."""
    first, beside = table.first, table.first_beside(arm)
    whole = beside.steps * beside.cost_of_step(WORK)
    other_seeds = first.kl(first.steps) - beside.kl(first.steps)
    return arm.steps * arm.cost_of_step(WORK) / whole, arm.kl(arm.steps) + other_seeds


def _unbeaten(places: Mapping[str, tuple[float, float]]) -> list[str]:
    """The arms that no other equals or beats in both work and KL."""
    points = [Point(name, work, kl, None) for name, (work, kl) in places.items()]
    return [point.name for point in on_frontier(points, lower_is_better=True)]


def _name_goes_left(place: tuple[float, float], places: list[tuple[float, float]]) -> bool:
    """Whether a name to the right of ``place`` would lie over another point's, or over the frame."""
    width, height = (max(values) - min(values) for values in zip(*places, strict=True))
    x, y = place
    beside = [other for other in places if x < other[0] < x + width / 4 and abs(other[1] - y) < height / 20]
    return bool(beside) or (len(places) > 2 and x > max(other[0] for other in places) - width / 10)


def forest(name: str, table: Compared) -> Plot:
    """The differences to the first arm at each kind of equal cost, a row an arm."""
    arms = [arm.name for arm in table.others]
    ways = [way for way in WAYS if table.differences[way]]
    with one_plot(height=110 + 34 * len(arms), width=560) as (figure, axes):
        axes.axvline(0, **DASHED)
        for shift, way in enumerate(ways):
            is_named = False
            for row, arm in enumerate(arms):
                found = table.differences[way].get(arm)
                if found is None:
                    continue
                y = row + (shift - (len(ways) - 1) / 2) * 0.22
                colour = SERIES[shift]
                axes.plot([found.low, found.high], [y, y], color=colour, linewidth=1.5)
                axes.plot(
                    [found.value], [y], marker="s", markersize=4.5, color=colour, markeredgewidth=0,
                    label=None if is_named else way, linestyle="none",
                )  # fmt: skip
                is_named = True
        axes.set_yticks(range(len(arms)), [f"{a.name}{', one seed' * (len(a.lines) == 1)}" for a in table.others])
        axes.tick_params(axis="y", labelcolor=INK)
        axes.set_ylim(len(arms) - 0.5, -0.6)
        lying(axes, lambda value: f"{value:+.4f}")
        axes.xaxis.set_major_locator(MaxNLocator(6))
        axes.set_xlabel("nats a position; left of zero is nearer to the teacher")
        figure.legend(loc="outside lower center", ncols=3, frameon=False)
        unit(axes, f"KL, difference to {table.first.name}")
    return _plot(name, "differences", figure)


def curve(name: str, table: Compared) -> Plot:
    """KL at the first arm's last step by the fraction of positions, ranked and random; the first arm has them all."""
    steps = table.first.steps
    shares = {1.0}
    with one_plot(height=300, width=480) as (figure, axes):
        for number, before in enumerate(CURVES):
            arms = {arm: one for arm, one in table.differences["equal steps"].items() if arm.startswith(f"{before}_")}
            if not arms:
                continue  # none of them is run yet
            found = dict(sorted((int(arm.rpartition("_")[2]) / 100, one) for arm, one in arms.items()))
            shares |= found.keys()
            # As if all had the first arm's seeds, as in the frontier.
            points = [(share, table.first.kl(steps) + one.value) for share, one in found.items()]
            axes.plot(
                *zip(*points, (1.0, table.first.kl(steps)), strict=True), marker="o", color=SERIES[number], label=before
            )
            bars = [(one.value - one.low, one.high - one.value) for one in found.values()]
            axes.errorbar(*zip(*points, strict=True), yerr=[*zip(*bars, strict=True)], color=SERIES[number], fmt="none")
        axes.set_xscale("log")
        axes.set_xticks(sorted(shares), [f"{share:.0%}" for share in sorted(shares)])
        axes.minorticks_off()
        axes.set_xlabel("positions selected")
        axes.legend(frameon=False)
        unit(axes, f"KL to the teacher, nats a position; bars: 95% interval of the difference to {table.first.name}")
    return _plot(name, "curve", figure)


def _plot(table: str, kind: str, figure: Figure) -> Plot:
    return Plot(f"study-{table}-{kind}", TITLES[kind], "", figure)


def _kinds(table: str) -> list[str]:
    return [kind for kind in TITLES if kind != "curve" or table.startswith("positions")]
