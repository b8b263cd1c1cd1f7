"""The plot of memory over time through a few steps, the variants side by side on one scale."""

from collections.abc import Mapping

from selkd.reporting.figure import ACCENT, DASHED, MUTED, QUIET, RULE, one_plot, svg

_PANEL, _HEIGHT = 150, 190
_POINTS = 300  # readings of a panel: two a point of its width


def memory_plot(series: Mapping[str, Mapping[str, list[float]]]) -> str:
    """Draw one panel for each variant, gigabytes over seconds, all on one scale, as SVG.

    Every title names the peak, and the floor's peak is drawn through all panels.

    Args:
        series: variant -> ``seconds`` and ``bytes`` of the readings, and ``step_seconds``, when each step began.
    """
    lowest = min((min(readings["bytes"]) for readings in series.values() if readings["bytes"]), default=0.0) / 1e9
    peaks = {name: max(readings["bytes"], default=lowest * 1e9) / 1e9 for name, readings in series.items()}
    with one_plot(_HEIGHT, _PANEL * max(1, len(series))) as (figure, axes):
        axes.remove()
        panels = figure.subplots(1, max(1, len(series)), sharey=True, squeeze=False)[0]
        for axes, (name, readings) in zip(panels, series.items(), strict=False):
            seconds, heights = _thinned(readings["seconds"], [value / 1e9 for value in readings["bytes"]])
            axes.fill_between(seconds, heights, lowest, color=QUIET, linewidth=0)
            axes.plot(seconds, heights, color=ACCENT, linewidth=1.4)
            for start in readings["step_seconds"]:
                axes.axvline(start, color=RULE, linewidth=0.8)
            if "floor" in peaks:
                axes.axhline(peaks["floor"], **DASHED | {"linewidth": 0.8})
            axes.set_title(f"{name}\n{peaks[name]:.2f} GB", loc="left", fontsize=10, color=MUTED)
            axes.set_xlabel("seconds")
            axes.set_ylim(lowest, lowest + 1.05 * (max(peaks.values()) - lowest) + 1e-6)
        panels[0].set_ylabel("memory in use, GB")
    return svg(figure, "memory", "Memory in use over time, by variant of the step")


def _thinned(seconds: list[float], heights: list[float]) -> tuple[list[float], list[float]]:
    """Keep at most ``_POINTS`` readings: the highest of every few neighbours, so that no peak is lost."""
    size = -(-len(heights) // _POINTS) or 1
    highest = [
        max(range(start, min(start + size, len(heights))), key=heights.__getitem__)
        for start in range(0, len(heights), size)
    ]
    return [seconds[index] for index in highest], [heights[index] for index in highest]
