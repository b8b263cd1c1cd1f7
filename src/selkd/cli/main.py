"""The command line. Every command imports what it needs when it runs, so ``selkd --help`` is quick.

Exit codes: 0 done, 1 failed while running, 2 bad input. ``--json`` prints the answer to standard output; progress and
messages go to standard error.
"""

import json
import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from selkd.cli.cache import cache_app
from selkd.cli.options import Json, Out, Overrides, RecipeName, print_answer, quiet
from selkd.errors import InputError, RunError

app = typer.Typer(no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False)
app.add_typer(cache_app, name="cache")


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
    from selkd.recipe.files import load_recipe
    from selkd.run.pipeline import distill, full_kd_on_same_samples

    quiet()
    run = distill(load_recipe("demo", overrides), out)
    runs = [run, full_kd_on_same_samples(run)] if compare else [run]
    _show(runs, json_output)


@app.command("distill")
def distill_command(
    recipe: RecipeName, out: Out = None, overrides: Overrides = None, json_output: Json = False
) -> None:
    """Score, cache, train, evaluate and report. Repeat the command to continue an interrupted run."""
    from selkd.recipe.files import load_recipe
    from selkd.run.pipeline import distill

    quiet()
    _show([distill(load_recipe(recipe, overrides), out)], json_output)


@app.command()
def score(recipe: RecipeName, out: Out = None, overrides: Overrides = None, json_output: Json = False) -> None:
    """Score the samples with the frozen initial student and choose which to keep."""
    from selkd.recipe.files import load_recipe
    from selkd.run.pipeline import score_only

    quiet()
    run = score_only(load_recipe(recipe, overrides), out)
    counts = run.record["counts"]
    scores = run.path / "selection" / "samples.parquet"
    answer = {
        "samples": counts["samples"],
        "samples_kept": counts["samples_kept"],
        "scores": str(scores) if scores.exists() else None,
    }
    print_answer(answer, json_output)


@app.command("eval")
def eval_command(
    models: Annotated[
        list[str],
        typer.Argument(metavar="[NAME=]MODEL...", help="demo, a folder, a run's folder or a hub id; several compare."),
    ],
    suite: Annotated[
        list[str] | None,
        typer.Option(help="fidelity, paper, validation, a benchmark or a harness task; may be repeated. [fidelity]"),
    ] = None,
    teacher: Annotated[str | None, typer.Option(help="For fidelity: demo, a local folder or a hub id.")] = None,
    text: Annotated[
        str, typer.Option(help="For fidelity: demo, a text file, a folder of them or a hub data set.")
    ] = "demo",
    text_field: Annotated[str | None, typer.Option(help="The field of .jsonl and .parquet text. [text]")] = None,
    prompt_field: Annotated[
        str | None, typer.Option(help="In its place: the field of a prompt; completions alone are measured.")
    ] = None,
    completion_field: Annotated[str | None, typer.Option(help="The field of its completion.")] = None,
    messages_field: Annotated[
        str | None, typer.Option(help="In its place: the field of a conversation; the assistant's turns are measured.")
    ] = None,
    template: Annotated[str | None, typer.Option(help="Of prompts: as a recipe's data.template.")] = None,
    data: Annotated[
        list[Path] | None, typer.Option(help="A folder of the benchmarks' .jsonl files; no hub. May be repeated.")
    ] = None,
    limit: Annotated[
        int | None, typer.Option(min=1, help="Examples of a task at most, spread evenly; of fidelity, windows of text.")
    ] = None,
    shots: Annotated[int, typer.Option(min=0, help="Solved examples before a question.")] = 0,
    chat_template: Annotated[bool, typer.Option("--chat-template", help="Put prompts into the chat template.")] = False,
    batch_size: Annotated[
        int | None, typer.Option(min=1, help="Prompts at once; found from the memory if not given.")
    ] = None,
    dtype: Annotated[str, typer.Option(help="auto, float32, bfloat16 or float16.")] = "auto",
    out: Annotated[Path, typer.Option(help="Where results are kept, and found again.")] = Path("evals"),
    json_output: Json = False,
) -> None:
    """Measure models: fidelity to a teacher, the paper's benchmarks, any task; the first against the others."""
    from selkd.evaluation.benchmark_tasks import BenchmarkOptions
    from selkd.evaluation.command import evaluate_models
    from selkd.evaluation.fidelity_task import FidelityOptions

    quiet()
    folders = [str(folder) for folder in data] if data else None
    benchmarks = BenchmarkOptions(suite or ["fidelity"], folders, limit, shots, chat_template, batch_size)
    measured = FidelityOptions(text, text_field, limit, prompt_field, completion_field, messages_field, template)
    answer = evaluate_models(models, benchmarks, measured, teacher, dtype, out)
    if json_output:
        typer.echo(json.dumps(answer, indent=2, allow_nan=False))
        return
    from rich.console import Console

    from selkd.reporting.evaluation_tables import print_evaluation

    print_evaluation(Console(), answer)


@app.command()
def recipes(
    name: Annotated[str | None, typer.Argument(help="Print this recipe.")] = None, json_output: Json = False
) -> None:
    """The named recipes; print one."""
    from selkd.errors import nearest
    from selkd.recipe.files import named_recipes

    named = named_recipes()
    if name is None:
        first_lines = {key: text.splitlines()[0].removeprefix("# ") for key, text in named.items()}
        print_answer(first_lines, json_output)
    elif name not in named:
        raise InputError(f"{name}: no such recipe. Named recipes: {', '.join(named)}.{nearest(name, named)}")
    elif json_output:
        print_answer({"name": name, "yaml": named[name]}, json_output)
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
    memory: Annotated[bool, typer.Option(help="Measure peak memory too, a process for each variant.")] = True,
    trace: Annotated[
        Path | None, typer.Option(metavar="DIR", help="Write memory over time here: memory.json and memory.svg.")
    ] = None,
    json_output: Json = False,
) -> None:
    """The recipe's step against its floor and against plain Full KD, on this machine: seconds and memory."""
    from selkd.bench.report import bench as measure
    from selkd.bench.table import print_table
    from selkd.recipe.files import load_recipe

    quiet()
    answer = measure(load_recipe(recipe, overrides), repeats=repeats, variants=variant, memory=memory, trace=trace)
    if json_output:
        typer.echo(json.dumps(answer, indent=2))
    else:
        print_table(answer, trace)


@app.command()
def estimate(
    recipe: RecipeName,
    gpus: Annotated[
        int | None, typer.Option(min=1, help="Plan for so many accelerators; this machine's device if not given.")
    ] = None,
    tokens: Annotated[
        int | None, typer.Option(min=2, help="Plan for so many training tokens; the recipe's if not given.")
    ] = None,
    probe: Annotated[
        bool, typer.Option("--probe", help="Run a few steps here to measure time and cache bytes.")
    ] = False,
    overrides: Overrides = None,
    json_output: Json = False,
) -> None:
    """Memory, teacher queries, cache and time of a recipe, before they are spent."""
    from selkd.estimate.estimate import estimate as estimated
    from selkd.recipe.files import load_recipe
    from selkd.reporting.tables import estimate_tables

    quiet()
    answer = estimated(load_recipe(recipe, overrides), gpus=gpus, tokens=tokens, with_probe=probe)
    if json_output:
        typer.echo(json.dumps(answer, indent=2))
        return
    from rich.console import Console

    for table in estimate_tables(answer):
        Console().print(table)


@app.command("sweep")
def sweep_command(
    study: Annotated[str, typer.Argument(metavar="STUDY", help="A named study (demo_positions) or a YAML file.")],
    out: Annotated[Path | None, typer.Option(help="The study's folder; runs/<study name> if not given.")] = None,
    overrides: Overrides = None,
    json_output: Json = False,
) -> None:
    """Recipes x seeds into one table. Repeat the command to continue; one failed run does not sink the rest."""
    from selkd.recipe.files import parse_override
    from selkd.sweep.study import load_study
    from selkd.sweep.sweep import sweep

    name, content, folder = load_study(study)
    keys = dict(parse_override(override) for override in overrides or [])
    result = sweep(name, content, folder, out or Path("runs") / name, keys)
    comparison = result.out / "comparison"
    if json_output:
        typer.echo(json.dumps({"study": name, "failed": result.failed, "table": result.table}, indent=2))
    elif result.table is not None:
        typer.echo(f"{(comparison / 'table.md').read_text(encoding='utf-8')}\nreport  {comparison / 'report.html'}")
    if result.failed:
        typer.echo(f"selkd: {len(result.failed)} runs failed; the same command tries them again.", err=True)
        raise typer.Exit(1)


@app.command()
def report(
    runs: Annotated[list[Path], typer.Argument(metavar="RUN...", help="Folders that `selkd distill` wrote.")],
    out: Annotated[
        Path | None, typer.Option(help="Where to write; the run's own folder, or `comparison` for several runs.")
    ] = None,
    baseline: Annotated[
        str | None, typer.Option(help="The recipe that differences are told against; the first one if not given.")
    ] = None,
    json_output: Json = False,
) -> None:
    """The page of one run, or a table, plots and a page of several side by side."""
    from selkd.reporting.comparison import compare
    from selkd.reporting.comparison_page import PAGE, write_comparison
    from selkd.reporting.comparison_tables import as_markdown
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
        typer.echo(json.dumps({"report": str(folder / PAGE), **content}, indent=2))
    else:
        typer.echo(f"{as_markdown(comparison)}\nreport  {folder / PAGE}")
    if comparison.failed:
        typer.echo(f"selkd: {len(comparison.failed)} damaged runs were left out; the table names them.", err=True)
        raise typer.Exit(1)


@app.command()
def tokens(
    model: Annotated[str, typer.Argument(metavar="MODEL", help="The student: demo, a local folder or a hub id.")],
    text: Annotated[
        str | None,
        typer.Argument(metavar="[TEXT]", help="The text; what is piped in, or a demo passage, if not given."),
    ] = None,
    file: Annotated[Path | None, typer.Option(help="A UTF-8 file that holds the text.")] = None,
    teacher: Annotated[str | None, typer.Option(metavar="MODEL", help="For metrics that look at a teacher.")] = None,
    metric: Annotated[
        str, typer.Option(help="What colours the tokens, and ranks them: a metric's name or module:function.")
    ] = "student_entropy",
    policies: Annotated[
        list[str] | None,
        typer.Option(
            "--policy",
            metavar="NAME[,KEY=VALUE...]",
            help="A policy with its options, as in pos_rs,smoothing=2; again for another beside it. "
            "progress=0.5 is half-way through a run. top_k if not given.",
        ),
    ] = None,
    fraction: Annotated[float, typer.Option(help="The share of the positions that a policy picks.")] = 0.2,
    html: Annotated[Path | None, typer.Option(metavar="FILE", help="Also write a page.")] = None,
    max_length: Annotated[
        int | None, typer.Option(min=2, help="Tokens of a sample at most; longer text is cut. 512, or what fits.")
    ] = None,
    seed: Annotated[int, typer.Option(min=0, max=2**32 - 1, help="Of policies that draw.")] = 1337,
    json_output: Json = False,
) -> None:
    """What a policy picks of a text, coloured by a metric: in the terminal and as a page."""
    from selkd.tokens.page import check_page_path, write_tokens_page
    from selkd.tokens.policy import check_metric, parse_policy
    from selkd.tokens.views import describe

    check_metric(metric)
    choices = [parse_policy(given, metric, fraction) for given in policies or ["top_k"]]
    if html is not None:
        check_page_path(html)
        if file is not None and file.exists() and html.exists() and html.samefile(file):
            raise InputError(f"--html {html}: this is the text; the page would replace it. Give another file.")

    from selkd.tokens.command import demo_passage, look, text_given

    quiet()
    shown = text_given(text, file)
    if shown is None:
        typer.echo("no TEXT: a passage of the demo text", err=True)
        shown = demo_passage()
    looked_at = look((model, teacher), shown, metric, choices, max_length, seed)
    if teacher is not None and looked_at["teacher"] is None:
        typer.echo("--teacher: no metric that was asked for looks at it, so it was not loaded", err=True)
    if html is not None:
        write_tokens_page(html, describe(looked_at))
        typer.echo(f"page {html}", err=True)
    if json_output:
        typer.echo(json.dumps(looked_at, indent=2))
        return
    from rich.console import Console

    from selkd.tokens.terminal import print_policies

    print_policies(Console(), describe(looked_at))


@app.command("prune-student")
def prune_student(
    out: Annotated[Path, typer.Option(help="A new folder for the student.")],
    layers: Annotated[int, typer.Option(min=1, help="How many of the teacher's layers to keep.")],
    teacher: Annotated[str, typer.Option(help="demo, a local folder or a hub id.")] = "demo",
    data: Annotated[str, typer.Option(help="Text on which the layers' influence is measured.")] = "demo",
    json_output: Json = False,
) -> None:
    """Cut a student from a teacher's own layers: those with the least block influence go."""
    from selkd.run.pipeline import prune_into

    quiet()
    print_answer(prune_into(teacher, layers, data, out), json_output)


def _show(runs: list[Any], json_output: bool) -> None:
    """The closing table of one run or several, and where their pages are."""
    if json_output:
        records = [run.record for run in runs]
        typer.echo(json.dumps(records[0] if len(records) == 1 else records, indent=2))
        return
    from rich.console import Console

    from selkd.reporting.benchmarks import cut
    from selkd.reporting.tables import fidelity_table

    console = Console()
    console.print(fidelity_table([run.record for run in runs]))
    for run in runs:
        for sentence in cut(run.record):
            console.print(sentence, highlight=False, markup=False)
        console.print(f"student {run.student}   report {run.path / 'report.html'}", soft_wrap=True, highlight=False)
