"""The command line. Every command imports its modules when it runs, so that ``selkd --help`` is quick.

Exit codes: 0 done, 1 failed while running, 2 bad input, 75 interrupted, 130 ended at once by a second Ctrl-C; after the
last two the same command continues. ``--json`` prints the answer to standard output; progress and messages go to
standard error.
"""

import json
import os
import signal
import sys
from pathlib import Path
from typing import Annotated

import typer
from typer import Argument, Option

from selkd.cli.cache import cache_app
from selkd.cli.ending import leave_at_once, leave_process_group, leaving_on_signals, say
from selkd.cli.options import (
    Json,
    Markdown,
    MaxHours,
    NoPlugins,
    Out,
    Overrides,
    RecipeName,
    limited,
    load,
    named_recipe,
    own_code,
    possible,
    print_answer,
    print_groups,
    print_json,
    quiet,
)
from selkd.cli.showing import show_comparison, show_runs
from selkd.cli.tokens import tokens
from selkd.cli.verify import verify
from selkd.errors import InputError, Interrupted, RunError
from selkd.extras import is_installed, need
from selkd.interrupts import end_with_launcher

app = typer.Typer(no_args_is_help=True, pretty_exceptions_enable=False)
app.add_typer(cache_app, name="cache")
app.command()(verify)


def main() -> None:
    """The console script. ``--debug``, anywhere, shows the traceback of an error."""
    debug = "--debug" in sys.argv
    sys.argv = [argument for argument in sys.argv if argument != "--debug"]
    end_with_launcher(signal.SIGKILL)  # nothing is done yet
    try:
        with leaving_on_signals():
            app()
    except SystemExit as stop:
        if stop.code == 130:  # Typer's code for Ctrl-C
            leave_at_once()
        if not stop.code:
            leave_process_group()
        raise
    except (InputError, RunError, Interrupted) as error:
        if debug:
            raise
        say(str(error))
        sys.exit(2 if isinstance(error, InputError) else 1 if isinstance(error, RunError) else os.EX_TEMPFAIL)
    except Exception as error:
        if debug:
            raise
        message = f"failed while running ({type(error).__name__}: {error}). Finished stages are kept"
        say(f"{message}; --debug shows where it happened.")
        sys.exit(1)


def _print_version(is_asked: bool) -> None:
    if is_asked:
        from selkd import __version__

        typer.echo(f"selkd {__version__}")
        raise typer.Exit


@app.callback()
def root(
    debug: Annotated[bool, Option("--debug", help="Show an error's traceback; anywhere in the line.")] = False,
    version: Annotated[
        bool, Option("--version", callback=_print_version, is_eager=True, help="Print the version and leave.")
    ] = False,
) -> None:
    """Selective knowledge distillation of causal language models: choose positions, classes and samples."""


@app.command()
def demo(
    out: Out = None,
    compare: Annotated[bool, Option("--compare", help="Also run Full KD on the same samples.")] = False,
    overrides: Overrides = None,
    max_hours: MaxHours = None,
    json_output: Json = False,
) -> None:
    """Distil a real 135M model on this machine: SE-KD 3X on the embedded default, in minutes."""
    recipe = load("demo", limited(overrides, max_hours))
    from selkd.run.pipeline import distill, full_kd_on_same_samples
    from selkd.run.watch import watched

    with watched(recipe.run):  # one time limit for both
        run = distill(recipe, out)
        runs = [run, full_kd_on_same_samples(run)] if compare else [run]
    show_runs(runs, json_output)


@app.command("distill")
def distill_command(
    recipe: RecipeName,
    out: Out = None,
    overrides: Overrides = None,
    max_hours: MaxHours = None,
    no_plugins: NoPlugins = False,
    json_output: Json = False,
) -> None:
    """Score, cache, train, evaluate and report. Repeat the command to continue an interrupted run."""
    loaded = load(recipe, limited(overrides, max_hours), no_plugins)
    from selkd.run.pipeline import distill

    show_runs([distill(loaded, out)], json_output)


@app.command()
def score(
    recipe: RecipeName,
    out: Out = None,
    overrides: Overrides = None,
    max_hours: MaxHours = None,
    no_plugins: NoPlugins = False,
    json_output: Json = False,
) -> None:
    """Score the samples with the frozen initial student and choose which to keep."""
    loaded = load(recipe, limited(overrides, max_hours), no_plugins)
    from selkd.run.pipeline import score_only

    run = score_only(loaded, out)
    scores = run.path / "selection" / "samples.parquet"
    counts = {key: run.record["counts"][key] for key in ("samples", "samples_kept")}
    print_answer({**counts, "scores": str(scores) if scores.exists() else None}, json_output)
    if loaded.samples is None:
        say(
            "the recipe has no samples part and keeps every sample, so none was scored: the text was tokenised and "
            "counted. To score and keep the highest, give --set 'samples={metric: student_entropy, fraction: 0.2}'."
        )


@app.command("eval")
def eval_command(
    models: Annotated[
        list[str],
        Argument(
            callback=possible,
            metavar="[NAME=]MODEL...",
            help="demo, a model's or run's folder, or a hub id; several compare.",
        ),
    ],
    suite: Annotated[
        list[str] | None,
        Option(
            help="What to measure with: fidelity (if not given), paper, validation, a benchmark, a task of "
            "lm-evaluation-harness or the path of your own task's YAML file. May be repeated."
        ),
    ] = None,
    include_path: Annotated[
        list[Path] | None,
        Option(callback=possible, metavar="DIR", help="A folder with tasks of your own. May be repeated."),
    ] = None,
    teacher: Annotated[
        str | None, Option(callback=possible, help="Fidelity's teacher: demo, a folder or a hub id.")
    ] = None,
    text: Annotated[
        str, Option(callback=possible, help="Fidelity's text: demo, a text file, a folder of them or a hub data set.")
    ] = "demo",
    text_field: Annotated[str | None, Option(help="The field that holds the text; text if not given.")] = None,
    prompt_field: Annotated[
        str | None, Option(help="The field that holds a prompt; its completion, and no text, is measured.")
    ] = None,
    completion_field: Annotated[str | None, Option(help="The field that holds the prompt's completion.")] = None,
    messages_field: Annotated[
        str | None, Option(help="The field that holds a conversation; the assistant's turns are measured.")
    ] = None,
    template: Annotated[str | None, Option(help="How a prompt reads, as a recipe's data.template.")] = None,
    data: Annotated[
        list[Path] | None,
        Option(
            callback=possible,
            help="A folder of .jsonl files with the benchmarks' rows, in place of the hub. May be repeated.",
        ),
    ] = None,
    limit: Annotated[
        int | None,
        Option(
            min=1,
            help="At most so many examples of a task, spread evenly; of fidelity, the first so many windows of text.",
        ),
    ] = None,
    shots: Annotated[int, Option(min=0, help="How many solved examples stand before a question.")] = 0,
    chat_template: Annotated[bool, Option("--chat-template", help="Put prompts into the chat template.")] = False,
    batch_size: Annotated[int | None, Option(min=1, help="Prompts at once; as many as fit if not given.")] = None,
    dtype: Annotated[str, Option(help="The weights' precision: auto, float32, bfloat16 or float16.")] = "auto",
    out: Annotated[Path, Option(callback=possible, help="The folder that keeps the results.")] = Path("evals"),
    no_plugins: NoPlugins = False,
    json_output: Json = False,
) -> None:
    """Measure models: fidelity to a teacher, the paper's benchmarks, any task. Compare the first with the others."""
    from selkd.evaluation.options import BenchmarkOptions, FidelityOptions, checked_options

    folders, own = ([str(folder) for folder in given] if given else None for given in (data, include_path))
    benchmarks = BenchmarkOptions(suite or ["fidelity"], folders, limit, shots, chat_template, batch_size, own)
    measured = FidelityOptions(text, text_field, limit, prompt_field, completion_field, messages_field, template)
    with own_code(no_plugins):
        checked_options(benchmarks, measured, teacher, dtype)
    from selkd.evaluation.command import evaluate_models
    from selkd.recipe.recipe import RunOptions
    from selkd.run.watch import watched

    quiet()
    with watched(RunOptions()):
        answer = evaluate_models(models, benchmarks, measured, teacher, dtype, out)
    if json_output:
        typer.echo(json.dumps(answer, indent=2, allow_nan=False))
        return
    from rich.console import Console

    from selkd.reporting.evaluation_tables import print_evaluation

    print_evaluation(Console(), answer)


@app.command()
def recipes(
    name: Annotated[
        str | None, Argument(autocompletion=named_recipe, help="The recipe to print; lists all if not given.")
    ] = None,
    json_output: Json = False,
) -> None:
    """List the named recipes, or print one."""
    from selkd.errors import nearest
    from selkd.recipe.files import named_recipes
    from selkd.recipe.groups import grouped

    named = named_recipes()
    if name is None:
        first_lines = {key: text.splitlines()[0].removeprefix("# ") for key, text in named.items()}
        if json_output:
            print_json(first_lines)
        else:
            print_groups(grouped(first_lines))
    elif name not in named:
        raise InputError(f"{name}: no such recipe. Named recipes: {', '.join(named)}.{nearest(name, named)}")
    elif json_output:
        print_json({"name": name, "yaml": named[name]})
    else:
        typer.echo(named[name], nl=False)


@app.command()
def bench(
    recipe: RecipeName,
    overrides: Overrides = None,
    repeats: Annotated[int, Option(min=1, help="How often all variants are run, after once to warm up.")] = 5,
    variant: Annotated[list[str] | None, Option(help="Run this variant and the floor alone. May be repeated.")] = None,
    memory: Annotated[bool, Option(help="Measure peak memory too, in a process for each variant.")] = True,
    trace: Annotated[
        Path | None,
        Option(callback=possible, metavar="DIR", help="The folder for memory.json and memory.svg, memory over time."),
    ] = None,
    quick: Annotated[bool, Option("--quick", help="The main variants in one turn, with at most 2 samples.")] = False,
    no_plugins: NoPlugins = False,
    json_output: Json = False,
) -> None:
    """Measure a recipe's step against its floor and against plain Full KD, on this machine: seconds and memory."""
    from selkd.bench.names import checked_variants

    checked_variants(variant, repeats)
    if trace is not None and not is_installed("matplotlib"):
        raise InputError(f"--trace: drawing memory over time {need('matplotlib')}")
    loaded = load(recipe, overrides, no_plugins)
    from selkd.bench.report import bench as measure

    answer = measure(loaded, repeats=repeats, variants=variant, memory=memory, trace=trace, quick=quick)
    if json_output:
        print_json(answer)
        return
    from rich.console import Console

    from selkd.reporting.tables import bench_table

    console = Console()
    console.print(bench_table(answer))
    for note in answer["notes"]:
        console.print(note, highlight=False, markup=False)
    if trace is not None and (trace / "memory.svg").exists():
        console.print(f"memory over time  {trace / 'memory.svg'}", soft_wrap=True, highlight=False)


@app.command()
def estimate(
    recipe: RecipeName,
    gpus: Annotated[
        int | None, Option(min=1, help="Accelerators to plan for; this machine's device if not given.")
    ] = None,
    tokens: Annotated[int | None, Option(min=2, help="Training tokens to plan for; the recipe's if not given.")] = None,
    probe: Annotated[bool, Option("--probe", help="Run a few steps here to measure time and cache bytes.")] = False,
    overrides: Overrides = None,
    no_plugins: NoPlugins = False,
    json_output: Json = False,
) -> None:
    """Estimate a recipe's memory, teacher queries and cache before they are spent; with --probe, time, too."""
    loaded = load(recipe, overrides, no_plugins)
    from selkd.estimate.estimate import estimate as estimated
    from selkd.reporting.tables import estimate_tables

    answer = estimated(loaded, gpus=gpus, tokens=tokens, with_probe=probe)
    if json_output:
        print_json(answer)
        return
    from rich import print as rich_print

    for table in estimate_tables(answer):
        rich_print(table)


@app.command("sweep")
def sweep_command(
    study: Annotated[
        str, Argument(metavar="STUDY", help="A named study (demo_positions, demo_budgets) or a YAML file.")
    ],
    out: Annotated[
        Path | None, Option(callback=possible, help="The study's folder; runs/<study name> if not given.")
    ] = None,
    overrides: Overrides = None,
    max_hours: MaxHours = None,
    no_plugins: NoPlugins = False,
    markdown: Markdown = False,
    json_output: Json = False,
) -> None:
    """Run every recipe of a study with every seed and write one table. Repeat the command to continue or to retry."""
    from selkd.recipe.files import parse_override
    from selkd.recipe.part import parse_part
    from selkd.recipe.recipe import RunOptions
    from selkd.reporting.formats import counted
    from selkd.run.watch import watched
    from selkd.sweep.study import load_study
    from selkd.sweep.sweep import sweep

    name, content, folder = load_study(study)
    keys = dict(parse_override(override) for override in overrides or [])
    options = parse_part(RunOptions, {"max_hours": max_hours}, "run")
    with own_code(no_plugins), watched(options):
        result = sweep(name, content, folder, out or Path("runs") / name, keys)
    comparison = result.out / "comparison"
    if json_output:
        print_json({"study": name, "failed": result.failed, "table": result.table})
    elif result.comparison is not None:
        show_comparison(result.comparison, comparison / "report.html", markdown)
    if result.failed:
        typer.echo(f"selkd: {counted(len(result.failed), 'run')} failed; the same command tries again.", err=True)
        raise typer.Exit(1)


@app.command()
def report(
    runs: Annotated[
        list[Path], Argument(callback=possible, metavar="RUN...", help="The folders that `selkd distill` wrote.")
    ],
    out: Annotated[
        Path | None,
        Option(
            callback=possible, help="The folder to write into; the run's own, or comparison for several, if not given."
        ),
    ] = None,
    baseline: Annotated[
        str | None, Option(help="The recipe that the others are compared with; the first one if not given.")
    ] = None,
    markdown: Markdown = False,
    json_output: Json = False,
) -> None:
    """Write the page of one run, or a table, plots and a page of several side by side."""
    from selkd.reporting.comparison import compare
    from selkd.reporting.comparison_page import PAGE, write_comparison
    from selkd.reporting.formats import counted
    from selkd.reporting.page import write_page

    if len(runs) == 1:
        if baseline is not None:
            raise InputError("--baseline: one run has nothing to differ from; give several.")
        print_answer({"report": str(write_page(runs[0], out))}, json_output)
        return
    folder = out or Path("comparison")
    comparison = compare(runs, baseline)
    content = write_comparison(comparison, folder, "Runs side by side")
    if json_output:
        print_json({"report": str(folder / PAGE), **content})
    else:
        show_comparison(comparison, folder / PAGE, markdown)
    if comparison.failed:
        left_out = counted(len(comparison.failed), "damaged run")
        typer.echo(f"selkd: {left_out} left out, which the table names.", err=True)
        raise typer.Exit(1)


app.command()(tokens)


@app.command("prune-student")
def prune_student(
    out: Annotated[Path, Option(callback=possible, help="The student's folder, which must be new.")],
    layers: Annotated[int, Option(min=1, help="How many of the teacher's layers to keep.")],
    teacher: Annotated[str, Option(help="The teacher: demo, a local folder or a hub id.")] = "demo",
    data: Annotated[str, Option(help="The text on which the layers' influence is measured.")] = "demo",
    json_output: Json = False,
) -> None:
    """Cut a student from a teacher: its layers with the least block influence go."""
    from selkd.recipe.pruning import pruning_recipe

    recipe = pruning_recipe(teacher, layers, data, out)
    from selkd.run.pipeline import prune_into

    quiet()
    print_answer(prune_into(recipe, out), json_output)
