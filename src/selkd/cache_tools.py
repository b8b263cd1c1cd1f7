"""Checking a teacher cache against its teacher, and rebuilding what is damaged of it: ``selkd cache verify``."""

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from transformers import PreTrainedModel

from selkd import stages
from selkd.build_cache import build_cache, draw_again
from selkd.cache.reader import TeacherCache
from selkd.cache.rows import Rows
from selkd.cache.verify import verify_cache
from selkd.data.samples import SampleDataset
from selkd.errors import InputError
from selkd.pipeline import start
from selkd.recipe import Recipe
from selkd.recipe_files import load_recipe
from selkd.workspace import Workspace

# The same teacher in another precision or on other hardware stays far below; another teacher is far above.
LARGEST_DISTANCE = 0.1


@dataclass(frozen=True)
class Rescored:
    """How the draws of a teacher that ran again compare with those stored.

    Attributes:
        samples, positions: how many were compared.
        identical_positions: those whose classes and counts are all the same.
        distance: mean over the positions of half the absolute differences of the counts over their sum: 0 where all
            are the same, 1 where no draw is.
        worst_sample: id, in hex, of the sample with the largest distance; ``worst_distance`` its distance.
    """

    samples: int
    positions: int
    identical_positions: int
    distance: float
    worst_sample: str
    worst_distance: float

    @property
    def agrees(self) -> bool:
        return self.worst_distance <= LARGEST_DISTANCE


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
    build_cache(
        directory,
        stages.cache_fingerprint(work),
        samples,
        work.teacher,
        recipe.classes,
        recipe.criterion.temperature,
        recipe.seed,
        work.pad_token_id,
        repair=True,
    )
    return verify_cache(directory)


def rescore(directory: Path, recipe: Recipe, run_path: Path | None, n_samples: int, seed: int = 0) -> Rescored:
    """Run the teacher again on random samples of a cache, and compare its draws with those stored.

    Raises:
        InputError: the cache does not open, or was not built by this recipe.
    """
    work, samples = _kept(directory, recipe, run_path)
    cache = TeacherCache.open(directory, stages.cache_fingerprint(work))
    return compare_draws(
        cache,
        samples,
        work.teacher,
        n_samples,
        seed,
        lambda model, group: draw_again(
            model,
            samples,
            group,
            recipe.classes,
            recipe.criterion.temperature,
            recipe.seed,
            work.n_classes,
            work.pad_token_id,
        ),
    )


def compare_draws(
    cache: TeacherCache,
    samples: SampleDataset,
    teacher: Callable[[], PreTrainedModel],
    n_samples: int,
    seed: int,
    draw: Callable[[PreTrainedModel, Sequence[int]], dict[int, Rows]],
) -> Rescored:
    """Compare ``n_samples`` random samples of a cache, or all if there are fewer, with what ``draw`` gives for them."""
    stored = [index for index, sample_id in enumerate(samples.ids) if sample_id in cache]
    if not stored:
        raise InputError(f"none of the recipe's samples is in the teacher cache in {cache.directory}")
    picked = np.random.default_rng(seed).choice(stored, size=min(n_samples, len(stored)), replace=False)
    found = draw(teacher(), sorted(picked.tolist()))
    positions = identical = 0
    total = 0.0
    worst = ("", -1.0)
    for index, again in found.items():
        sample_id = samples.ids[index]
        distances = _distances(cache.get(sample_id), again)
        positions += len(distances)
        identical += int((distances == 0).sum())
        total += float(distances.sum())
        mean = float(distances.mean()) if len(distances) else 0.0
        if mean > worst[1]:
            worst = (sample_id.hex(), mean)
    return Rescored(len(found), positions, identical, total / max(positions, 1), *worst)


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
    own = stages.cache_directory(work, run)
    if own.resolve() != directory.resolve():
        raise InputError(
            f"this recipe keeps its cache in {own}, not in {directory}: give --recipe with --set cache.path={directory}"
        )
    samples = stages.score(work, run)
    if work.state.is_main_process:
        run.save()
    return work, samples


def _distances(stored: Rows, again: Rows) -> np.ndarray:
    """float64 [n]: half the absolute differences of the counts of each position over their sum."""
    n = len(stored.row_lengths)
    if n != len(again.row_lengths):
        return np.ones(n)
    keys, signed = [], []
    for rows, sign in ((stored, 1), (again, -1)):
        row = np.repeat(np.arange(n, dtype=np.int64), rows.row_lengths)
        keys.append(row << 32 | rows.class_ids)
        signed.append(sign * rows.counts.astype(np.int64))
    distinct, place = np.unique(np.concatenate(keys), return_inverse=True)
    difference = np.abs(np.bincount(place, weights=np.concatenate(signed), minlength=len(distinct)))
    sums = np.bincount(keys[0] >> 32, weights=signed[0], minlength=n)
    return np.bincount(distinct >> 32, weights=difference, minlength=n) / (2 * np.maximum(sums, 1))
