"""Rechecking a cache: the teacher runs again, and its draws, a function of seed and content, are compared."""

from collections.abc import Sequence

import numpy as np

from selkd.data.samples import SampleDataset
from selkd.teacher.build_cache import draw_rows, plan_batches, plan_shards
from selkd.teacher.cached import CachedTeacher
from selkd.teacher.live import LiveTeacher
from selkd_cache.rows import Rows, row_sums


def compare_again(
    teacher: LiveTeacher, cached: CachedTeacher, samples: SampleDataset, indices: Sequence[int], pad_token_id: int
) -> dict[bytes, np.ndarray]:
    """Draw the samples ``indices`` again and compare the draws with those in a cache.

    The teacher's batches are those in which ``build_cache`` runs it on ``samples``. So on the same hardware all draws
    are the same if the cache was built for just these samples.

    Returns:
        Sample id -> float64 [n], the share of the draws that are the same again at each of the sample's n positions.

    Raises:
        InputError: a sample is not in the cache, or has another number of positions there.
    """
    checked_ids = {samples.ids[index] for index in indices}
    shares = {}
    for shard in plan_shards(samples):
        for batch in plan_batches(samples, shard):
            if checked_ids.isdisjoint(samples.ids[index] for index in batch):
                continue
            for sample_id, *again in draw_rows(teacher, [samples[index] for index in batch], pad_token_id):
                if sample_id in checked_ids:
                    shares[sample_id] = same_draws(cached.rows(sample_id, len(again[0])), Rows(*again))
    return shares


def same_draws(stored: Rows, again: Rows) -> np.ndarray:
    """The share of same draws at each of n positions, float64 [n]: sum_v min(stored_v, again_v) / U."""
    keys = [
        np.repeat(np.arange(len(rows.row_lengths)), rows.row_lengths) << 32 | rows.class_ids.astype(np.int64)
        for rows in (stored, again)
    ]
    common, at_stored, at_again = np.intersect1d(keys[0], keys[1], assume_unique=True, return_indices=True)
    n_same = np.minimum(stored.counts[at_stored], again.counts[at_again])
    return np.bincount(common >> 32, n_same, minlength=len(stored.row_lengths)) / np.maximum(row_sums(stored), 1)
