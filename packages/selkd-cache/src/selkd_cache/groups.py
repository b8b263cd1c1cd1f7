"""Classes that come together: two or more groups, so that a row's classes are mostly of one.

A word's beginnings and its endings, say, hardly ever share a row. Told how many of a row's classes are of each group,
the classes cost less. Any grouping can be decoded; a shard stores the one that its classes were coded with.
"""

from collections.abc import Sequence
from typing import Final

import numpy as np

from selkd_cache.rows import Rows

ITERATIONS: Final = 12
_ROWS_ITERATED: Final = 2**15  # the direction is found from about so many rows, evenly spread over the shard


def grouped(classes: np.ndarray, samples: Sequence[Rows], n_groups: int) -> np.ndarray:
    """The group of each of ``classes``, ascending ids [D]: uint8 [D]. Groups have about as many entries of rows each.

    Classes are ordered by the second singular vector of the matrix of rows and classes, whose first one is only how
    long rows are and how often classes are drawn. It is found by power iteration. All sums run in the order of the
    entries, so that every machine groups alike.
    """
    lengths = np.concatenate([rows.row_lengths for rows in samples]).astype(np.int64)
    row = np.repeat(np.arange(len(lengths)), lengths)
    place = np.searchsorted(classes, np.concatenate([rows.class_ids for rows in samples]))
    n_drawn = np.bincount(place, minlength=len(classes))
    stride = -(-len(lengths) // _ROWS_ITERATED)
    few = slice(None) if stride == 1 else np.flatnonzero(row % stride == 0)
    scores = (classes.astype(np.uint64) * np.uint64(2654435761) % np.uint64(2**32)).astype(np.float64)  # any start
    for iteration in range(ITERATIONS + 1):
        part = slice(None) if iteration == ITERATIONS else few
        scores = _smoothed(scores, row[part], place[part], np.maximum(lengths, 1))
    mass = np.cumsum(n_drawn[order := np.argsort(scores, kind="stable")])
    groups = np.empty(len(classes), np.uint8)
    groups[order] = np.minimum((mass - 1) * n_groups // max(len(row), 1), n_groups - 1)
    return groups


def _smoothed(scores: np.ndarray, row: np.ndarray, place: np.ndarray, lengths: np.ndarray) -> np.ndarray:
    """Each class's mean of the means of its rows, less what all classes have, scaled to 1 at most."""
    n_drawn = np.maximum(np.bincount(place, minlength=len(scores)), 1)
    centred = scores - np.bincount(np.zeros_like(place), scores[place])[:1] / max(len(place), 1)
    means = np.bincount(row, centred[place], minlength=len(lengths)) / lengths
    smoothed = np.bincount(place, means[row], minlength=len(scores)) / n_drawn
    highest = np.abs(smoothed).max(initial=0.0)
    return smoothed / highest if highest > 0 else smoothed
