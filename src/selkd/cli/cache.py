"""``selkd cache``: build, verify and inspect a teacher cache."""

from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import typer

from selkd.cli.options import (
    Json,
    MaxHours,
    NoPlugins,
    Out,
    Overrides,
    RecipeName,
    limited,
    own_code,
    possible,
    print_answer,
    quiet,
    read,
)
from selkd.errors import InputError

cache_app = typer.Typer(no_args_is_help=True, help="Build, verify or inspect a teacher cache.")

CacheFolder = Annotated[Path, typer.Argument(callback=possible, metavar="DIR", help="A teacher cache's folder.")]


@cache_app.command("build")
def cache_build(
    recipe: RecipeName,
    out: Out = None,
    overrides: Overrides = None,
    max_hours: MaxHours = None,
    no_plugins: NoPlugins = False,
    json_output: Json = False,
) -> None:
    """Run the teacher once over the kept samples and store its drawn classes."""
    loaded = read(recipe, limited(overrides, max_hours), no_plugins)
    if loaded.cache is None:
        raise InputError(
            "cache: this recipe keeps the teacher live; give --set 'cache={path: null}' and a class sampler."
        )
    from selkd.run.pipeline import cache_only

    quiet()
    print_answer(cache_only(loaded, out).record["teacher_cache"], json_output)


@cache_app.command("verify")
def cache_verify(
    directory: CacheFolder,
    repair: Annotated[bool, typer.Option("--repair", help="Rebuild what is damaged, from the teacher.")] = False,
    rescore: Annotated[
        int, typer.Option(min=0, metavar="N", help="Draw N random samples again with the teacher and compare.")
    ] = 0,
    recipe: Annotated[
        str | None, typer.Option(metavar="RECIPE", help="The recipe that built it; by default its run's own.")
    ] = None,
    out: Out = None,
    overrides: Overrides = None,
    no_plugins: NoPlugins = False,
    json_output: Json = False,
) -> None:
    """Read every byte of a cache and name each damaged part.

    The exit code is 1 if damage is left, or if --rescore finds the draws of another teacher.
    """
    from selkd_cache.verify import verify_cache

    if not directory.is_dir():
        raise InputError(f"{directory}: no such folder.")
    if not (repair or rescore):
        for option, given in {"--recipe": recipe, "--set": overrides, "--out": out}.items():
            if given:
                raise InputError(f"{option}: without effect; the teacher runs with --repair or --rescore N alone.")
    problems = verify_cache(directory)
    answer: dict[str, Any] = {"problems": problems}
    failed = bool(problems)
    if (problems and repair) or rescore:
        from selkd.run import verify_cache as with_recipe

        quiet()
        with own_code(no_plugins):
            loaded, own = with_recipe.recipe_of(directory, recipe, overrides)
        if problems and repair:
            answer["problems_left"] = with_recipe.repair(directory, loaded, out or own)
            failed = bool(answer["problems_left"])
        if rescore and not failed:
            rescored = with_recipe.rescore(directory, loaded, out or own, rescore)
            answer["rescored"] = asdict(rescored)
            failed = rescored.agrees is False
            if rescored.agrees is None:
                typer.echo(
                    "selkd: some draws differ, and how many the same teacher draws again was not measured for this "
                    "sampler and number of draws: compare same_draws with another check of this cache.",
                    err=True,
                )
    print_answer(answer, json_output, empty="every shard is whole")
    if failed:
        raise typer.Exit(1)


@cache_app.command("inspect")
def cache_inspect(
    directory: CacheFolder,
    samples: Annotated[int, typer.Option(min=1, help="How many random samples to read for what was drawn.")] = 1000,
    json_output: Json = False,
) -> None:
    """Size, bytes a position against plainer layouts, what was drawn, and what the cache was built from."""
    from selkd_cache.reader import TeacherCache

    cache = TeacherCache.open(directory)
    print_answer({**cache.stats(), **cache.contents(samples), "fingerprint": cache.fingerprint}, json_output)
