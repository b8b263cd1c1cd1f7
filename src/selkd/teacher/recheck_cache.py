"""Rechecking a cache: the teacher runs again, and its draws, a function of seed and content, are compared."""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from selkd.data.samples import SampleDataset
from selkd.teacher.build_cache import draw_rows, plan_batches, plan_shards
from selkd.teacher.cached import CachedTeacher
from selkd.teacher.live import LiveTeacher
from selkd_cache.rows import Rows, row_sums
from selkd_cache.scalars import LARGEST_CODE, bound_of, values_of


class Again(NamedTuple):
    """How a sample's n positions come again.

    Attributes:
        same_draws: float64 [n], the share of the draws that are the same.
        scalar_errors: float64 [n, s], how far the stored scalars are from those that come again, in nats; None in a
            cache without scalars.
        is_within_bound: whether all of these are within the bound of the stored codes.
    """

    same_draws: np.ndarray
    scalar_errors: np.ndarray | None = None
    is_within_bound: bool = True


def compare_again(
    teacher: LiveTeacher, cached: CachedTeacher, samples: SampleDataset, indices: Sequence[int], pad_token_id: int
) -> dict[bytes, Again]:
    """Draw the samples ``indices`` again and compare draws and scalars with those in a cache.

    The teacher's batches are those in which ``build_cache`` runs it on ``samples``. So on the same hardware all draws
    are the same if the cache was built for just these samples.

    Raises:
        InputError: a sample is not in the cache, or has another number of positions there.
    """
    checked_ids = {samples.ids[index] for index in indices}
    compared = {}
    for shard in plan_shards(samples):
        for batch in plan_batches(samples, shard):
            if checked_ids.isdisjoint(samples.ids[index] for index in batch):
                continue
            group, has_scalars = [samples[index] for index in batch], cached.has_scalars
            for drawn in draw_rows(teacher, group, pad_token_id, with_scalars=has_scalars):
                sample_id, again = drawn[0], Rows(drawn[1], drawn[2], drawn[3])
                if sample_id in checked_ids:
                    stored = cached.rows(sample_id, len(again.row_lengths))
                    errors = _scalar_errors(stored, drawn[4] if len(drawn) == 5 else None)
                    compared[sample_id] = Again(same_draws(stored, again), *errors)
    return compared


def _scalar_errors(stored: Rows, again: np.ndarray | None) -> tuple[np.ndarray | None, bool]:
    if again is None or stored.scalars is None:
        return None, True
    storable = np.minimum(again, values_of(np.array(LARGEST_CODE)))  # storing cuts what is larger
    errors = np.abs(values_of(stored.scalars).astype(np.float64) - storable)
    return errors, bool((errors <= bound_of(storable)).all())


def same_draws(stored: Rows, again: Rows) -> np.ndarray:
    """The share of same draws at each of n positions, float64 [n]: sum_v min(stored_v, again_v) / U."""
    keys = [
        np.repeat(np.arange(len(rows.row_lengths)), rows.row_lengths) << 32 | rows.class_ids.astype(np.int64)
        for rows in (stored, again)
    ]
    common, at_stored, at_again = np.intersect1d(keys[0], keys[1], assume_unique=True, return_indices=True)
    n_same = np.minimum(stored.counts[at_stored], again.counts[at_again])
    return np.bincount(common >> 32, n_same, minlength=len(stored.row_lengths)) / np.maximum(row_sums(stored), 1)
