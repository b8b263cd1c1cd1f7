"""The scalars of a position: non-negative numbers in nats, rounded to 16 bits with a stated bound.

The package's README, "Scalars", says the same for writers of other readers.
"""

from functools import lru_cache
from typing import Final

import numpy as np

from selkd_cache.errors import InputError

STEPS: Final = 32  # codes a nat from 1 nat on, and codes an octave below
_OCTAVES: Final = 20  # from 2^-20 to 1; below, codes are 2^-25 apart
_ONE: Final = (_OCTAVES + 1) * STEPS  # the code of 1 nat
LARGEST_CODE: Final = 2**16 - 1
LARGEST_ERROR: Final = 1 / (2 * STEPS)
"""How far a value comes back from what was stored: nats from 1 nat on, and a share of the value below (at least 2^-26
nats). What is above the largest code, 2,027 nats, comes back as that."""

_CODES = np.arange(LARGEST_CODE + 1, dtype=np.int64)
_EXPONENTS = np.maximum(_CODES // STEPS, 1) - _OCTAVES - 6
_BELOW_ONE = np.ldexp((_CODES % STEPS + STEPS * (_CODES >= STEPS)).astype(np.float64), _EXPONENTS.clip(max=0))
_VALUES = np.where(_CODES < _ONE, _BELOW_ONE, 1 + (_CODES - _ONE) / STEPS).astype(np.float32)


def values_of(codes: np.ndarray) -> np.ndarray:
    """The number that each code stands for, float32, which holds it exactly."""
    return _VALUES[codes]


def codes_of(values: np.ndarray) -> np.ndarray:
    """The code nearest to each number, uint16; of two equally near ones the lower.

    Raises:
        InputError: a number is negative or NaN.
    """
    exact = np.asarray(values, dtype=np.float64)
    if not (exact >= 0).all():
        raise InputError(
            f"scalars are numbers from 0, in nats; got {exact[~(exact >= 0)][0]}. Infinite logits give no "
            "finite entropy: cache.scalars: false stores no scalars"
        )
    above = np.searchsorted(_VALUES, exact).clip(1, LARGEST_CODE)
    is_lower = exact - _VALUES[above - 1] <= _VALUES[above].astype(np.float64) - exact
    return (above - is_lower).astype(np.uint16)


def bound_of(values: np.ndarray) -> np.ndarray:
    """How far numbers may come back from these, in nats, rounding of float32 included."""
    return np.maximum(np.minimum(values, 1.0) * LARGEST_ERROR, 2.0**-26) * 1.001


@lru_cache(maxsize=8)
def sixteenths_of_log2(largest: int) -> np.ndarray:
    """floor(16 * log2(c)) for c = 1 to ``largest``, and 0 for c = 0, int64: exact, so the same on every machine."""
    return np.array([0, *((c**16).bit_length() - 1 for c in range(1, largest + 1))], np.int64)
