"""``selkd cache``: build, verify, inspect and export a teacher cache."""

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
from selkd.files import RECIPE
from selkd.reporting.formats import data_size

cache_app = typer.Typer(no_args_is_help=True, help="Build, import, verify, inspect or export a teacher cache.")

CacheFolder = Annotated[
    Path, typer.Argument(callback=possible, metavar="DIR", help="A teacher cache's folder, or the run's that uses it.")
]


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


@cache_app.command("import")
def cache_import(
    recipe: RecipeName,
    files: Annotated[
        list[Path],
        typer.Argument(callback=possible, metavar="FILES", help="Parquet or JSON Lines files, or folders of them."),
    ],
    out: Out = None,
    overrides: Overrides = None,
    config: Annotated[
        Path | None,
        typer.Option(callback=possible, help="DistillKit's compression_config.yaml, if it is not beside the files."),
    ] = None,
    logits: Annotated[
        bool, typer.Option("--logits", help="The values are logits, so the mass of other classes is not known.")
    ] = False,
    own_rows: Annotated[
        bool, typer.Option("--own-rows", help="axolotl's row j is of token j, as its older versions have it.")
    ] = False,
    no_plugins: NoPlugins = False,
    json_output: Json = False,
) -> None:
    """Make a cache from files with a teacher's most likely classes: DistillKit's, axolotl's, or servers' answers.

    The recipe has `teacher: {model: NAME, imported: true}` and `classes: {sampler: top_k, …}`. Its samples are found
    by their tokens.
    """
    from selkd.recipe.foreign import require_imported

    loaded = read(recipe, overrides, no_plugins)
    require_imported(loaded.teacher)
    from selkd.foreign.files import ReadOptions
    from selkd.run.import_cache import import_cache

    quiet()
    print_answer(import_cache(loaded, files, ReadOptions(config, logits, own_rows), out), json_output)


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
    from selkd_cache.reader import TeacherCache
    from selkd_cache.verify import verify_cache

    if not (repair or rescore):
        for option, given in {"--recipe": recipe, "--set": overrides, "--out": out}.items():
            if given:
                raise InputError(f"{option}: without effect; the teacher runs with --repair or --rescore N alone.")
    if not directory.is_dir():
        raise InputError(f"{directory}: no such folder.")
    directory = _cache_of(directory)
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
    if json_output or problems:
        print_answer(answer, json_output, empty="none, every shard is whole")
    else:
        size = TeacherCache.open(directory).stats()
        typer.echo(
            f"whole: {size['shards']:,} {'shard' if size['shards'] == 1 else 'shards'}, {data_size(size['bytes'])}"
        )
        print_answer({key: value for key, value in answer.items() if key != "problems"}, json_output)
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

    cache = TeacherCache.open(_cache_of(directory))
    print_answer({**cache.stats(), **cache.contents(samples), "fingerprint": cache.fingerprint}, json_output)


@cache_app.command("export")
def cache_export(
    directory: CacheFolder,
    file: Annotated[Path, typer.Argument(callback=possible, metavar="FILE", help="The file to write.")],
    to: Annotated[str, typer.Option("--to", metavar="FORMAT", help="parquet.")] = "parquet",
    force: Annotated[bool, typer.Option("--force", help="Replace FILE if it is there.")] = False,
) -> None:
    """Write every sample as a row of a Parquet file: id and, for each position, class ids, counts and scalars."""
    from selkd_cache.reader import TeacherCache

    if to != "parquet":
        raise InputError(f"--to: expected parquet, got {to!r}.")
    if file.is_dir() or (file.exists() and not force):
        raise InputError(f"{file}: already there. Give another FILE" + ("." if file.is_dir() else ", or --force."))
    if not file.parent.is_dir():
        raise InputError(f"{file.parent}: no such folder. Make it, or give another FILE.")
    cache = TeacherCache.open(_cache_of(directory))
    from selkd_cache.arrow import write_parquet

    write_parquet(cache, file)
    typer.echo(f"{file}: {len(cache):,} samples, {data_size(file.stat().st_size)}")


def _cache_of(directory: Path) -> Path:
    """The folder itself; of a run's folder, the cache in it, or the one that its recipe names."""
    from selkd.recipe.files import recipe_content
    from selkd_cache.manifest import PLAN

    if not (directory / RECIPE).is_file() or (directory / PLAN).exists():
        return directory
    if (own := directory / "teacher_cache").is_dir():
        return own
    options = recipe_content(directory / RECIPE).get("cache")
    path = options and options.get("path")
    if path and "://" in path:
        raise InputError(f"{directory}: this run's cache is at {path}. Give the folder of a copy on this machine.")
    if not path:
        why = "has none yet" if options else "keeps its teacher live"
        raise InputError(f"{directory} is not a teacher cache, and the run in it {why}.")
    return Path(path).expanduser()
