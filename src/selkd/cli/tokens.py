"""``selkd tokens``: what a policy picks of a text."""

import json
from pathlib import Path
from typing import Annotated

import typer
from typer import Argument, Option

from selkd.cli.options import Json, NoPlugins, own_code, possible, quiet
from selkd.errors import InputError


def tokens(
    model: Annotated[
        str, Argument(callback=possible, metavar="MODEL", help="The student: demo, a local folder or a hub id.")
    ],
    text: Annotated[
        str | None,
        Argument(metavar="[TEXT]", help="The text; what is piped in, or else a demo passage, if not given."),
    ] = None,
    file: Annotated[Path | None, Option(callback=possible, help="A UTF-8 file that holds the text.")] = None,
    teacher: Annotated[
        str | None, Option(callback=possible, metavar="MODEL", help="The teacher, for metrics that look at one.")
    ] = None,
    metric: Annotated[
        str, Option(help="The metric that colours and ranks the tokens: its name, or module:function.")
    ] = "student_entropy",
    policies: Annotated[
        list[str] | None,
        Option(
            "--policy",
            metavar="NAME[,KEY=VALUE...]",
            help="A policy with its options, as in pos_rs,smoothing=2; top_k if not given. progress=0.5 shows it "
            "half-way through a run. May be repeated, to see several side by side.",
        ),
    ] = None,
    fraction: Annotated[float, Option(help="The share of the positions that a policy picks.")] = 0.2,
    html: Annotated[Path | None, Option(callback=possible, metavar="FILE", help="The page to write as well.")] = None,
    max_length: Annotated[
        int | None,
        Option(min=2, help="The most tokens of a sample; longer text is cut. 512, or what fits, if not given."),
    ] = None,
    seed: Annotated[int, Option(min=0, max=2**32 - 1, help="The seed of metrics and policies that draw.")] = 1337,
    no_plugins: NoPlugins = False,
    json_output: Json = False,
) -> None:
    """Show what a policy picks of a text, coloured by a metric, in the terminal and as a page."""
    from selkd.tokens.policy import check_metric, parse_policy, require_teacher
    from selkd.tokens.text import demo_passage, text_given
    from selkd.tokens.views import check_page_path, describe, write_page

    with own_code(no_plugins):
        check_metric(metric)
        choices = [parse_policy(policy, metric, fraction) for policy in policies or ["top_k"]]
    if html is not None:
        check_page_path(html)
        if file is not None and file.exists() and html.exists() and html.samefile(file):
            raise InputError(f"--html {html}: this is the text; the page would replace it. Give another file.")

    require_teacher(metric, choices, teacher)
    shown = text_given(text, file)
    if shown is None:
        typer.echo("no TEXT: a passage of the demo text", err=True)
        shown = demo_passage()
    from selkd.tokens.command import look

    quiet()
    looked_at = look((model, teacher), shown, metric, choices, max_length, seed)
    if teacher is not None and looked_at["teacher"] is None:
        typer.echo("--teacher: no metric that was asked for looks at it, so it was not loaded", err=True)
    if html is not None:
        write_page(html, describe(looked_at))
        typer.echo(f"page {html}", err=True)
    if json_output:
        typer.echo(json.dumps(looked_at, indent=2))
        return
    from rich.console import Console

    from selkd.tokens.terminal import print_policies

    print_policies(Console(), describe(looked_at))
