"""The stage that finds or builds the teacher cache of the kept samples."""

import time
from pathlib import Path

from accelerate.utils import gather_object

from selkd.cache.manifest import TAIL, Fingerprint
from selkd.cache.reader import TeacherCache
from selkd.cache.remote import fetch_cache, is_remote
from selkd.cache.verify import verify_cache
from selkd.data.samples import SampleDataset
from selkd.errors import InputError
from selkd.models.tokenizers import tokenizer_fingerprint
from selkd.run.directory import RunDirectory
from selkd.run.record import CACHE_COST, add_cost, cost_of, count_teacher_tokens, note_shared, read_cost, timed
from selkd.run.workspace import Workspace
from selkd.selection.classes import class_sampler
from selkd.teacher.build_cache import build_cache
from selkd.teacher.live import LiveTeacher


def cache(work: Workspace, run: RunDirectory, samples: SampleDataset) -> TeacherCache | None:
    """The cache with the teacher's drawn classes of ``samples``, built if need be; None for a live teacher."""
    recipe = work.recipe
    if recipe.cache is None:
        return None
    with timed(run, "cache"):
        fingerprint, path = cache_fingerprint(work), recipe.cache.path
        if path is not None and is_remote(path):
            opened, cost = _copied(work, path, fingerprint, samples), None
        else:
            directory = cache_directory(work, run)
            larger = _larger(work, directory, fingerprint, samples)
            opened = _built(work, run, directory, fingerprint, samples) if larger is None else larger
            # The cost of a larger cache is not that of these samples, which nobody measured.
            cost = read_cost(directory / CACHE_COST) if larger is None else None
        if path is not None:
            note_shared(run, "cache", cost)
    run.record["teacher_cache"] = opened.stats()
    run.save()
    return opened


def _larger(work: Workspace, directory: Path, fingerprint: Fingerprint, samples: SampleDataset) -> TeacherCache | None:
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
    if problems := verify_cache(directory, decode=False):
        raise InputError(
            f"the teacher cache in {directory} holds more samples than this recipe's and is damaged: {problems[0]}. "
            "repair it by `selkd cache verify --repair`, with the recipe that built it"
        )
    return larger


def _built(
    work: Workspace, run: RunDirectory, directory: Path, fingerprint: Fingerprint, samples: SampleDataset
) -> TeacherCache:
    """The cache of these samples, built by running the teacher; shards that an earlier build finished are kept."""
    # The cost of shards that a killed build left is not known.
    is_cost_known = read_cost(directory / CACHE_COST) is not None or not any(directory.glob("shard-*"))
    started = time.perf_counter()
    if tokens := build(work, directory, samples):
        earlier = run.record.get("teacher_tokens", {}).get("cache", 0)  # for shards that were lost since
        count_teacher_tokens(work, run, cache=earlier + tokens)
        if work.state.is_main_process and is_cost_known:
            add_cost(directory / CACHE_COST, cost_of(time.perf_counter() - started, tokens))
        work.state.wait_for_everyone()
    return TeacherCache.open(directory, fingerprint)


def build(work: Workspace, directory: Path, samples: SampleDataset, *, repair: bool = False) -> int:
    """Build or finish the recipe's cache of ``samples``. Returns the tokens that the teacher ran on."""
    fingerprint, pad_token_id = cache_fingerprint(work), work.models.pad_token_id
    return build_cache(directory, fingerprint, samples, lambda: live_teacher(work), pad_token_id, repair=repair)


def live_teacher(work: Workspace) -> LiveTeacher:
    """The recipe's teacher, loaded, with the recipe's class sampler."""
    recipe = work.recipe
    return LiveTeacher(work.models.teacher, recipe.classes, recipe.criterion.temperature, recipe.seed, work.vocab_size)


def _copied(work: Workspace, url: str, fingerprint: Fingerprint, samples: SampleDataset) -> TeacherCache:
    """A cache that was built elsewhere, copied to this machine. Raises InputError unless it holds every sample."""
    with work.state.main_process_first():
        opened = TeacherCache.open(fetch_cache(url, work.cache_dir / "teacher_caches"), fingerprint)
    if missing := [sample_id for sample_id in samples.ids if sample_id not in opened]:
        raise InputError(
            f"cache.path: the cache at {url} lacks {len(missing)} of the {len(samples)} kept samples, the first "
            f"{missing[0].hex()}. Build a cache for this data in a local folder."
        )
    return opened


def cache_directory(work: Workspace, run: RunDirectory) -> Path:
    """Where the recipe keeps its teacher cache."""
    assert work.recipe.cache is not None
    return Path(work.recipe.cache.path).expanduser() if work.recipe.cache.path else run.path / "teacher_cache"


def cache_fingerprint(work: Workspace) -> dict[str, str | int | float]:
    """Everything that determines the draws but the samples, which the cache finds by their content."""
    recipe = work.recipe
    assert recipe.classes.draws is not None
    return {
        **{f"{kind}_source": digest for kind, digest in work.own_parts.items() if kind == "sampler"},
        "teacher": work.teacher_source.fingerprint,
        "teacher_dtype": work.teacher_precision,
        "tokenizer": tokenizer_fingerprint(work.tokenizer),
        "vocabulary": work.vocab_size,
        "sampler": recipe.classes.sampler,
        "draws": recipe.classes.draws,
        "count_total": class_sampler(recipe.classes).total,
        **({TAIL: "one class"} if recipe.classes.tail else {}),
        "temperature": recipe.criterion.temperature,
        "seed": recipe.seed,
    }
