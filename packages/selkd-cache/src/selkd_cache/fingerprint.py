"""The fingerprint of a cache: all that determines its content, and what it says of how a row is stored."""

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Final

from selkd_cache.errors import InputError
from selkd_cache.rows import LARGEST_COUNT

SCALARS: Final = "scalars"  # a field: how many scalars each position has, 2 or 4
TAIL: Final = "tail"  # a field: class V stands for all classes that a row leaves out

Fingerprint = Mapping[str, str | int | float]


def check_fingerprint(fingerprint: Fingerprint) -> None:
    """Raises InputError unless all values are strings, integers or finite floats, and the sizes can be stored.

    ``draws`` and ``vocabulary`` are integers of at least 1; the counts of a row sum to at most 65,535.
    """
    for field, value in fingerprint.items():
        if not isinstance(field, str) or isinstance(value, bool) or not isinstance(value, str | int | float):
            raise InputError(f"a fingerprint maps names to strings, integers or floats; got {field!r}: {value!r}")
        if isinstance(value, float) and not math.isfinite(value):
            raise InputError(f"fingerprint field {field} must be finite; got {value}")
    for field in ("draws", "vocabulary", *(["count_total"] if "count_total" in fingerprint else [])):
        count = fingerprint.get(field)
        if not isinstance(count, int) or count < 1:
            raise InputError(f"fingerprint field {field} must be an integer of at least 1; got {count!r}")
    if fingerprint.get(SCALARS, 2) not in (2, 4):
        raise InputError(f"fingerprint field {SCALARS} must be 2 or 4, or left out; got {fingerprint[SCALARS]!r}")
    if (total := count_total(fingerprint)) > LARGEST_COUNT:
        raise InputError(f"the counts of a row sum to at most {LARGEST_COUNT}; got {total} as draws or count_total")


def count_total(fingerprint: Fingerprint) -> int:
    """The sum of the counts of a stored row: ``count_total``, or ``draws`` where the fingerprint has none."""
    return int(fingerprint.get("count_total", fingerprint["draws"]))


def n_scalars(fingerprint: Fingerprint) -> int:
    """How many scalars each position has; see ``selkd_cache.rows.Rows``. 0 in a cache without scalars."""
    return int(fingerprint.get(SCALARS, 0))


def n_stored_classes(fingerprint: Fingerprint) -> int:
    """How many classes a stored row may name: those of the vocabulary, and with ``TAIL`` one after them."""
    return int(fingerprint["vocabulary"]) + (TAIL in fingerprint)


def check_same_fingerprint(stored: Fingerprint, expected: Fingerprint, folder: Path) -> None:
    """Raises InputError, which names each field that differs or is missing, with both values, unless they agree."""
    differences = []
    for field in sorted(stored.keys() | expected.keys()):
        # Values are compared as JSON: 1 and 1.0 are equal in Python and yet not the same fingerprint.
        values = [json.dumps(side[field]) if field in side else "none" for side in (stored, expected)]
        if values[0] != values[1]:
            differences.append(f"{field}: stored {values[0]}, expected {values[1]}")
    if differences:
        lacks_scalars = SCALARS in expected and SCALARS not in stored
        way_out = " (cache.scalars: false reads a cache without scalars)" if lacks_scalars else ""
        raise InputError(
            f"the teacher cache in {folder} was built for something else ({'; '.join(differences)}): "
            f"set these back{way_out}, or use another cache.path"
        )
