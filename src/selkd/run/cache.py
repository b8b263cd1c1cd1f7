"""The stage that finds or builds the teacher cache of the kept samples."""

import time
from pathlib import Path

from accelerate.utils import gather_object

from selkd.cache.manifest import Fingerprint
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


def cache(work: Workspace, run: RunDirectory, samples: SampleDataset) -> TeacherCache | None:
    """The teacher's drawn classes of ``samples`` on disk, or None for a live teacher."""
    recipe = work.recipe
    if recipe.cache is None:
        return None
    with timed(run, "cache"):
        fingerprint, path = cache_fingerprint(work), recipe.cache.path
        if path is not None and is_remote(path):
            opened = _copied(work, path, fingerprint, samples)
            cost = None
        else:
            directory = cache_directory(work, run)
            found = _larger(work, directory, fingerprint, samples)
            opened = _built(work, run, directory, fingerprint, samples) if found is None else found
            cost = read_cost(directory / CACHE_COST) if found is None else None  # of these samples alone: not known
        if path is not None:
            note_shared(run, "cache", cost)
    run.record["teacher_cache"] = opened.stats()
    run.save()
    return opened


def _larger(work: Workspace, directory: Path, fingerprint: Fingerprint, samples: SampleDataset) -> TeacherCache | None:
    """A complete cache that was built for more samples and holds all of these; None where theirs is to be built.

    Raises:
        InputError: it is damaged: this recipe can't mend it.
    """
    try:
        found = TeacherCache.open(directory, fingerprint)
    except InputError:
        found = None  # building tells what is wrong
    if found is not None:
        wanted = set(samples.ids)
        if len(found) <= len(wanted) or not all(sample_id in found for sample_id in wanted):
            found = None
    seen = [found is not None]
    if not all(gather_object(seen) if work.state.num_processes > 1 else seen):  # all go the same way
        return None
    if problems := verify_cache(directory, decode=False):
        raise InputError(
            f"the teacher cache in {directory} holds more samples than this recipe's and is damaged: {problems[0]}. "
            "`selkd cache verify --repair`, with the recipe that built it, mends it"
        )
    return found


def _built(
    work: Workspace, run: RunDirectory, directory: Path, fingerprint: Fingerprint, samples: SampleDataset
) -> TeacherCache:
    """The cache of these samples, from the teacher; what an earlier build finished is kept."""
    # Of shards that a killed build left, nobody knows what they cost.
    is_cost_known = read_cost(directory / CACHE_COST) is not None or not any(directory.glob("shard-*"))
    started = time.perf_counter()
    if tokens := build(work, directory, samples):
        earlier = run.record.get("teacher_tokens", {}).get("cache", 0)  # of shards that were lost meanwhile
        count_teacher_tokens(work, run, cache=earlier + tokens)
        if work.state.is_main_process and is_cost_known:
            add_cost(directory / CACHE_COST, cost_of(time.perf_counter() - started, tokens))
        work.state.wait_for_everyone()
    return TeacherCache.open(directory, fingerprint)


def build(work: Workspace, directory: Path, samples: SampleDataset, *, repair: bool = False) -> int:
    """Build or finish the recipe's cache of ``samples``, as ``build_cache``; the tokens that the teacher ran on."""
    recipe = work.recipe
    return build_cache(
        directory,
        cache_fingerprint(work),
        samples,
        lambda: work.models.teacher,
        recipe.classes,
        recipe.criterion.temperature,
        recipe.seed,
        work.models.pad_token_id,
        repair=repair,
    )


def _copied(work: Workspace, url: str, fingerprint: Fingerprint, samples: SampleDataset) -> TeacherCache:
    """A cache that was built elsewhere, copied to this machine; it must hold every sample."""
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
    """Everything but the samples that determines the draws; samples are found by their content."""
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
        "temperature": recipe.criterion.temperature,
        "seed": recipe.seed,
    }
