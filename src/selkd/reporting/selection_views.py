"""From a run's files to the page's section on what was selected: axes, histograms, overlaps."""

from typing import Any

import numpy as np

from selkd.reporting import formats, selection_plots, words
from selkd.reporting.formats import dig
from selkd.reporting.run_files import Overlap, RunFiles, SampleScores


def selection(run: RunFiles) -> dict[str, Any]:
    """The three axes, each as a share, its counts and its rule; the histogram of the samples' scores."""
    recipe, counts = dig(run.record, "recipe"), dig(run.record, "counts")
    samples, kept = dig(counts, "samples"), dig(counts, "samples_kept")
    valid, selected = dig(counts, "positions_valid"), dig(counts, "positions_selected")
    draws = dig(recipe, "classes", "draws")
    axes = [
        {
            "name": "Samples",
            "figure": formats.percent(formats.share(kept, samples)),
            "counts": f"{formats.count(kept)} of {formats.count(samples)}",
            "rule": words.samples(recipe),
        },
        {
            "name": "Positions",
            "figure": formats.percent(formats.share(selected, valid)),
            "counts": f"{formats.count(selected)} of {formats.count(valid)}, all steps together",
            "rule": words.positions(recipe),
        },
        {
            "name": "Classes",
            "figure": "all" if dig(recipe, "classes", "sampler") == "all" else formats.count(draws),
            "counts": "the whole vocabulary" if draws is None else "draws a position",
            "rule": words.classes(recipe),
        },
    ]
    return {
        "axes": axes,
        "teacher_tokens": formats.count(dig(counts, "teacher_tokens")),
        "samples": _sample_histogram(run.sample_scores, dig(recipe, "samples", "metric")),
        "positions": _position_histogram(run.examples),
        "overlaps": _overlaps(run),
    }


def _sample_histogram(found: SampleScores | None, metric: str | None) -> dict[str, Any] | None:
    if found is None or not len(found.scores):
        return None
    return {
        "plot": selection_plots.score_histogram(found.scores, found.kept, _axis_label(metric, "mean of a sample")),
        "kept": formats.count(int(np.sum(found.kept))),
        "scored": formats.count(len(found.scores)),
        "by": "score" if metric is None else words.metric(metric),
    }


def _position_histogram(examples: dict[str, Any] | None) -> dict[str, Any] | None:
    """Over every sample of the examples, also those whose text the page does not show."""
    scores, selected = [], []
    for sample in dig(examples, "samples") or []:
        for score, is_selected, is_valid in zip(sample["scores"], sample["selected"], sample["valid"], strict=True):
            if is_valid and score is not None and np.isfinite(score):
                scores.append(float(score))
                selected.append(bool(is_selected))
    if not scores:
        return None
    metric = dig(examples, "metric")
    return {
        "plot": selection_plots.position_histogram(
            np.array(scores), np.array(selected), _axis_label(metric, "at a position")
        ),
        "selected": formats.count(sum(selected)),
        "scored": formats.count(len(scores)),
        "by": words.metric(metric),
    }


def _axis_label(metric: str | None, of: str) -> str:
    unit = words.metric_unit(metric)
    label = f"{'score' if metric is None else words.metric(metric)}, {of}" + (f", {unit}" if unit else "")
    # A user's metric may carry a long name: the axis has room for so much.
    return label if len(label) <= 60 else label[:59] + "…"


def _overlaps(run: RunFiles) -> list[dict[str, str]]:
    """The heat maps that there are."""
    maps: list[dict[str, str]] = []
    found: tuple[tuple[str, str, Overlap | None], ...] = (
        ("positions", "Position metrics", run.position_overlap),
        ("samples", "Sample filters", run.sample_overlap),
    )
    for what, title, overlap in found:
        if overlap is not None:
            told = f"Overlap of the {what} that each metric chooses, in percent"
            plot = selection_plots.overlap_map(overlap.metrics, overlap.overlap, told, f"overlap-{what}")
            maps.append({"title": title, "what": what, "plot": plot})
    return maps
