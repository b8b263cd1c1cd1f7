"""Checking a teacher cache against its teacher, and rebuilding what is damaged of it: ``selkd cache verify``."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from selkd.cache.reader import TeacherCache
from selkd.cache.verify import verify_cache
from selkd.data.samples import SampleDataset
from selkd.errors import InputError
from selkd.plugins import Sampler
from selkd.recipe.files import load_recipe
from selkd.recipe.recipe import Recipe
from selkd.run.cache import build, cache_directory, cache_fingerprint, live_teacher
from selkd.run.pipeline import start
from selkd.run.score import score
from selkd.run.workspace import Workspace
from selkd.teacher.cached import CachedTeacher
from selkd.teacher.recheck_cache import compare_again


@dataclass(frozen=True)
class Rescored:
    """How many of the stored draws a teacher that ran again draws again.

    Attributes:
        samples, positions: how many were compared.
        identical_positions: those where all draws are the same again; on other hardware or in another precision few
            are, as a draw tips over by a rounding.
        same_draws: the share of single draws that are the same again, sum_v min(stored_v, again_v) / U, mean over the
            positions.
        worst_sample: id, in hex, of the sample with the lowest such share; ``worst_same_draws`` is its share.
        agrees: whether the stored draws are this teacher's: enough are the same again, of all and of each sample.
    """

    samples: int
    positions: int
    identical_positions: int
    same_draws: float
    worst_sample: str
    worst_same_draws: float
    agrees: bool


def recipe_of(directory: Path, recipe: str | None, overrides: list[str] | None = None) -> tuple[Recipe, Path | None]:
    """The recipe that a cache was built by, and its run: the one given, or that of the run in which the cache lies.

    Raises:
        InputError: none is given and the cache is not in a run.
    """
    if recipe is not None:
        return load_recipe(recipe, overrides), None
    own = directory.resolve().parent / "recipe.yaml"
    if not own.is_file():
        raise InputError(
            f"{directory} is not in a run's folder, so the teacher and the data that it was built from are not known: "
            "give --recipe RECIPE"
        )
    return load_recipe(own, overrides), own.parent


def repair(directory: Path, recipe: Recipe, run_path: Path | None) -> list[str]:
    """Rebuild the damaged shards of a cache from the teacher and the text of its recipe; the rest is not touched.

    Returns:
        The problems that are left, as ``verify_cache`` names them: files that selkd did not write are never removed.

    Raises:
        InputError: the recipe keeps its cache elsewhere, or is not the one that this cache was built by.
        RunError: the disk refused.
    """
    work, samples = _kept(directory, recipe, run_path)
    build(work, directory, samples, repair=True)
    return verify_cache(directory)


def rescore(directory: Path, recipe: Recipe, run_path: Path | None, n_samples: int, seed: int = 0) -> Rescored:
    """Run the teacher again on random samples of a cache, or all if there are fewer, and compare the draws.

    Raises:
        InputError: the cache does not open, was not built by this recipe, or a row of it belongs to no position.
    """
    work, samples = _kept(directory, recipe, run_path)
    cache = TeacherCache.open(directory, cache_fingerprint(work))
    stored = [index for index, sample_id in enumerate(samples.ids) if sample_id in cache]
    if not stored:
        raise InputError(f"none of the recipe's samples is in the teacher cache in {cache.directory}")
    picked = np.random.default_rng(seed).choice(stored, size=min(n_samples, len(stored)), replace=False).tolist()
    shares = compare_again(live_teacher(work), CachedTeacher(cache), samples, picked, work.models.pad_token_id)
    return judged(shares, Sampler.find(recipe.classes.sampler).least_same_draws)


def judged(shares: Mapping[bytes, np.ndarray], least_same_draws: tuple[float, float]) -> Rescored:
    """The shares of same draws at the positions of each sample, as ``compare_again`` gives them, in a few numbers.

    Args:
        least_same_draws: the least mean share, of all positions and of each sample, of draws of the same teacher.
    """
    least, least_of_sample = least_same_draws
    of_sample = {sample_id: float(share.mean()) for sample_id, share in shares.items() if len(share)}
    everywhere = np.concatenate(list(shares.values()))
    worst = min(of_sample, key=lambda sample_id: of_sample[sample_id])
    same_draws = float(everywhere.mean())
    return Rescored(
        samples=len(shares),
        positions=len(everywhere),
        identical_positions=int((everywhere == 1).sum()),
        same_draws=same_draws,
        worst_sample=worst.hex(),
        worst_same_draws=of_sample[worst],
        agrees=same_draws >= least and of_sample[worst] >= least_of_sample,
    )


def _kept(directory: Path, recipe: Recipe, run_path: Path | None) -> tuple[Workspace, SampleDataset]:
    """The recipe's workspace and kept samples."""
    if recipe.cache is None:
        raise InputError(
            "cache: this recipe keeps the teacher live, so no cache was built by it; give another --recipe"
        )
    work, run = start(recipe, run_path)
    own = cache_directory(work, run)
    if own.resolve() != directory.resolve():
        raise InputError(
            f"this recipe keeps its cache in {own}, not in {directory}: give --recipe with --set cache.path={directory}"
        )
    return work, score(work, run)
