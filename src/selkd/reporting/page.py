"""A run's page: report.html, one file that needs nothing else, neither a script nor the network."""

import errno
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from selkd.errors import InputError, RunError
from selkd.reporting import benchmarks, coloured_text, formats, plots, rendering, words
from selkd.reporting.figure import Plot, can_draw, no_plots
from selkd.reporting.formats import dig
from selkd.reporting.measures import closeness
from selkd.reporting.run_files import RunFiles, read_run
from selkd.sealed import REPORT

_READ_ONLY = (errno.EROFS, errno.EACCES, errno.EPERM)
SHOWN_SAMPLES = 3  # the examples hold more, for the histogram


def write_page(run_dir: Path, out: Path | None = None) -> Path:
    """Write report.html from the run's files into the folder ``out`` (run_dir if not given) and return its path.

    A page that is there already, the same, is left as it is.

    record.json and recipe.yaml are needed; the rest may be absent, and what a stage did not produce shows as a dash.
    The template reads the record itself; only what is more than one of its values is made here.

    Raises:
        InputError: run_dir is not a run, or a file in it is damaged, or its folder may not be written.
        RunError: the page can't be written.
    """
    run = read_run(run_dir)
    html = rendering.render(
        "report.html.j2",
        get=partial(dig, run.record),
        words=words,
        closeness=closeness(run.record),
        no_plots=no_plots(),
        training_plots=training_plots(run) if can_draw() else [],
        histograms=_histograms(run) if can_draw() else [],
        overlaps=_overlaps(run) if can_draw() else [],
        scores={when: benchmarks.scores(run.record, when) for when in ("before", "after")},
        cut=benchmarks.cut(run.record),
        layouts=_storage_layouts(run.record),
        storage_plot=_storage_plot(run.record) if can_draw() else None,
        recipe_yaml=run.recipe_yaml.strip(),
        **_text(run),
    )
    page = (out or run_dir) / REPORT
    if page.is_file() and page.read_bytes() == html.encode("utf-8", errors="replace"):
        return page
    try:
        return rendering.write_text(page, html)
    except RunError as error:
        reason = error.__cause__
        if not isinstance(reason, OSError) or reason.errno not in _READ_ONLY:
            raise
        raise InputError(
            f"{page.parent}: the page can't be written there ({reason.strerror}). `selkd report {run_dir} --out DIR` "
            "writes it elsewhere."
        ) from None


def training_plots(run: RunFiles) -> list[Plot]:
    """The plots of the training log; none where it has no loss."""
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
    # How approximate scoring agrees with exact scoring; on held-out text, the student's agreement with its teacher.
    for key in sorted(key for key in keys if key.endswith("agreement") and not key.startswith("held_out"))[:1]:
        caption = "How many of the positions that exact scores would select the quick, approximate scores found."
        line, measured = plots.logged(metrics, key), "of the exact selection"
        drawn.append(plots.step_plot("agreement", "Approximate scoring", caption, measured, [line], "agreement"))
    return drawn


def _held_out_kl(run: RunFiles) -> plots.Line:
    """KL to the teacher on held-out text, in nats: before, during and after training."""
    by_step = {0: dig(run.record, "fidelity", "before", "kl_nats")}
    by_step |= {
        line["step"]: line["held_out_kl_nats"] for line in run.metrics if line.get("held_out_kl_nats") is not None
    }
    if (steps := dig(run.record, "train", "steps")) is not None:
        by_step[steps] = dig(run.record, "fidelity", "after", "kl_nats")
    points = np.array([point for point in sorted(by_step.items()) if point[1] is not None], dtype=np.float64)
    steps, values = points.reshape(-1, 2).T
    return plots.Line(steps, values, "all, held-out", is_reference=True, is_marked=True)


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


def _text(run: RunFiles) -> dict[str, Any]:
    """The tokens of a few examples, ready to show, and the scale of their colours."""
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


def _storage_layouts(record: dict[str, Any]) -> dict[str, float | None]:
    """Bytes a position of the teacher cache, and of the two usual ways to store a teacher's signal."""
    cache = dig(record, "teacher_cache")
    return {
        "this run’s cache": dig(cache, "bytes_per_position"),
        "fixed width, 3 bytes a draw": dig(cache, "fixed_width_bytes_per_position"),
        "full logits in bfloat16": dig(cache, "full_logits_bytes_per_position"),
    }


def _storage_plot(record: dict[str, Any]) -> Plot | None:
    """The layouts on one axis, if the run's own and another are known."""
    own, *others = _storage_layouts(record).items()
    known = [(name, float(size)) for name, size in (own, *others) if size]
    return plots.storage_plot(known) if own in known and len(known) > 1 else None
