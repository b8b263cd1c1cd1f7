"""The command line. Every command imports what it needs when it runs, so ``selkd --help`` is quick.

Exit codes: 0 done, 1 failed while running, 2 bad input. ``--json`` prints the answer to standard output; progress and
messages go to standard error.
"""

import json
import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from selkd.errors import InputError, RunError

app = typer.Typer(no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False)
cache_app = typer.Typer(no_args_is_help=True, help="Build, verify or inspect a teacher cache.")
app.add_typer(cache_app, name="cache")

RecipeName = Annotated[
    str, typer.Argument(metavar="RECIPE", help="A named recipe (see `selkd recipes`) or a YAML file.")
]
Out = Annotated[Path | None, typer.Option(help="The run's folder; runs/<recipe name> if not given.")]
Overrides = Annotated[
    list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="Override a key: --set positions.fraction=0.1")
]
Json = Annotated[bool, typer.Option("--json", help="Print the answer as JSON to standard output.")]
CacheFolder = Annotated[Path, typer.Argument(metavar="DIR", help="A teacher cache's folder.")]


def main() -> None:
    """The console script. ``--debug``, anywhere, shows the traceback of an error."""
    debug = "--debug" in sys.argv
    sys.argv = [argument for argument in sys.argv if argument != "--debug"]
    try:
        app()
    except SystemExit as stop:
        if stop.code == 130:  # Typer's code for Ctrl-C
            typer.echo("selkd: interrupted. The same command continues from what was finished.", err=True)
            sys.exit(1)
        if not stop.code:
            _leave_process_group()
        raise
    except (InputError, RunError) as error:
        if debug:
            raise
        typer.echo(f"selkd: {error}", err=True)
        sys.exit(2 if isinstance(error, InputError) else 1)
    except Exception as error:
        if debug:
            raise
        message = f"selkd: failed while running ({type(error).__name__}: {error}). Finished stages are kept"
        typer.echo(f"{message}; --debug shows where it happened.", err=True)
        sys.exit(1)


def _leave_process_group() -> None:
    """End this process's part in a torchrun; a group left open can abort the interpreter's exit after all is done."""
    if "torch" in sys.modules:
        from torch import distributed

        if distributed.is_available() and distributed.is_initialized():
            distributed.barrier()  # no rank leaves while another still reads what it sent
            distributed.destroy_process_group()


@app.callback()
def root(
    debug: Annotated[
        bool, typer.Option("--debug", help="Show the traceback of an error (any place in the line).")
    ] = False,
) -> None:
    """Selective knowledge distillation of causal language models: choose positions, classes and samples."""


@app.command()
def demo(
    out: Out = None,
    compare: Annotated[bool, typer.Option("--compare", help="Also run Full KD on the same samples.")] = False,
    overrides: Overrides = None,
    json_output: Json = False,
) -> None:
    """Distil a real 135M model on this machine: SE-KD 3X on the embedded default, in minutes."""
    from selkd.pipeline import distill, full_kd_on_same_samples
    from selkd.recipe_files import load_recipe

    _quiet()
    run = distill(load_recipe("demo", overrides), out)
    runs = [run, full_kd_on_same_samples(run)] if compare else [run]
    _show(runs, json_output)


@app.command("distill")
def distill_command(
    recipe: RecipeName, out: Out = None, overrides: Overrides = None, json_output: Json = False
) -> None:
    """Score, cache, train, evaluate and report. Repeat the command to continue an interrupted run."""
    from selkd.pipeline import distill
    from selkd.recipe_files import load_recipe

    _quiet()
    _show([distill(load_recipe(recipe, overrides), out)], json_output)


@app.command()
def score(recipe: RecipeName, out: Out = None, overrides: Overrides = None, json_output: Json = False) -> None:
    """Score the samples with the frozen initial student and choose which to keep."""
    from selkd.pipeline import score_only
    from selkd.recipe_files import load_recipe

    _quiet()
    run = score_only(load_recipe(recipe, overrides), out)
    counts = run.record["counts"]
    scores = run.path / "selection" / "samples.parquet"
    answer = {
        "samples": counts["samples"],
        "samples_kept": counts["samples_kept"],
        "scores": str(scores) if scores.exists() else None,
    }
    _answer(answer, json_output)


@cache_app.command("build")
def cache_build(recipe: RecipeName, out: Out = None, overrides: Overrides = None, json_output: Json = False) -> None:
    """Run the teacher once over the kept samples and store its drawn classes."""
    from selkd.pipeline import cache_only
    from selkd.recipe_files import load_recipe

    _quiet()
    loaded = load_recipe(recipe, overrides)
    if loaded.cache is None:
        raise InputError(
            "cache: this recipe keeps the teacher live; give --set 'cache={path: null}' and a class sampler."
        )
    _answer(cache_only(loaded, out).record["teacher_cache"], json_output)


@cache_app.command("verify")
def cache_verify(directory: CacheFolder, json_output: Json = False) -> None:
    """Read every byte of a cache and name each damaged part; exit code 1 if there is one."""
    from selkd.cache.reader import verify_cache

    if not directory.is_dir():
        raise InputError(f"{directory}: no such folder.")
    problems = verify_cache(directory)
    _answer({"problems": problems}, json_output, empty="every shard is whole")
    if problems:
        raise typer.Exit(1)


@cache_app.command("inspect")
def cache_inspect(directory: CacheFolder, json_output: Json = False) -> None:
    """Size, bytes a position against plainer layouts, and what the cache was built from."""
    from selkd.cache.reader import TeacherCache

    cache = TeacherCache.open(directory)
    _answer({**cache.stats(), "fingerprint": cache.fingerprint}, json_output)


@app.command()
def recipes(
    name: Annotated[str | None, typer.Argument(help="Print this recipe.")] = None, json_output: Json = False
) -> None:
    """The named recipes; print one."""
    from selkd.recipe_errors import nearest
    from selkd.recipe_files import named_recipes

    named = named_recipes()
    if name is None:
        first_lines = {key: text.splitlines()[0].removeprefix("# ") for key, text in named.items()}
        _answer(first_lines, json_output)
    elif name not in named:
        raise InputError(f"{name}: no such recipe. Named recipes: {', '.join(named)}.{nearest(name, named)}")
    elif json_output:
        _answer({"name": name, "yaml": named[name]}, json_output)
    else:
        typer.echo(named[name], nl=False)


@app.command()
def bench(
    recipe: RecipeName,
    overrides: Overrides = None,
    repeats: Annotated[int, typer.Option(help="Turns through all variants, after one to warm up.")] = 5,
    variant: Annotated[
        list[str] | None, typer.Option(help="Only this variant, and the floor (may be given several times).")
    ] = None,
    memory: Annotated[
        bool, typer.Option(help="Measure peak memory too: a process of its own for each variant.")
    ] = True,
    trace: Annotated[
        Path | None, typer.Option(metavar="DIR", help="Write memory over time here: memory.json and memory.svg.")
    ] = None,
    json_output: Json = False,
) -> None:
    """The recipe's step against its floor and against plain Full KD, on this machine: seconds and memory."""
    from selkd.bench.report import bench as measure
    from selkd.recipe_files import load_recipe

    _quiet()
    answer = measure(load_recipe(recipe, overrides), repeats=repeats, variants=variant, memory=memory, trace=trace)
    if json_output:
        typer.echo(json.dumps(answer, indent=2))
        return
    from rich.console import Console

    from selkd.bench.table import bench_table

    console = Console()
    console.print(bench_table(answer))
    if trace is not None:
        console.print(f"memory over time  {trace / 'memory.svg'}", soft_wrap=True, highlight=False)


@app.command("prune-student")
def prune_student(
    out: Annotated[Path, typer.Option(help="A new folder for the student.")],
    layers: Annotated[int, typer.Option(min=1, help="How many of the teacher's layers to keep.")],
    teacher: Annotated[str, typer.Option(help="demo, a local folder or a hub id.")] = "demo",
    data: Annotated[str, typer.Option(help="Text on which the layers' influence is measured.")] = "demo",
    json_output: Json = False,
) -> None:
    """Cut a student from a teacher's own layers: those with the least block influence go."""
    from selkd.pipeline import prune_into

    _quiet()
    _answer(prune_into(teacher, layers, data, out), json_output)


def _quiet() -> None:
    """Silence Transformers' bars for loading and saving; the stages have their own."""
    from transformers.utils import logging

    logging.disable_progress_bar()


def _show(runs: list[Any], json_output: bool) -> None:
    """The closing table of one run or several, and where their pages are."""
    if json_output:
        records = [run.record for run in runs]
        typer.echo(json.dumps(records[0] if len(records) == 1 else records, indent=2))
        return
    from rich.console import Console

    from selkd.reporting.tables import fidelity_table

    console = Console()
    console.print(fidelity_table([run.record for run in runs]))
    for run in runs:
        console.print(f"student {run.student}   report {run.path / 'report.html'}", soft_wrap=True, highlight=False)


def _answer(answer: dict[str, Any], json_output: bool, empty: str = "") -> None:
    """A small mapping, as JSON or a line a key."""
    if json_output:
        typer.echo(json.dumps(answer, indent=2))
        return
    for key, value in answer.items():
        if isinstance(value, dict | list):
            typer.echo(f"{key}:" if value else f"{key}: {empty}")
            lines = value.items() if isinstance(value, dict) else [("-", entry) for entry in value]
            for name, entry in lines:
                typer.echo(f"  {name} {entry}")
        else:
            typer.echo(f"{key}  {f'{value:,.2f}' if isinstance(value, float) else value}")
