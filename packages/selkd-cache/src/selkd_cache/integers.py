"""How integers become symbols of an entropy coder, and how counted symbols become its frequency tables.

The package's README, "Integers" and "Frequency tables", says the same for writers of other readers.
"""

from functools import lru_cache
from typing import Final

import numpy as np

PRECISION: Final = 24  # bits; the frequencies of a table's row sum to 2^24
LARGEST_VALUE: Final = 2**24 - 1  # the largest integer that the coder holds exactly

# The count that each byte of a stored table stands for: 0 to 7 are exact, larger ones keep three significant bits.
_CODES = np.arange(128, dtype=np.int64)
_COUNTS = np.where(_CODES < 4, _CODES, (4 + _CODES % 4) << np.maximum(_CODES // 4 - 1, 0))
_EXACT: Final = 2**29  # up to such a sum of counts, doubles give the shares exactly


class Buckets:
    """Cuts the integers from 0 to ``largest`` into buckets, which are modelled, and low bits, which are not.

    With m mantissa bits, each value below 2^m has a bucket of its own. From there on, the values of each bit length are
    cut into 2^m buckets of equal size.

    Attributes:
        n: how many buckets there are.
        first: int64 [n], the least value of each bucket.
        size: int32 [n], how many values each bucket holds: a power of two.
    """

    def __init__(self, mantissa_bits: int, largest: int) -> None:
        self._mantissa_bits = mantissa_bits
        self.n = int(self.of(np.array([largest]))[0]) + 1
        buckets = np.arange(self.n)
        octave = np.maximum((buckets >> mantissa_bits) - 1, 0)
        self.first = (buckets - (octave << mantissa_bits)) << octave
        self.size = np.left_shift(1, octave).astype(np.int32)

    def of(self, values: np.ndarray) -> np.ndarray:
        """The bucket of each value, int64."""
        octave = np.maximum(bit_length(values) - 1 - self._mantissa_bits, 0)
        return (octave << self._mantissa_bits) + (values >> octave)


@lru_cache(maxsize=64)
def buckets(mantissa_bits: int, largest: int) -> Buckets:
    """``Buckets``, shared by all models that have the same."""
    return Buckets(mantissa_bits, largest)


class Steps:
    """Cuts the integers from 0 to ``largest`` into buckets of 2^``low_bits`` each; as ``Buckets``."""

    def __init__(self, low_bits: int, largest: int) -> None:
        self._low_bits = low_bits
        self.n = (largest >> low_bits) + 1
        self.first = np.arange(self.n) << low_bits
        self.size = np.full(self.n, 1 << low_bits, np.int32)

    def of(self, values: np.ndarray) -> np.ndarray:
        """The bucket of each value, int64."""
        return values >> self._low_bits


def bit_length(values: np.ndarray) -> np.ndarray:
    """int64: the bit length of each integer from 0 to 2^53 - 1; that of 0 is 0."""
    return np.frexp(values.astype(np.float64))[1].astype(np.int64)


def to_codes(counts: np.ndarray) -> np.ndarray:
    """uint8: for each count, the largest code that stands for no more than it. Only the count 0 has code 0."""
    return (np.searchsorted(_COUNTS, counts, side="right") - 1).astype(np.uint8)


def weights(codes: np.ndarray) -> np.ndarray:
    """The frequencies of the symbols of each row, each less one, float32 [rows, symbols].

    A frequency is at least 1, and those of a row sum to 2^24; constriction brings these numbers back exactly.

    Args:
        codes: uint8 [rows, symbols] below 128, with at least two symbols. A row of zeros stands for equal counts.
    """
    shares = _COUNTS.astype(np.float64).take(codes)
    sums = np.einsum("rs->r", shares)[:, None]  # as shares.sum(axis=1), in a third of the time
    is_unused = sums == 0
    shares += is_unused
    sums += is_unused * codes.shape[1]
    to_share = 2**PRECISION - codes.shape[1]
    if sums.max(initial=0) < _EXACT:
        # A product is below 2^53, so exact. A quotient, below 2^24, is rounded by at most 2^-30, and lacks at least
        # 1 / sum > 2^-29 to the next integer, so rounding does not reach it.
        shares *= to_share
        shares /= sums
        np.floor(shares, out=shares)
    else:
        shares = (shares.astype(np.int64) * to_share // sums.astype(np.int64)).astype(np.float64)
    shares[np.arange(len(shares)), codes.argmax(axis=1)] += to_share - np.einsum("rs->r", shares)
    return shares.astype(np.float32)
