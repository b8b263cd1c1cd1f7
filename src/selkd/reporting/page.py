"""A run's page: report.html, one file that needs nothing else, neither a script nor the network."""

from functools import partial
from pathlib import Path

from selkd.reporting import benchmarks, rendering, views, words
from selkd.reporting.formats import dig
from selkd.reporting.measures import closeness
from selkd.reporting.run_files import RunFiles, read_run


def write_page(run_dir: Path, out: Path | None = None) -> Path:
    """Write report.html from the run's files into the folder ``out`` (run_dir if not given) and return its path.

    record.json and recipe.yaml are needed; the rest may be absent, and what a stage did not produce shows as a dash.

    Raises InputError where run_dir is not a run or a file in it is damaged, RunError where the page can't be written.
    """
    return rendering.write_text((out or run_dir) / "report.html", render(read_run(run_dir)))


def render(run: RunFiles) -> str:
    """The page's HTML. The template reads the record itself; views.py makes what is more than one of its values."""
    return rendering.render(
        "report.html.j2",
        get=partial(dig, run.record),
        words=words,
        closeness=closeness(run.record),
        training_plots=views.training_plots(run),
        histograms=views.histograms(run),
        overlaps=views.overlaps(run),
        scores={when: benchmarks.scores(run.record, when) for when in ("before", "after")},
        cut=benchmarks.cut(run.record),
        layouts=views.storage_layouts(run.record),
        storage_plot=views.storage_plot(run.record),
        recipe_yaml=run.recipe_yaml.strip(),
        **views.text(run),
    )
