"""A run's page: report.html, one file that needs nothing else, neither a script nor the network."""

import os
from pathlib import Path
from typing import Any

import jinja2
from markupsafe import Markup

from selkd.errors import RunError
from selkd.reporting import benchmarks, coloured_text, formats, selection_views, views, words
from selkd.reporting.formats import dig
from selkd.reporting.run_files import RunFiles, read_run

SHOWN_SAMPLES = 3  # the examples hold more, for the histogram


def write_page(run_dir: Path, out: Path | None = None) -> Path:
    """Write report.html from the run's files into the folder ``out`` (run_dir if not given) and return its path.

    record.json and recipe.yaml are needed; the rest may be absent, and what a stage did not produce shows as a dash.

    Raises InputError where run_dir is not a run or a file in it is damaged, RunError where the page can't be written.
    """
    text = render(read_run(run_dir))
    folder = run_dir if out is None else out
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise RunError(f"{folder}: can't be made ({error}). Give another --out.") from None
    return write_text(folder / "report.html", text)


def write_text(path: Path, text: str) -> Path:
    """Write a file whole or not at all. Raises RunError where it can't be written."""
    # A lone surrogate in a name can't be UTF-8: a question mark stands for it.
    return write_bytes(path, text.encode("utf-8", errors="replace"))


def write_bytes(path: Path, content: bytes) -> Path:
    """Write a file whole or not at all. Raises RunError where it can't be written."""
    unfinished = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        unfinished.write_bytes(content)
        unfinished.replace(path)
    except OSError as error:
        unfinished.unlink(missing_ok=True)
        raise RunError(
            f"could not write {path}: {error.strerror}. "
            f"Make room or allow writing there, then run the same command again."
        ) from error
    return path


def template(name: str) -> jinja2.Template:
    """One of our templates, with every value escaped but what passes through the filter ``plot``."""
    # Not select_autoescape: it goes by the ending, and .j2 would switch escaping off.
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("selkd.reporting"),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    # Only our own plots are let through unescaped.
    environment.filters["plot"] = Markup
    return environment.get_template(name)


def render(run: RunFiles) -> str:
    """The page's HTML."""
    # Each section is told in views.py, and laid out in the template.
    return template("report.html.j2").render(
        header=views.header(run.record),
        headline=views.headline(run.record),
        fidelity=views.fidelity(run.record),
        training=views.training(run),
        selection=selection_views.selection(run),
        benchmarks=views.benchmark_table(run.record),
        cut=benchmarks.cut(run.record),
        text=_text(run),
        storage=views.storage(run.record),
        costs=views.costs(run.record),
        facts=views.facts(run.record),
        recipe_yaml=run.recipe_yaml.strip(),
        dash=formats.DASH,
    )


def _text(run: RunFiles) -> dict[str, Any]:
    samples = [] if run.examples is None else run.examples["samples"][:SHOWN_SAMPLES]
    name = dig(run.examples, "metric")
    scale, unit = coloured_text.heat_scale(samples), words.metric_unit(name)
    return {
        "metric": words.metric(name),
        "unit": unit,
        "low": formats.nats(scale[0]) if scale[0] else "0",
        "high": formats.nats(scale[1]),
        "levels": coloured_text.HEAT_LEVELS,
        "samples": [
            {"id": str(dig(sample, "sample_id") or ""), "tokens": coloured_text.token_views(sample, scale, unit)}
            for sample in samples
        ],
    }
