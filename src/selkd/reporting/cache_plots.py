"""Histograms of a teacher cache, as SVG files."""

from pathlib import Path

import numpy as np
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.figure import Figure

from selkd.cache.inspect import Contents
from selkd.errors import RunError

ACCENT = "#0f766e"


def write_plots(found: Contents, folder: Path) -> list[Path]:
    """Write the histograms into ``folder`` (made if needed), over files of the same names; returns their paths.

    Raises:
        RunError: the disk refused.
    """
    histograms = {
        "classes": ("distinct classes a position", found.classes, None),
        "bytes": ("bytes a position, of a sample", found.sample_bytes_per_position, None),
        "counts": ("times a class was drawn", np.arange(len(found.counts)), found.counts),
    }
    if len(found.covered_mass):
        histograms["covered_mass"] = ("teacher's mass covered (estimate)", found.covered_mass, None)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        return [_write(folder / f"{name}.svg", *histogram) for name, histogram in histograms.items()]
    except OSError as error:
        raise RunError(f"{folder}: plots can't be written ({error}).") from error


def _write(path: Path, label: str, values: np.ndarray, weights: np.ndarray | None) -> Path:
    figure = Figure(figsize=(5, 3), layout="constrained")
    axes = figure.add_subplot()
    least, most = float(values.min(initial=0)), float(values.max(initial=0))
    is_whole = np.issubdtype(values.dtype, np.integer) and most - least < 200
    edges = np.arange(least, most + 2) - 0.5 if is_whole else np.linspace(least, most or 1.0, 41)
    axes.hist(values, bins=edges.tolist(), weights=weights, color=ACCENT)
    axes.set_xlabel(label)
    axes.set_ylabel("classes" if weights is not None else "samples" if path.stem == "bytes" else "positions")
    if weights is not None:
        axes.set_yscale("log")
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
    FigureCanvasSVG(figure).print_svg(str(path), metadata={"Date": None})
    return path
