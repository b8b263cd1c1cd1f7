"""``selkd cache verify``: compare a cache with its teacher, which runs again, and rebuild damaged shards."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from selkd.data.samples import SampleDataset
from selkd.errors import InputError
from selkd.plugins import Sampler
from selkd.recipe.files import load_recipe
from selkd.recipe.foreign import require_model_here
from selkd.recipe.recipe import Recipe
from selkd.run.cache import build, cache_directory, cache_fingerprint, live_teacher
from selkd.run.inputs import held_inputs
from selkd.run.pipeline import start
from selkd.run.score import cached_samples
from selkd.run.workspace import Workspace
from selkd.teacher.cached import CachedTeacher
from selkd.teacher.recheck_cache import Again, compare_again
from selkd_cache.reader import TeacherCache
from selkd_cache.verify import verify_cache

# Nats, the mean error of stored scalars against the same teacher's in another precision: 0.034 and 0.040 were measured,
# and 0.087 where the weights have 1% of noise (docs/results/cache.md).
FARTHEST_SCALARS = 0.07
MOST_DRAWS_JUDGED = 64  # the limits were measured at 8 to 64 draws; with more, other teachers' draws are the same, too


@dataclass(frozen=True)
class Rescored:
    """How many of the stored draws are the same when the teacher runs again.

    Attributes:
        samples, positions: how many were compared.
        identical_positions: positions at which all draws are the same. On other hardware, or in another precision, they
            are few, because a rounding turns one draw into another.
        same_draws: the share of draws that are the same, sum_v min(stored_v, again_v) / U, mean over the positions.
        worst_sample: the id, in hex, of the sample with the lowest share; ``worst_same_draws`` is its share.
        scalar_error: the mean distance in nats between the stored scalars and those that come again; None in a cache
            without scalars. ``worst_scalar_error`` is the largest, and ``scalars_within_bound`` says whether all are
            within what storing them may change.
        agrees: whether what is stored is this teacher's: all draws are the same, and the scalars within their bound; or
            enough draws are, of all and of each sample, and the mean distance is at most ``FARTHEST_SCALARS``; None
            where draws differ and nobody measured how many are enough: for a user's own sampler, and for more than
            ``MOST_DRAWS_JUDGED`` draws.
    """

    samples: int
    positions: int
    identical_positions: int
    same_draws: float
    worst_sample: str
    worst_same_draws: float
    scalar_error: float | None
    worst_scalar_error: float | None
    scalars_within_bound: bool | None
    agrees: bool | None


def recipe_of(directory: Path, recipe: str | None, overrides: list[str] | None = None) -> tuple[Recipe, Path | None]:
    """The recipe that a cache was built by: ``recipe`` itself, or that of the run in whose folder the cache is.

    Returns:
        The recipe, and the run's folder, or None with a recipe of the caller's.

    Raises:
        InputError: ``recipe`` is None and the cache is not in a run's folder.
    """
    if recipe is not None:
        return load_recipe(recipe, overrides), None
    run_recipe = directory.resolve().parent / "recipe.yaml"
    if not run_recipe.is_file():
        raise InputError(
            f"{directory} is not in a run's folder, so the teacher and the data that it was built from are not known: "
            "give --recipe RECIPE"
        )
    return load_recipe(run_recipe, overrides), run_recipe.parent


def repair(directory: Path, recipe: Recipe, run_path: Path | None) -> list[str]:
    """Rebuild the damaged shards of a cache from its recipe's teacher and text; whole shards are not touched.

    Returns:
        The problems that are left, as ``verify_cache`` lists them. Files that selkd did not write are never removed.

    Raises:
        InputError: the recipe keeps its cache elsewhere, or this cache was built by another recipe.
        RunError: the disk refused.
    """
    with _kept(directory, recipe, run_path) as (work, samples):
        build(work, directory, samples, repair=True)
    return verify_cache(directory)


def rescore(directory: Path, recipe: Recipe, run_path: Path | None, n_samples: int, seed: int = 0) -> Rescored:
    """Run the teacher again on random samples of a cache, or on all if there are fewer, and compare the draws.

    Raises:
        InputError: the cache does not open, was built by another recipe, or has rows that belong to no position.
    """
    require_model_here(recipe.teacher)
    with _kept(directory, recipe, run_path) as (work, samples):
        cache = TeacherCache.open(directory, cache_fingerprint(work))
        stored = [index for index, sample_id in enumerate(samples.ids) if sample_id in cache]
        if not stored:
            raise InputError(f"none of the recipe's samples is in the teacher cache in {cache.directory}")
        picked = np.random.default_rng(seed).choice(stored, size=min(n_samples, len(stored)), replace=False).tolist()
        again = compare_again(live_teacher(work), CachedTeacher(cache), samples, picked, work.models.pad_token_id)
    is_measured = (recipe.classes.draws or 0) <= MOST_DRAWS_JUDGED
    return judged(again, Sampler.find(recipe.classes.sampler).least_same_draws if is_measured else None)


def judged(again: Mapping[bytes, Again], least_same_draws: tuple[float, float] | None) -> Rescored:
    """The verdict on what ``compare_again`` returns.

    Args:
        least_same_draws: the lowest mean share, over all positions and over each sample's, that is taken for the same
            teacher's; None: not measured.
    """
    shares = {sample_id: each.same_draws for sample_id, each in again.items()}
    sample_means = {sample_id: float(share.mean()) for sample_id, share in shares.items() if len(share)}
    everywhere = np.concatenate(list(shares.values()))
    errors = [each.scalar_errors for each in again.values() if each.scalar_errors is not None]
    scalars = np.concatenate(errors) if errors else None
    is_within_bound = all(each.is_within_bound for each in again.values())
    worst = min(sample_means, key=lambda sample_id: sample_means[sample_id])
    same_draws = float(everywhere.mean())
    agrees: bool | None = is_within_bound if same_draws == 1 else None
    if agrees is None and least_same_draws is not None:
        agrees = same_draws >= least_same_draws[0] and sample_means[worst] >= least_same_draws[1]
        agrees = agrees and (scalars is None or float(scalars.mean()) <= FARTHEST_SCALARS)
    return Rescored(
        samples=len(shares),
        positions=len(everywhere),
        identical_positions=int((everywhere == 1).sum()),
        same_draws=same_draws,
        worst_sample=worst.hex(),
        worst_same_draws=sample_means[worst],
        scalar_error=None if scalars is None else float(scalars.mean()),
        worst_scalar_error=None if scalars is None else float(scalars.max(initial=0.0)),
        scalars_within_bound=None if scalars is None else is_within_bound,
        agrees=agrees,
    )


@contextmanager
def _kept(directory: Path, recipe: Recipe, run_path: Path | None) -> Iterator[tuple[Workspace, SampleDataset]]:
    """The recipe's workspace and kept samples; the block has the run's folder to itself.

    Raises:
        InputError: the recipe does not keep its cache in ``directory``.
    """
    if recipe.cache is None:
        raise InputError(
            "cache: this recipe keeps the teacher live, so no cache was built by it; give another --recipe"
        )
    with start(recipe, run_path) as (work, run):
        recipe_cache = cache_directory(work, run)
        if recipe_cache.resolve() != directory.resolve():
            raise InputError(
                f"this recipe keeps its cache in {recipe_cache}, not in {directory}: "
                f"give --recipe with --set cache.path={directory}"
            )
        held_inputs(work, run)
        yield work, cached_samples(work)
