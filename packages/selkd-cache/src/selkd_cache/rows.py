"""The drawn classes of one sample, and the checks that they can be stored without loss."""

from typing import Final, NamedTuple

import numpy as np

from selkd_cache.errors import InputError
from selkd_cache.scalars import codes_of

LARGEST_COUNT: Final = 2**16 - 1
_LARGEST_UINT32: Final = 2**32 - 1


class Rows(NamedTuple):
    """The drawn classes of one sample of n positions: ragged rows, concatenated.

    A position without a target has an empty row.

    Attributes:
        row_lengths: uint16 [n], the number of distinct classes at each position.
        class_ids: uint32 [sum(row_lengths)], strictly ascending within a row.
        counts: uint16 [sum(row_lengths)], how often each class was drawn, at least 1.
        scalars: uint16 [n, s], the codes of ``selkd_cache.scalars`` of s numbers at each position: the teacher's
            entropy and its -log p(y), y the true token, both at temperature 1, then both at the temperature of the
            draws where that is another; None in a cache without scalars.
    """

    row_lengths: np.ndarray
    class_ids: np.ndarray
    counts: np.ndarray
    scalars: np.ndarray | None = None


def checked_rows(
    row_lengths: np.ndarray, class_ids: np.ndarray, counts: np.ndarray, scalars: np.ndarray | None = None
) -> Rows:
    """``Rows`` of these arrays, which may have any integer dtype.

    Args:
        scalars: [n, s], the numbers themselves, in nats.

    Raises:
        InputError: an array is not one-dimensional or not of integers, a value is out of range (values are never
            clipped), lengths do not agree, the class ids of a row do not ascend strictly, or a scalar is negative or
            NaN.
    """
    lengths = _checked("row_lengths", row_lengths, 0, LARGEST_COUNT)
    ids = _checked("class_ids", class_ids, 0, _LARGEST_UINT32)
    numbers = _checked("counts", counts, 1, LARGEST_COUNT)
    if not lengths.sum() == ids.size == numbers.size:
        raise InputError(
            f"expected as many class_ids and counts as the sum of row_lengths, {lengths.sum()}; "
            f"got {ids.size} class_ids and {numbers.size} counts"
        )
    steps = np.diff(ids, prepend=-1)
    steps[row_starts(lengths)] = 1
    if steps.size and steps.min() < 1:
        index = int(np.argmin(steps))
        raise InputError(
            f"class_ids must ascend strictly within a row; got {ids[index]} after {ids[index - 1]} at index {index}: "
            "sort each row and merge equal ids into one count"
        )
    if scalars is not None and (scalars.ndim != 2 or len(scalars) != lengths.size):
        raise InputError(f"scalars: expected [{lengths.size}, s], a row for each position; got {list(scalars.shape)}")
    codes = None if scalars is None else codes_of(scalars)
    return Rows(lengths.astype(np.uint16), ids.astype(np.uint32), numbers.astype(np.uint16), codes)


def check_totals(rows: Rows, total: int) -> None:
    """Raises InputError unless the counts of each row that is not empty sum to ``total``."""
    sums = row_sums(rows)
    wrong = np.flatnonzero((sums != total) & (rows.row_lengths > 0))
    if wrong.size:
        row = int(wrong[0])
        raise InputError(
            f"the counts of a row must sum to {total}; got {sums[row]} at row {row} ({wrong.size} such rows): "
            "a draw was lost or made twice"
        )


def row_starts(lengths: np.ndarray) -> np.ndarray:
    """The index in the flat arrays at which each row that is not empty starts."""
    return (np.cumsum(lengths, dtype=np.int64) - lengths)[lengths > 0]


def row_sums(rows: Rows) -> np.ndarray:
    """The sum of the counts of each row, int64 [n]; 0 for an empty row."""
    sums = np.zeros(len(rows.row_lengths), np.int64)
    if len(rows.counts):
        sums[rows.row_lengths > 0] = np.add.reduceat(rows.counts.astype(np.int64), row_starts(rows.row_lengths))
    return sums


def _checked(name: str, values: np.ndarray, smallest: int, largest: int) -> np.ndarray:
    array = np.asarray(values)
    if array.ndim != 1 or array.dtype.kind not in "iu":
        raise InputError(f"{name} must be a one-dimensional array of integers; got {array.dtype} {list(array.shape)}")
    if array.size and not (smallest <= array.min() and array.max() <= largest):
        raise InputError(f"{name} must lie from {smallest} to {largest}; got {array.min()} to {array.max()}")
    return array.astype(np.int64)
