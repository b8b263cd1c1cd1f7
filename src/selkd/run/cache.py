"""The stage that finds or builds the teacher cache of the kept samples."""

import time
from collections.abc import Callable
from pathlib import Path

from accelerate.utils import gather_object

from selkd.data.samples import SampleDataset
from selkd.errors import InputError
from selkd.foreign.responses import TokenNames
from selkd.foreign.scored import Truncation
from selkd.foreign.served import ServedTeacher
from selkd.recipe.recipe import Recipe
from selkd.run.directory import RunDirectory
from selkd.run.enough import warn_if_short
from selkd.run.fetch_cache import fetch_cache, is_remote
from selkd.run.record import cost_of, count_teacher_tokens, note_shared, timed
from selkd.run.workspace import Workspace
from selkd.selection.classes import class_sampler
from selkd.teacher.build_cache import CacheBuild, build_cache
from selkd.teacher.live import LiveTeacher
from selkd_cache.cost import add_cost, read_cost
from selkd_cache.fingerprint import SCALARS, TAIL, Fingerprint, check_same_fingerprint
from selkd_cache.manifest import MANIFEST, PLAN, read_plan
from selkd_cache.reader import TeacherCache
from selkd_cache.verify import verify_cache
from selkd_cache.writer import require_claimable

Fields = dict[str, str | int | float]
SOURCE, SOURCE_DIGEST = "source", "source_digest"  # an imported cache's fields: what its files were, and their digest


def cache(work: Workspace, run: RunDirectory, samples: SampleDataset) -> TeacherCache | None:
    """The cache with the teacher's drawn classes of ``samples``, built if need be; None for a live teacher."""
    recipe = work.recipe
    if recipe.cache is None:
        return None
    if is_scored_from(recipe):
        samples = work.splits.train  # one cache scores the samples and trains on the kept ones
    with timed(run, "cache"):
        path, directory = recipe.cache.path, cache_directory(work, run)
        if recipe.teacher.imported or (path is not None and is_remote(path)):
            opened, cost = _with_all(existing_cache(work), samples, path or str(directory)), None
        else:
            fingerprint = cache_fingerprint(work)
            larger = larger_cache(work, directory, fingerprint, samples)
            opened = _built(work, run, directory, fingerprint, samples) if larger is None else larger
            # The cost of a larger cache is not that of these samples, which nobody measured.
            cost = read_cost(directory) if larger is None else None
        if path is not None:
            note_shared(run, "cache", cost)
    run.record["teacher_cache"] = opened.stats()
    run.save()
    return opened


def is_scored_from(recipe: Recipe) -> bool:
    """Whether the samples are scored from the recipe's cache, which then holds the whole text."""
    return recipe.samples is not None and recipe.samples.from_cache


def all_cached(work: Workspace, run: RunDirectory) -> TeacherCache | None:
    """The cache of the whole text, built if need be, where samples are scored from it; else None."""
    return cache(work, run, work.splits.train) if is_scored_from(work.recipe) else None


def open_cache(work: Workspace) -> TeacherCache | None:
    """The cache of the whole text as it is, where samples are scored from it; else None.

    Raises:
        InputError: there is none, or it can't be used.
    """
    if work.recipe.cache is None or not is_scored_from(work.recipe):
        return None
    return existing_cache(work)


def existing_cache(work: Workspace) -> TeacherCache:
    """The recipe's cache as it is: built here, imported, or built elsewhere and copied to this machine.

    Raises:
        InputError: there is none, or it is not whole or of something else.
    """
    assert work.recipe.cache is not None
    path = work.recipe.cache.path
    directory = Path(path or work.run_path / "teacher_cache").expanduser()
    if path is not None and is_remote(path):
        with work.state.main_process_first():
            directory = fetch_cache(path, work.cache_dir / "teacher_caches")
    elif work.recipe.teacher.imported and not (directory / MANIFEST).exists():
        raise _only_imported(f"there is no whole cache in {directory}, and it is built")
    opened = TeacherCache.open(directory)
    check_same_fingerprint(opened.fingerprint, cache_fingerprint(work) | told_of(opened.fingerprint), directory)
    return opened


def require_own_cache(work: Workspace, run: RunDirectory) -> None:
    """Raises InputError where the recipe's folder can't hold a cache, or its cache was built from something else."""
    options = work.recipe.cache
    if options is None or (options.path is not None and is_remote(options.path)):
        return
    directory = cache_directory(work, run)
    require_claimable(directory)
    try:
        plan, _ = read_plan(directory / PLAN)
    except InputError:  # there is none, or it is damaged, which the build will say or mend
        return
    check_same_fingerprint(plan["fingerprint"], cache_fingerprint(work) | told_of(plan["fingerprint"]), directory)


def larger_cache(
    work: Workspace, directory: Path, fingerprint: Fingerprint, samples: SampleDataset
) -> TeacherCache | None:
    """A complete cache in ``directory`` that was built for more samples, these among them; None if there is none.

    Raises:
        InputError: it is damaged, and this recipe can't repair it.
    """
    try:
        larger = TeacherCache.open(directory, fingerprint)
    except InputError:
        larger = None  # the build will say what is wrong
    ids = set(samples.ids)
    is_larger = larger is not None and len(larger) > len(ids) and all(sample_id in larger for sample_id in ids)
    # All processes must take the same way.
    if not all(gather_object([is_larger]) if work.state.num_processes > 1 else [is_larger]):
        return None
    if problems := verify_cache(directory, blocks=False):
        raise InputError(
            f"the teacher cache in {directory} holds more samples than this recipe's and is damaged: {problems[0]}. "
            "repair it by `selkd cache verify --repair`, with the recipe that built it"
        )
    return larger


def _built(
    work: Workspace, run: RunDirectory, directory: Path, fingerprint: Fingerprint, samples: SampleDataset
) -> TeacherCache:
    """The cache of these samples, built by running the teacher; shards that an earlier build finished are kept.

    What the teacher will run on is counted, and the count saved, before it runs: whenever the build is killed, nothing
    that it finished goes uncounted, and nothing that is done again counts twice.
    """
    build = CacheBuild(directory, fingerprint, samples)
    if build.missing_tokens:
        warn_if_short(work, "cache", directory)
        counted = run.record.get("teacher_tokens", {}).get("cache", 0)
        if not counted or run.record.get("teacher_cache") is not None:  # else an interrupted build counted them
            run.record["teacher_cache"] = None
            count_teacher_tokens(run, cache=counted + build.missing_tokens)
        run.save()
    on_shard = _cost_noted(work, directory, build.planned_tokens)
    work.state.wait_for_everyone()  # no shard is finished before it is counted
    build.run(lambda: row_source(work), work.models.pad_token_id, on_shard)
    return TeacherCache.open(directory, fingerprint)


def _cost_noted(work: Workspace, directory: Path, teacher_tokens: int) -> Callable[[], None]:
    """What adds the seconds since its last call, or since now, to the cost of the cache that is being built.

    A complete cache has its cost already: shards that were lost since and are built again are none of it.
    """
    last = time.perf_counter()
    # Of shards without a cost, which an earlier version left, the seconds are unknown.
    is_known = read_cost(directory) is not None or not any(directory.glob("shard-*"))
    is_noted = work.state.is_main_process and is_known and not (directory / MANIFEST).exists()

    def add_seconds() -> None:
        nonlocal last
        now = time.perf_counter()
        if is_noted:
            add_cost(directory, cost_of(now - last, teacher_tokens))
        last = now

    add_seconds()
    return add_seconds


def build(work: Workspace, directory: Path, samples: SampleDataset, *, repair: bool = False) -> int:
    """Build or finish the recipe's cache of ``samples``. Returns the tokens that the teacher ran on."""
    require_built_here(work.recipe)
    fingerprint, pad_token_id = cache_fingerprint(work), work.models.pad_token_id
    return build_cache(directory, fingerprint, samples, lambda: row_source(work), pad_token_id, repair=repair)


def require_built_here(recipe: Recipe) -> None:
    """Raises InputError unless the recipe has a cache that its teacher builds, in a folder of this machine."""
    if recipe.cache is None:
        raise InputError("cache: this recipe keeps its teacher live, so there is no cache to build; set cache: {}")
    if recipe.cache.path is not None and is_remote(recipe.cache.path):
        raise InputError(f"cache.path: a cache is built in a local folder, and {recipe.cache.path} is an address")
    if recipe.teacher.imported:
        raise _only_imported("it is built")


def row_source(work: Workspace) -> LiveTeacher | ServedTeacher:
    """What gives the rows of the recipe's cache: its teacher, loaded, or the server that has it, tried."""
    return served_teacher(work) if work.recipe.teacher.server is not None else live_teacher(work)


def served_teacher(work: Workspace) -> ServedTeacher:
    """The recipe's served teacher, once it has answered for texts of selkd's own."""
    served = ServedTeacher(work.recipe.teacher, TokenNames(work.tokenizer), truncation(work))
    served.check()
    return served


def truncation(work: Workspace) -> Truncation:
    """How what a teacher from elsewhere gives is stored."""
    classes = work.recipe.classes
    assert classes.draws is not None
    return Truncation(classes.draws, classes.tail, work.vocab_size)


def live_teacher(work: Workspace) -> LiveTeacher:
    """The recipe's teacher, loaded, with the recipe's class sampler."""
    recipe = work.recipe
    return LiveTeacher(work.models.teacher, recipe.classes, recipe.criterion.temperature, recipe.seed, work.vocab_size)


def _only_imported(what: str) -> InputError:
    return InputError(f"teacher.imported: {what} from files alone, by `selkd cache import RECIPE FILES`.")


def told_of(stored: Fingerprint) -> Fields:
    """What a stored fingerprint says of the files that it was imported from, which no recipe names."""
    return {field: value for field, value in stored.items() if field in (SOURCE, SOURCE_DIGEST)}


def _with_all(opened: TeacherCache, samples: SampleDataset, place: str) -> TeacherCache:
    if missing := [sample_id for sample_id in samples.ids if sample_id not in opened]:
        raise InputError(
            f"cache.path: the cache at {place} lacks {len(missing)} of the {len(samples)} kept samples, the first "
            f"{missing[0].hex()}. Build a cache for this data in a local folder."
        )
    return opened


def cache_directory(work: Workspace, run: RunDirectory) -> Path:
    """Where the recipe keeps its teacher cache."""
    assert work.recipe.cache is not None
    return Path(work.recipe.cache.path).expanduser() if work.recipe.cache.path else run.path / "teacher_cache"


def cache_fingerprint(work: Workspace) -> Fields:
    """Everything that determines the draws but the samples, which the cache finds by their content."""
    recipe = work.recipe
    assert recipe.classes.draws is not None
    if recipe.teacher.is_foreign:
        return _foreign_fingerprint(work)
    assert recipe.cache is not None
    scalars = recipe.cache.scalars
    return {
        **{f"{kind}_source": digest for kind, digest in work.own_parts.items() if kind == "sampler"},
        "teacher": work.teacher_source.fingerprint,
        "teacher_dtype": work.teacher_precision,
        "tokenizer": work.tokenizer_fingerprint,
        "vocabulary": work.vocab_size,
        "sampler": recipe.classes.sampler,
        "draws": recipe.classes.draws,
        "count_total": class_sampler(recipe.classes).total,
        **({TAIL: "one class"} if recipe.classes.tail else {}),
        **({SCALARS: 2 if recipe.criterion.temperature == 1.0 else 4} if scalars else {}),
        "temperature": recipe.criterion.temperature,
        "seed": recipe.seed,
    }


def _foreign_fingerprint(work: Workspace) -> Fields:
    """What is known of a teacher from elsewhere, and that its distributions were cut. Nothing in it is random."""
    classes = work.recipe.classes
    assert classes.draws is not None
    return {
        "teacher": work.teacher_fingerprint,
        "origin": "served" if work.recipe.teacher.server is not None else "imported",
        "truncated": "biased: the mass of all others is one class" if classes.tail else "biased: renormalised",
        "tokenizer": work.tokenizer_fingerprint,
        "vocabulary": work.vocab_size,
        "sampler": classes.sampler,
        "draws": classes.draws,
        "count_total": class_sampler(classes).total,
        **({TAIL: "one class"} if classes.tail else {}),
        "temperature": work.recipe.criterion.temperature,
    }
