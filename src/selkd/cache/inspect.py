"""What is in a cache: distinct classes a position, counts, and how much of the teacher's mass was drawn."""

from typing import NamedTuple

import numpy as np

from selkd.cache.reader import TeacherCache
from selkd.cache.rows import Rows, row_sums


class Contents(NamedTuple):
    """Figures of some samples of a cache, over the positions that have a class.

    Attributes:
        samples, positions: how many were read.
        classes: int64 [n], distinct classes of each position.
        counts: int64 [largest count + 1], how many classes have each count.
        covered_mass: float64 [n], an estimate of the teacher's probability of the drawn classes together: one less the
            share of the draws whose class came once (Good and Turing; low by less than 1/U). Of ``rs_kd`` alone, else
            of length 0.
        sample_bytes_per_position: float64 [samples].
    """

    samples: int
    positions: int
    classes: np.ndarray
    counts: np.ndarray
    covered_mass: np.ndarray
    sample_bytes_per_position: np.ndarray


def contents(cache: TeacherCache, n_samples: int = 1000, seed: int = 0) -> Contents:
    """Reads random samples of the cache, or all if there are fewer. Raises InputError where one is damaged."""
    ids = cache.sample_ids()
    picked = np.random.default_rng(seed).permutation(len(ids))[:n_samples]
    classes, counts, covered, sizes = [], np.zeros(2**16, np.int64), [], []
    for index in picked:
        rows = cache.get(ids[index])
        has_any = rows.row_lengths > 0
        classes.append(rows.row_lengths[has_any].astype(np.int64))
        counts += np.bincount(rows.counts, minlength=len(counts))
        covered.append(1 - _singles(rows)[has_any] / row_sums(rows)[has_any])
        sizes.append(cache.stored_bytes(ids[index]) / max(int(has_any.sum()), 1))
    largest = int(counts.nonzero()[0].max(initial=0))
    is_rs_kd = cache.fingerprint.get("sampler") == "rs_kd"
    return Contents(
        samples=len(picked),
        positions=sum(map(len, classes)),
        classes=np.concatenate(classes),
        counts=counts[: largest + 1],
        covered_mass=np.concatenate(covered) if is_rs_kd else np.zeros(0),
        sample_bytes_per_position=np.array(sizes),
    )


def summary(found: Contents) -> dict[str, int | float | None]:
    """The figures of ``contents`` in a few numbers."""
    quantiles = np.quantile(found.classes, [0.1, 0.5, 0.9]) if found.positions else np.zeros(3)
    n_classes = max(int(found.counts.sum()), 1)
    return {
        "samples_read": found.samples,
        "classes_p10": float(quantiles[0]),
        "classes_median": float(quantiles[1]),
        "classes_p90": float(quantiles[2]),
        "classes_max": int(found.classes.max(initial=0)),
        "drawn_once_share": float(found.counts[1:2].sum()) / n_classes,
        "covered_mass_estimate": float(found.covered_mass.mean()) if len(found.covered_mass) else None,
    }


def _singles(rows: Rows) -> np.ndarray:
    """int64 [n]: the classes of each row that were drawn once."""
    row = np.repeat(np.arange(len(rows.row_lengths)), rows.row_lengths)
    return np.bincount(row[rows.counts == 1], minlength=len(rows.row_lengths))
