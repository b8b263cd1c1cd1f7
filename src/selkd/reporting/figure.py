"""What every plot shares: its look, its colours, and how it becomes SVG for a page or pictures for a paper.

Colours are the page's own CSS variables, so a plot is light or dark with the page; each has a fallback, so that the
text is also a picture by itself. The same input gives the same bytes: no date, no random identifiers, no system font.
"""

import io
import re
from collections.abc import Iterator
from contextlib import contextmanager
from html import escape
from typing import Any

import matplotlib
from matplotlib import style
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.collections import Collection
from matplotlib.colors import to_hex, to_rgba
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch
from matplotlib.text import Text

# Stand-ins that nothing else draws with; the page's variables, or a paper's colours, take their place.
INK, MUTED, ACCENT = "#010101", "#020202", "#030303"
RULE, QUIET, PAPER = "#040404", "#050505", "#060606"
# Of several runs side by side, in this order; told apart with every common colour blindness.
SERIES = ("#030303", "#070707", "#080808", "#090909", "#0a0a0a", "#0b0b0b")
_VARIABLES = {
    INK: ("ink", "#1c2430"),
    MUTED: ("muted", "#626c79"),
    ACCENT: ("accent", "#0f766e"),
    RULE: ("rule", "#e2e5e9"),
    QUIET: ("quiet", "#c3cad2"),
    PAPER: ("paper", "#fdfdfc"),
    SERIES[1]: ("second", "#c2570c"),
    SERIES[2]: ("third", "#4659b8"),
    SERIES[3]: ("fourth", "#a3327e"),
    SERIES[4]: ("fifth", "#7a6a00"),
    SERIES[5]: ("sixth", "#3f7fa6"),
}
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


@contextmanager
def one_plot(height: int = _HEIGHT, width: int = _WIDTH) -> Iterator[tuple[Figure, Axes]]:
    """A figure of so many points with one pair of axes, in our style."""
    # after_reset: the user's own matplotlibrc has no say, or pages would differ between machines.
    with style.context(_STYLE, after_reset=True):
        figure = Figure(figsize=(width / 72, height / 72), layout="constrained")
        FigureCanvasSVG(figure)
        yield figure, figure.add_subplot()


def unit(axes: Axes, text: str) -> None:
    """Say what the upright axis measures, above it."""
    axes.set_title(text, loc="left", fontsize=11, color=MUTED, pad=8)


def svg(figure: Figure, name: str, title: str) -> str:
    """The figure as an SVG element to put inside a page. ``name`` is its own within the page."""
    buffer = io.StringIO()
    # The name salts the identifiers, so that plots of one page never share one.
    with matplotlib.rc_context({"svg.hashsalt": name}):
        figure.savefig(buffer, format="svg", transparent=True, metadata={"Date": None, "Creator": None})
    return _themed(buffer.getvalue(), title)


def _themed(svg: str, title: str) -> str:
    """Only the <svg> element, sized by the page, named for screen readers, coloured by the page's variables."""
    svg = svg[svg.index("<svg") :].strip()
    svg = re.sub(r"\s*<metadata>.*?</metadata>", "", svg, flags=re.DOTALL)
    # Matplotlib's style element speaks to every element of the page, and its group ids repeat from plot to plot.
    svg = re.sub(r"\s*<defs>\s*<style.*?</style>\s*</defs>", "", svg, count=1, flags=re.DOTALL)
    svg = re.sub(r'<g id="[^"]*"', "<g", svg)
    svg = re.sub(r"<svg ([^>]*?)>", lambda match: _open_tag(match.group(1), title), svg, count=1)
    # The page's own font; it is no wider than the one that the layout was measured with.
    svg = svg.replace("font-family: 'DejaVu Sans'; ", "")
    for stand_in, (variable, fallback) in _VARIABLES.items():
        svg = svg.replace(stand_in, f"var(--{variable}, {fallback})")
    return svg


def _open_tag(attributes: str, title: str) -> str:
    kept = re.sub(r'\b(width|height)="[^"]*"\s*', "", attributes)
    return (
        f'<svg {kept.strip()} role="img" aria-label="{escape(title)}" font-family="sans-serif" stroke-linejoin="round">'
    )


def pictures(figure: Figure, name: str) -> tuple[bytes, bytes]:
    """The figure for a paper, (PNG at 300 dots an inch, SVG), on white in the light page's colours.

    Call it last: the figure's colours are changed for good.
    """
    figure.draw_without_rendering()  # ticks come into being when they are drawn
    for artist in figure.findobj():
        _recolour(artist)
    png, drawing = io.BytesIO(), io.StringIO()
    FigureCanvasAgg(figure)
    figure.savefig(png, format="png", dpi=300, facecolor="white", metadata={"Software": None})
    FigureCanvasSVG(figure)
    with matplotlib.rc_context({"svg.hashsalt": name}):
        figure.savefig(drawing, format="svg", facecolor="white", metadata={"Date": None, "Creator": None})
    return png.getvalue(), drawing.getvalue().encode()


def _recolour(artist: Any) -> None:
    """Put a paper's colours in the place of the stand-ins."""
    if isinstance(artist, Line2D):
        artist.set_color(_real(artist.get_color()))
        artist.set_markerfacecolor(_real(artist.get_markerfacecolor()))
        artist.set_markeredgecolor(_real(artist.get_markeredgecolor()))
    elif isinstance(artist, Patch):
        artist.set_facecolor(_real(artist.get_facecolor()))
        artist.set_edgecolor(_real(artist.get_edgecolor()))
    elif isinstance(artist, Text):
        artist.set_color(_real(artist.get_color()))
    elif isinstance(artist, Collection):
        artist.set_edgecolor([_real(colour) for colour in artist.get_edgecolor()])
        artist.set_facecolor([_real(colour) for colour in artist.get_facecolor()])


def _real(colour: Any) -> Any:
    if isinstance(colour, str) and colour in ("none", "auto"):
        return colour
    known = _VARIABLES.get(to_hex(colour))
    return colour if known is None else to_rgba(known[1], to_rgba(colour)[3])
