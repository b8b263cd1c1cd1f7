"""From a run's files to what the sections of its page show where that is more than a value of the record."""

from typing import Any

import numpy as np

from selkd.reporting import coloured_text, formats, plots, selection_plots, words
from selkd.reporting.figure import Plot
from selkd.reporting.formats import dig
from selkd.reporting.run_files import RunFiles
from selkd.reporting.selection_plots import Scored

SHOWN_SAMPLES = 3  # the examples hold more, for the histogram


def training_plots(run: RunFiles) -> list[Plot]:
    """The plots of what the training log has, if it has a loss."""
    metrics = run.metrics
    keys = {key for line in metrics for key, value in line.items() if value is not None}
    if "loss" not in keys:
        return []
    caption = "The loss that training minimises: the student’s distance from the teacher at the selected positions"
    if (weight := dig(run.record, "recipe", "criterion", "kd_weight")) is not None and weight < 1:
        caption += f", mixed with {formats.fraction(1 - weight)} cross-entropy on the true next token"
    drawn = [plots.step_plot("loss", "Loss", f"{caption}.", "loss", [plots.logged(metrics, "loss")])]
    held_out = _held_out_kl(run)
    if "kd_nats" in keys or len(held_out.steps):
        drawn.append(
            plots.step_plot(
                "divergence",
                "Divergence from the teacher",
                "The mean over the selected positions of the training text; beside it KL over every position of "
                "held-out text, where it was measured.",
                "divergence from the teacher, nats",
                [plots.logged(metrics, "kd_nats", "selected, training"), held_out],
            )
        )
    if {"selected_entropy_nats", "mean_entropy_nats"} <= keys:
        drawn.append(
            plots.step_plot(
                "entropy",
                "Where the student was unsure",
                "Entropy is how undecided the student is about the next token: the wider apart the lines, the more "
                "the selection seeks out hard positions.",
                "student's entropy, nats",
                [
                    plots.logged(metrics, "selected_entropy_nats", "selected"),
                    plots.logged(metrics, "mean_entropy_nats", "all positions", is_reference=True),
                ],
            )
        )
    if "selected_share" in keys:
        caption = "The part of all positions that the loss looked at, step by step."
        line = plots.logged(metrics, "selected_share")
        drawn.append(plots.step_plot("share", "Share selected", caption, "selected positions", [line], "share"))
    # Of approximate with exact scoring; the student's with its teacher is logged on held-out text.
    for key in sorted(key for key in keys if key.endswith("agreement") and not key.startswith("held_out"))[:1]:
        caption = "How many of the positions that exact scores would select the quick, approximate scores found."
        line, measured = plots.logged(metrics, key), "of the exact selection"
        drawn.append(plots.step_plot("agreement", "Approximate scoring", caption, measured, [line], "agreement"))
    return drawn


def _held_out_kl(run: RunFiles) -> plots.Line:
    """KL on the held-out text in nats: before training, every so many steps, after it."""
    by_step = {0: dig(run.record, "fidelity", "before", "kl_nats")}
    by_step |= {
        line["step"]: line["held_out_kl_nats"] for line in run.metrics if line.get("held_out_kl_nats") is not None
    }
    if (steps := dig(run.record, "train", "steps")) is not None:
        by_step[steps] = dig(run.record, "fidelity", "after", "kl_nats")
    points = np.array([point for point in sorted(by_step.items()) if point[1] is not None], dtype=np.float64)
    steps, values = points.reshape(-1, 2).T
    return plots.Line(steps, values, "all, held-out", is_reference=True, is_marked=True)


def histograms(run: RunFiles) -> list[Plot]:
    """How the scores of the positions and of the samples spread, where there are any."""
    drawn = []
    # Over every sample of the examples, also those whose text the page does not show.
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
        drawn.append(selection_plots.score_histogram("positions", caption, scores, selected > 0, label))
    if (samples := run.scored_samples) is not None and len(samples.scores):
        metric = dig(run.record, "recipe", "samples", "metric")
        caption = (
            f"Before training, each of {formats.count(len(samples.scores))} samples was scored by "
            f"{'score' if metric is None else words.metric(metric)}; the {formats.count(samples.kept.sum())} coloured "
            "ones were kept."
        )
        label = _axis_label(metric, "mean of a sample")
        drawn.append(selection_plots.score_histogram("samples", caption, samples.scores, samples.kept, label))
    return drawn


def _axis_label(metric: str | None, of: str) -> str:
    unit = words.metric_unit(metric)
    label = f"{'score' if metric is None else words.metric(metric)}, {of}" + (f", {unit}" if unit else "")
    # A user's metric may carry a long name: the axis has room for so much.
    return label if len(label) <= 60 else label[:59] + "…"


def overlaps(run: RunFiles) -> list[Plot]:
    """The heat maps of what several metrics choose, where they were measured."""
    titles: dict[Scored, str] = {"positions": "Position metrics", "samples": "Sample filters"}
    return [
        selection_plots.overlap_map(what, title, run.overlaps[what])
        for what, title in titles.items()
        if what in run.overlaps
    ]


def text(run: RunFiles) -> dict[str, Any]:
    """The tokens of a few examples as views, and what colours them."""
    samples = [] if run.examples is None else run.examples["samples"][:SHOWN_SAMPLES]
    metric = dig(run.examples, "metric")
    scale, unit = coloured_text.heat_scale(samples), words.metric_unit(metric)
    return {
        "metric": words.metric(metric),
        "unit": unit,
        "scale": scale,
        "samples": [
            (dig(sample, "sample_id") or "", coloured_text.token_views(sample, scale, unit)) for sample in samples
        ],
    }


def storage_layouts(record: dict[str, Any]) -> dict[str, float | None]:
    """Bytes a position of the teacher cache, and of the two usual ways to store a teacher's signal."""
    cache = dig(record, "teacher_cache")
    return {
        "this run’s cache": dig(cache, "bytes_per_position"),
        "fixed width, 3 bytes a draw": dig(cache, "fixed_width_bytes_per_position"),
        "full logits in bfloat16": dig(cache, "full_logits_bytes_per_position"),
    }


def storage_plot(record: dict[str, Any]) -> Plot | None:
    """The layouts on one axis, if the run's own is known and another."""
    ours, *others = storage_layouts(record).items()
    known = [(name, float(size)) for name, size in (ours, *others) if size]
    return plots.storage_plot(known) if ours in known and len(known) > 1 else None
