"""The style of all plots, and how a plot becomes SVG for a page or pictures for a paper.

Plots are drawn in the light page's colours, which a paper takes as they are. In a page each colour becomes the page's
own CSS variable, with the colour as its fallback: a plot is light or dark with the page. The same input gives the same
bytes: there is no date, no random identifier and no system font.
"""

import io
import logging
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from html import escape
from typing import TYPE_CHECKING, Any
from urllib.parse import quote, unquote

from selkd.errors import InputError
from selkd.extras import is_installed, need

if TYPE_CHECKING:  # an extra, plots, and slow to import
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_logger = logging.getLogger(__name__)
INK, MUTED, ACCENT = "#1c2430", "#626c79", "#0f766e"
RULE, QUIET, PAPER = "#e2e5e9", "#c3cad2", "#fdfdfc"
# The colours of several runs, in this order; people with any common colour blindness can tell them apart.
SERIES = (ACCENT, "#c2570c", "#4659b8", "#a3327e", "#7a6a00", "#3f7fa6")
_VARIABLES = {
    INK: "ink",
    MUTED: "muted",
    ACCENT: "accent",
    RULE: "rule",
    QUIET: "quiet",
    PAPER: "paper",
    **dict(zip(SERIES[1:], ("second", "third", "fourth", "fifth", "sixth"), strict=True)),
}
DASHED: dict[str, Any] = {"color": MUTED, "linewidth": 1.2, "linestyle": (0, (4, 3))}  # a line to compare with
_STYLE = {
    "svg.fonttype": "none",
    "text.parse_math": False,
    "font.family": "DejaVu Sans",
    "font.size": 11,
    "text.color": MUTED,
    "axes.edgecolor": RULE,
    "axes.labelcolor": MUTED,
    "axes.grid": True,
    "axes.grid.axis": "y",
    "axes.axisbelow": True,
    "axes.spines.left": False,
    "axes.spines.right": False,
    "axes.spines.top": False,
    "grid.color": RULE,
    "grid.linewidth": 0.8,
    "xtick.color": MUTED,
    "ytick.color": MUTED,
    "xtick.major.size": 0,
    "ytick.major.size": 0,
    "xtick.minor.size": 0,
    "lines.solid_capstyle": "round",
    "lines.solid_joinstyle": "round",
}
_WIDTH, _HEIGHT = 360, 220


@dataclass(frozen=True)
class Plot:
    """A drawn plot: ``name`` in files and within its page, the title above it and the caption below it."""

    name: str
    title: str
    caption: str
    figure: "Figure"

    @property
    def svg(self) -> str:
        """The plot as an element of a page."""
        return svg(self.figure, self.name, self.title)

    def pictures(self) -> dict[str, bytes]:
        """The plot for a paper, on white: file name -> content, as PNG of 300 dots an inch and as SVG."""
        options: dict[str, Any] = {"dpi": 300, "facecolor": "white"}
        return {
            f"{self.name}.png": _saved(self.figure, self.name, format="png", metadata={"Software": None}, **options),
            f"{self.name}.svg": _saved(self.figure, self.name, format="svg", metadata=_NO_METADATA, **options),
        }


@contextmanager
def one_plot(height: int = _HEIGHT, width: int = _WIDTH) -> Iterator[tuple["Figure", "Axes"]]:
    """A figure with one pair of axes in the style of all plots; its size is in points.

    Raises:
        InputError: Matplotlib is not installed.
    """
    if not can_draw():
        raise InputError(f"plots: drawing {need('matplotlib')}")
    from matplotlib import style
    from matplotlib.figure import Figure

    # after_reset ignores the user's own matplotlibrc, by which pages would differ between machines.
    with style.context(_STYLE, after_reset=True):
        figure = Figure(figsize=(width / 72, height / 72), layout="constrained")
        yield figure, figure.add_subplot()


def can_draw() -> bool:
    """Whether Matplotlib is installed. Pages without it have no plots, and say so."""
    return is_installed("matplotlib")


def no_plots() -> str | None:
    """Why a page has no plots, which is also logged; None where they can be drawn."""
    if can_draw():
        return None
    why = f"No plots: drawing {need('matplotlib')}"
    _logger.warning("%s.", why)
    return why


def unit(axes: "Axes", text: str) -> None:
    """Write what the vertical axis measures above its end."""
    axes.set_title(text, loc="left", fontsize=11, color=MUTED, pad=8)


def in_percent(axes: "Axes") -> None:
    """Show shares in [0, 1] on the vertical axis as percent."""
    from matplotlib.ticker import PercentFormatter

    axes.yaxis.set_major_formatter(PercentFormatter(1.0, decimals=None))


def lying(axes: "Axes", form: Callable[[float], str]) -> None:
    """Put the values on the horizontal axis, in ``form``, with vertical grid lines; the rows are names."""
    from matplotlib.ticker import FuncFormatter

    axes.grid(visible=False, axis="y")
    axes.grid(visible=True, axis="x")
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: form(value) if value else "0"))


def tip(axes: "Axes", x: float, y: float, text: str, *, is_stop: bool = True) -> None:
    """Show ``text`` in the page where the pointer is at (x, y), or, at a stop, where the keyboard's focus is.

    In pictures for a paper nothing is to be seen of it.
    """
    gid = ("stop:" if is_stop else "tip:") + quote(text)
    axes.plot([x], [y], marker="o", markersize=9, alpha=0.0, linestyle="none", zorder=9, gid=gid)


def svg(figure: "Figure", name: str, title: str) -> str:
    """The figure as an SVG element of a page. No other plot of the page may have the same ``name``."""
    return _themed(_saved(figure, name, format="svg", transparent=True, metadata=_NO_METADATA).decode(), title)


_NO_METADATA = {"Date": None, "Creator": None}


def _saved(figure: "Figure", name: str, **options: Any) -> bytes:
    """The bytes of the figure's file. The name salts the identifiers, so that plots of one page share none."""
    from matplotlib import style

    buffer = io.BytesIO()
    with style.context(_STYLE | {"svg.hashsalt": name}, after_reset=True):
        figure.savefig(buffer, **options)
    return buffer.getvalue()


def _themed(svg: str, title: str) -> str:
    """Keep only the <svg> element, sized by the page, named for screen readers, coloured by the page's variables."""
    svg = svg[svg.index("<svg") :].strip()
    svg = re.sub(r"\s*<metadata>.*?</metadata>", "", svg, flags=re.DOTALL)
    # Matplotlib's style element speaks to every element of the page, and its group ids repeat from plot to plot.
    svg = re.sub(r"\s*<defs>\s*<style.*?</style>\s*</defs>", "", svg, count=1, flags=re.DOTALL)
    width = float(re.findall(r'viewBox="0 0 ([\d.]+)', svg)[0])
    svg = _TIP.sub(lambda match: _tip(*match.groups(), width=width), svg)
    svg = re.sub(r'<g id="[^"]*"', "<g", svg)
    svg = re.sub(r"<svg ([^>]*?)>", lambda match: _open_tag(match.group(1), title), svg, count=1)
    # The page's own font; it is no wider than the one that the layout was measured with.
    svg = svg.replace("font-family: 'DejaVu Sans'; ", "")
    for colour, variable in _VARIABLES.items():
        svg = svg.replace(colour, f"var(--{variable}, {colour})")
    return svg


# An invisible marker of ``tip``: its group holds the marker's shape and the place where it is used.
_TIP = re.compile(
    r'<g id="(tip|stop):([^"]*)">(?:(?!<g id=).)*?<use [^>]*?x="([\d.]+)" y="([\d.]+)"[^>]*/>\s*</g>\s*</g>', re.S
)


def _tip(kind: str, quoted: str, x: str, y: str, *, width: float) -> str:
    """The element of a tip: a place for the pointer, and the text that shows while it is there."""
    text, at = escape(unquote(quoted)), float(x)
    anchor = "start" if at < width / 3 else "end" if at > 2 * width / 3 else "middle"
    above = float(y) - 11 if float(y) > 28 else float(y) + 20
    stop = f' tabindex="0" role="img" aria-label="{text}"' if kind == "stop" else ""
    return (
        f'<g class="tip"{stop}><circle cx="{x}" cy="{y}" r="7"/>'
        f'<text x="{x}" y="{above:.1f}" text-anchor="{anchor}" font-size="11">{text}</text></g>'
    )


def _open_tag(attributes: str, title: str) -> str:
    kept = re.sub(r'\b(width|height)="[^"]*"\s*', "", attributes)
    return (
        f'<svg {kept.strip()} role="img" aria-label="{escape(title)}" font-family="sans-serif" stroke-linejoin="round">'
    )
