"""The plots of one run's page, made from the run's files. Only where matplotlib is installed."""

from typing import Any

import numpy as np

from selkd.reporting import formats, plots, words
from selkd.reporting.changes import Change
from selkd.reporting.figure import Plot
from selkd.reporting.formats import dig
from selkd.reporting.measures import storage_layouts
from selkd.reporting.run_files import RunFiles
from selkd.reporting.training_plots import training_plots


def page_plots(run: RunFiles, changed: Change | None) -> dict[str, Any]:
    """The plots by where they stand in the page."""
    return {
        "training_plots": training_plots(run),
        "fidelity_plots": _fidelity_plots(run.record, changed),
        "histograms": _histograms(run),
        "overlaps": _overlaps(run),
        "storage_plot": _storage_plot(run.record),
    }


def _fidelity_plots(record: dict[str, Any], changed: Change | None) -> list[Plot]:
    drawn = []
    before, after = (dig(record, "fidelity", "by_entropy", when) for when in ("before", "after"))
    if before and after and any(old["positions"] and new["positions"] for old, new in zip(before, after, strict=True)):
        drawn.append(plots.by_entropy_plot(before, after))
    if changed is not None and changed.positions > 1:
        drawn.append(plots.distances_plot(changed.before, changed.after, changed.measured))
    return drawn


def _histograms(run: RunFiles) -> list[Plot]:
    """Histograms of the positions' and the samples' scores, where there are any."""
    drawn = []
    # All samples of the examples count, also those whose text the page does not show.
    positions = [
        (score, is_selected)
        for sample in dig(run.examples, "samples") or []
        for score, is_selected, is_valid in zip(sample["scores"], sample["selected"], sample["valid"], strict=True)
        if is_valid and score is not None and np.isfinite(score)
    ]
    if positions:
        metric = dig(run.examples, "metric")
        scores, selected = np.array(positions, dtype=np.float64).T
        # A run that holds nothing out shows what it trained on.
        text = "training text" if dig(run.record, "data", "held_out_samples") == 0 else "held-out text"
        caption = (
            f"{formats.count(len(scores))} positions of {text} by {words.metric(metric)}, after training. The "
            f"{formats.count(selected.sum())} coloured ones are those that the recipe selects; every sample has its "
            "own cut."
        )
        label = _axis_label(metric, "at a position")
        drawn.append(plots.score_histogram("positions", caption, scores, selected > 0, label))
    if (samples := run.scored_samples) is not None and len(samples.scores):
        metric = dig(run.record, "recipe", "samples", "metric")
        caption = (
            f"Before training, each of {formats.count(len(samples.scores))} samples was scored by "
            f"{'score' if metric is None else words.metric(metric)}; the {formats.count(samples.kept.sum())} coloured "
            "ones were kept."
        )
        label = _axis_label(metric, "mean of a sample")
        drawn.append(plots.score_histogram("samples", caption, samples.scores, samples.kept, label))
    return drawn


def _axis_label(metric: str | None, what: str) -> str:
    unit = words.metric_unit(metric)
    label = f"{'score' if metric is None else words.metric(metric)}, {what}" + (f", {unit}" if unit else "")
    # A user's metric may carry a long name, and the axis has room for 60 letters.
    return label if len(label) <= 60 else label[:59] + "…"


def _overlaps(run: RunFiles) -> list[Plot]:
    """The heat maps of what several metrics choose, where they were measured."""
    titles: dict[plots.Scored, str] = {"positions": "Position metrics", "samples": "Sample filters"}
    return [
        plots.overlap_map(what, title, run.overlaps[what]) for what, title in titles.items() if what in run.overlaps
    ]


def _storage_plot(record: dict[str, Any]) -> Plot | None:
    """The layouts on one axis, if the run's own and another are known."""
    own, *others = storage_layouts(record).items()
    known = [(name, float(size)) for name, size in (own, *others) if size]
    return plots.storage_plot(known) if own in known and len(known) > 1 else None
