"""A run's page: report.html, one file that needs nothing else, neither a script nor the network."""

import errno
from functools import partial
from pathlib import Path
from typing import Any

from selkd.errors import InputError, RunError
from selkd.reporting import benchmarks, changes, coloured_text, rendering, words
from selkd.reporting.chosen_keys import chosen_keys
from selkd.reporting.figure import can_draw, no_plots
from selkd.reporting.formats import dig
from selkd.reporting.measures import closeness, few_positions, storage_layouts
from selkd.reporting.run_files import RunFiles, read_run
from selkd.reporting.training_figures import loss_is_kl, true_kl
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
    changed = changes.change(run.held_out)
    html = rendering.render(
        "report.html.j2",
        get=partial(dig, run.record),
        words=words,
        closeness=closeness(run.record),
        few=few_positions(run.record),
        kl=true_kl(run.record),
        loss_is_kl=loss_is_kl(run.record),
        change=changed,
        continuations=changes.continuations(run.held_out),
        missing=changes.missing(run.held_out),
        new_tokens=dig(run.held_out, "new_tokens"),
        scores={when: benchmarks.scores(run.record, when) for when in ("before", "after")},
        cut=benchmarks.cut(run.record),
        layouts=storage_layouts(run.record),
        chosen=chosen_keys(dig(run.record, "recipe")),
        recipe_yaml=run.recipe_yaml.strip(),
        **_plots(run, changed),
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


def _plots(run: RunFiles, changed: changes.Change | None) -> dict[str, Any]:
    """The plots by where they stand; without matplotlib there are none, and the page says so."""
    if not can_draw():
        places = ("training_plots", "fidelity_plots", "histograms", "overlaps")
        return {"no_plots": no_plots(), "storage_plot": None, **dict.fromkeys(places, ())}
    from selkd.reporting import page_plots

    return {"no_plots": None, **page_plots.page_plots(run, changed)}


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
