"""Checking a teacher cache against its teacher, and rebuilding what is damaged of it: ``selkd cache verify``."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from selkd.cache.reader import TeacherCache
from selkd.cache.verify import verify_cache
from selkd.data.samples import SampleDataset
from selkd.errors import InputError
from selkd.plugins import Sampler
from selkd.recipe.files import load_recipe
from selkd.recipe.recipe import Recipe
from selkd.run.cache import build, cache_directory, cache_fingerprint
from selkd.run.pipeline import start
from selkd.run.score import score
from selkd.run.workspace import Workspace
from selkd.teacher.recheck_cache import Again, compare_again

# Of the excess, either way. Measured on SmolLM2-135M at U = 64 (docs/results/cache.md): the same teacher in float32, in
# other batches or without oneDNN stays below 0.0006, one at temperature 1.1 is above 0.0027.
LARGEST_EXCESS = 0.0015


@dataclass(frozen=True)
class Rescored:
    """How the stored draws compare with the probabilities of a teacher that ran again.

    Attributes:
        samples, positions: how many were compared.
        identical_positions: those where the same seed draws the same classes and counts again; on other hardware or
            in another precision many differ, as a draw tips over by a rounding.
        squared_error: mean over the positions of sum_v (counts_v / total - mean_v)^2, the mean being that of the
            sampler's draws from the teacher's probabilities.
        expected_squared_error: what it would be of draws from these very probabilities.
        excess: the first less the second: 0 up to scatter where the stored draws are this teacher's. Another teacher
            adds its squared distance; one whose draws scatter less makes it negative.
        is_exact: whether the expectation is known exactly; of a user's own sampler it is an upper bound.
        standard_error: of ``excess``, over positions.
        outlying_samples: how many have an excess of their own beyond the limit and five of their own standard errors.
        worst_sample: id, in hex, of the sample with the largest excess; ``worst_excess`` its excess.
    """

    samples: int
    positions: int
    identical_positions: int
    squared_error: float
    expected_squared_error: float
    excess: float
    standard_error: float
    is_exact: bool
    outlying_samples: int
    worst_sample: str
    worst_excess: float

    @property
    def agrees(self) -> bool:
        """Whether all draws are the same again, or the excess is within its limit: of all together, and of each sample.

        Few positions get the benefit of their own scatter: three standard errors of the mean over all.
        """
        if self.identical_positions == self.positions:
            return True
        excess = abs(self.excess) if self.is_exact else self.excess
        return excess <= LARGEST_EXCESS + 3 * self.standard_error and self.outlying_samples == 0


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
    """Run the teacher again on random samples of a cache, or all if there are fewer, and judge what is stored by it.

    Raises:
        InputError: the cache does not open, was not built by this recipe, or a row of it belongs to no position.
    """
    work, samples = _kept(directory, recipe, run_path)
    cache = TeacherCache.open(directory, cache_fingerprint(work))
    stored = [index for index, sample_id in enumerate(samples.ids) if sample_id in cache]
    if not stored:
        raise InputError(f"none of the recipe's samples is in the teacher cache in {cache.directory}")
    picked = np.random.default_rng(seed).choice(stored, size=min(n_samples, len(stored)), replace=False)
    found = compare_again(
        work.models.teacher,
        samples,
        sorted(picked.tolist()),
        recipe.classes,
        recipe.criterion.temperature,
        recipe.seed,
        work.vocab_size,
        work.models.pad_token_id,
        cache.get,
    )
    return judged(
        {samples.ids[index]: again for index, again in found.items()},
        is_exact=not Sampler.find(recipe.classes.sampler).is_own,
    )


def judged(found: Mapping[bytes, Again], is_exact: bool) -> Rescored:
    """The comparison of all samples, at least one, in a few numbers."""
    identical, errors, expected = (
        np.concatenate([getattr(again, name) for again in found.values()])
        for name in ("is_identical", "squared_error", "expected")
    )
    each = {
        sample_id: again.squared_error - again.expected for sample_id, again in found.items() if len(again.expected)
    }
    excesses = {sample_id: float(values.mean()) for sample_id, values in each.items()}
    outlying = [
        sample_id
        for sample_id, values in each.items()
        if excesses[sample_id] > LARGEST_EXCESS + 5 * _standard_error(values)
    ]
    worst = max(excesses, key=lambda sample_id: excesses[sample_id])
    excess = errors - expected
    return Rescored(
        samples=len(found),
        positions=len(excess),
        identical_positions=int(identical.sum()),
        squared_error=float(errors.mean()),
        expected_squared_error=float(expected.mean()),
        excess=float(excess.mean()),
        standard_error=_standard_error(excess),
        is_exact=is_exact,
        outlying_samples=len(outlying),
        worst_sample=worst.hex(),
        worst_excess=excesses[worst],
    )


def _standard_error(values: np.ndarray) -> float:
    """Of the mean of these; of one alone nothing is known."""
    return float(values.std(ddof=1) / len(values) ** 0.5) if len(values) > 1 else float("inf")


def as_answer(rescored: Rescored) -> dict[str, Any]:
    """For the command's answer."""
    return {**asdict(rescored), "agrees": rescored.agrees}


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
