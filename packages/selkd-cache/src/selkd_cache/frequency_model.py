"""The model of a shard: which classes its samples have, how often, and how the coded symbols are distributed.

``codec.fit`` makes it from the shard's own draws; the shard stores it. The package's README defines the bytes.
"""

import struct
from collections.abc import Sequence
from functools import cached_property, lru_cache
from typing import Any, Final

import numpy as np
import zstandard

from selkd_cache.errors import InputError
from selkd_cache.groups import grouped
from selkd_cache.integers import LARGEST_VALUE, Buckets, Steps, bit_length, buckets, weights
from selkd_cache.rows import LARGEST_COUNT, Rows
from selkd_cache.scalars import sixteenths_of_log2

CLASSES_LEFT: Final = 16  # contexts tell apart 1, 2, … 15 classes left, and 16 or more
MOST_GROUPS: Final = 16
HEAVIEST: Final = 8  # contexts tell apart eighths, or sixteenths, of the draws that a row's heaviest class has
Table = str
_OF_DRAWS: Final[tuple[Table, ...]] = ("singles", "heavies", "gaps", "counts")
_OF_GROUPS: Final[tuple[Table, ...]] = ("singles", "heavies", "parts", "gaps", "counts")
_OF_SCALARS: Final[tuple[Table, ...]] = ("entropy", "entropy_quarter", "cross_entropy", "cross_entropy_quarter")

_LEVEL = 19
_HEADER = struct.Struct("<II")
_MORE = struct.Struct("<II")  # of a model with scalars: groups of classes, scalars
_LARGEST = struct.Struct("<H")
_LENGTH = struct.Struct("<I")


class Model:
    """The part of a shard that all of its samples are coded with.

    Args:
        total: the sum of the counts of each row that is not empty.
        ids: uint32 [D], the ids of the D drawn classes, ascending.
        octaves: uint8 [D], the bit length of how often each class was drawn.
        groups: uint8 [D], the group of each class, below ``n_groups``; None: there is one group.
        n_groups: how many groups there are.
        largest_codes: the largest code of each scalar; none: the cache has no scalars, and one group.

    Attributes:
        order: int64 [D], the places in ``ids`` of the classes by rank: by group, and in a group those drawn more often
            first, equal ones by ascending id.
        group_sizes: int64 [G], how many classes each group has.
        codes: for each of ``tables``, uint8 [contexts, symbols]: how often each symbol was coded, as
            ``integers.to_codes`` rounds it.
    """

    def __init__(
        self,
        total: int,
        ids: np.ndarray,
        octaves: np.ndarray,
        groups: np.ndarray | None = None,
        n_groups: int = 1,
        largest_codes: Sequence[int] = (),
    ) -> None:
        self.total = total
        self.ids = ids
        self.octaves = octaves
        self.groups = np.zeros(len(ids), np.uint8) if groups is None else groups
        self.n_groups = n_groups
        self.group_sizes = np.array([np.count_nonzero(self.groups == group) for group in range(n_groups)])
        self.order = _by_rank(self.groups, octaves, n_groups)
        self.first_of_group = np.cumsum(self.group_sizes) - self.group_sizes
        self.largest_codes = tuple(largest_codes)
        self.codes: dict[Table, np.ndarray] = {}
        largest_rank = max(len(ids) - 1, 0)
        # Singles and heavies count the classes of a row that were drawn once, and more often.
        self.buckets: dict[Table, Buckets | Steps] = {
            "singles": buckets(3, total),
            "heavies": buckets(3, total // 2),
            "parts": buckets(3, total),
            "gaps": buckets(1, largest_rank),
            "counts": buckets(1, total),
        }
        self._shapes: dict[Table, int] = {}  # of the tables of scalars, how many contexts they have
        n_uncertain = (int(sixteenths_of_log2(total)[total]) >> 2) + 1
        for number, largest in enumerate(self.largest_codes):
            nats, quarter = scalar_tables(number)
            self.buckets[nats], self.buckets[quarter] = Steps(0, largest >> 5), Steps(3, 31)
            n_nats = (largest >> 5) + 1
            if number % 2 == 0:
                self._shapes[nats], self._shapes[quarter] = n_uncertain, n_uncertain * n_nats
                n_before = n_nats
            else:
                self._shapes[nats] = n_before * (HEAVIEST + 1)
                self._shapes[quarter] = (2 * HEAVIEST + 1) * n_nats
        self.n_octaves = len(ids).bit_length() + 1
        self.context_of_rank = _context_of_rank(len(ids).bit_length())
        self._bucket_of_excess = _bucket_of_excess(total)

    @property
    def tables(self) -> tuple[Table, ...]:
        """The names of the tables, in the order in which they are stored."""
        of_scalars = [name for number in range(len(self.largest_codes)) for name in scalar_tables(number)]
        return (*(_OF_GROUPS if of_scalars else _OF_DRAWS), *of_scalars)

    @classmethod
    def of_classes(cls, samples: Sequence[Rows], n_groups: int = 1) -> "Model":
        """The model of these checked samples, still without tables.

        Args:
            n_groups: how many groups the classes are put into where there are scalars, else it is one.
        """
        ids, n_drawn = np.unique(np.concatenate([rows.class_ids for rows in samples]), return_counts=True)
        if len(ids) > LARGEST_VALUE:
            raise InputError(f"a shard holds at most {LARGEST_VALUE} distinct classes; got {len(ids)}")
        octaves = bit_length(n_drawn).astype(np.uint8)
        scalars = [rows.scalars for rows in samples if rows.scalars is not None]
        largest = [int(column.max(initial=0)) for column in np.concatenate(scalars).T] if scalars else []
        n_groups = n_groups if scalars else 1
        groups = grouped(ids, samples, n_groups) if scalars else None
        sums = [rows.counts[: rows.row_lengths[rows.row_lengths > 0][0]] for rows in samples if len(rows.counts)]
        total = int(sums[0].sum(dtype=np.int64)) if sums else 0
        if total > LARGEST_COUNT:
            raise InputError(f"the counts of a row sum to at most {LARGEST_COUNT}; got {total}")
        return cls(total, ids.astype(np.uint32), octaves, groups, n_groups, largest)

    def shape(self, table: Table) -> tuple[int, int]:
        """The number of contexts and of symbols of a table."""
        contexts = {
            "singles": 1,
            "heavies": self.buckets["singles"].n,
            "parts": 2 * (self.n_groups - 1) * self.buckets["parts"].n,
            "gaps": 2 * self.n_groups * self.n_octaves * CLASSES_LEFT,
            "counts": self.buckets["counts"].n * CLASSES_LEFT,
            **self._shapes,
        }
        return contexts[table], max(2, self.buckets[table].n)

    def gap_context(self, kind: np.ndarray, rank_context: np.ndarray | np.int64, left: np.ndarray) -> np.ndarray:
        """The context of each gap.

        Args:
            kind: the number of the group in lists of heavies, and G more in lists of singles.
            rank_context: ``context_of_rank`` of the rank before.
            left: how many classes of its list are still to come, this one included.
        """
        group = kind * (self.n_octaves * CLASSES_LEFT) - 1
        return group + rank_context + np.minimum(left, CLASSES_LEFT)

    def count_context(self, excess: np.ndarray, left: np.ndarray) -> np.ndarray:
        """The context of each count.

        Args:
            excess: the draws of the row still to be told out, beyond two for each heavy class.
            left: how many heavy classes of the row are still to come, this one included.
        """
        return self._bucket_of_excess[excess] * CLASSES_LEFT + np.minimum(left, CLASSES_LEFT) - 1

    def part_context(self, kind: int, group: int, left: np.ndarray) -> np.ndarray:
        """The context of how many of a row's classes are of a group.

        Args:
            kind: 0 for heavies, 1 for singles.
            left: how many of the row's classes of that kind are of this group or of a later one.
        """
        buckets = self.buckets["parts"]
        return (kind * (self.n_groups - 1) + group) * buckets.n + buckets.of(left)

    def scalar_context(
        self, number: int, uncertainty: np.ndarray, heaviest: np.ndarray, before: np.ndarray
    ) -> tuple[np.ndarray, np.ndarray]:
        """The contexts of a scalar's nats, and of its quarter where these are 0; each nat has contexts of its own.

        Args:
            number: which scalar.
            uncertainty: of each row, the draws' own entropy in sixteenths of a bit.
            heaviest: how often each row's heaviest class was drawn.
            before: the scalar before, where that is the entropy.
        """
        if number % 2 == 0:
            return uncertainty >> 2, (uncertainty >> 2) * ((self.largest_codes[number] >> 5) + 1)
        eighth, sixteenth = (heaviest * parts // max(self.total, 1) for parts in (HEAVIEST, 2 * HEAVIEST))
        n_nats = (self.largest_codes[number] >> 5) + 1
        return (before >> 5) * (HEAVIEST + 1) + eighth, sixteenth * n_nats

    @cached_property
    def weights(self) -> dict[Table, np.ndarray]:
        """``integers.weights`` of each table."""
        return {table: weights(self.codes[table]) for table in self.tables}

    @cached_property
    def _rank_of_place(self) -> np.ndarray:
        """The inverse of ``order``."""
        ranks = np.empty(len(self.order), np.int64)
        ranks[self.order] = np.arange(len(ranks))
        return ranks

    def ranks(self, class_ids: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """int64, the group of each class and its rank there; all of them must be classes of the model."""
        place = np.searchsorted(self.ids, class_ids)
        group = self.groups[place].astype(np.int64)
        return group, self._rank_of_place[place] - self.first_of_group[group]

    def to_bytes(self) -> bytes:
        gaps = np.diff(self.ids.astype(np.int64), prepend=-1) - 1
        header, arrays = _HEADER.pack(self.total, len(self.ids)), [*gaps.astype("<u4").view(np.uint8).reshape(-1, 4).T]
        arrays.append(self.octaves)
        if self.largest_codes:
            header += _MORE.pack(self.n_groups, len(self.largest_codes))
            header += b"".join(map(_LARGEST.pack, self.largest_codes))
            arrays.append(self.groups)
        arrays += [self.codes[table] for table in self.tables]
        compressor = zstandard.ZstdCompressor(level=_LEVEL)
        frames = [compressor.compress(np.ascontiguousarray(array).tobytes()) for array in arrays]
        return header + b"".join(_LENGTH.pack(len(frame)) + frame for frame in frames)

    @classmethod
    def from_bytes(cls, data: bytes, *, has_scalars: bool = False) -> "Model":
        """Raises InputError where these are not the bytes of a model, with scalars or without."""
        reader = _Frames(data, has_scalars)
        total, n_classes = reader.total, reader.n_classes
        gaps = np.ones(n_classes, np.int64)
        for plane in range(4):
            if (part := reader.next(n_classes)).max(initial=0):  # the highest bytes are mostly zeros
                gaps += np.left_shift(part, 8 * plane, dtype=np.int64) if plane else part
        octaves = reader.next(n_classes)
        groups = reader.next(n_classes) if has_scalars else None
        gaps[:1] -= 1
        ids = np.cumsum(gaps, out=gaps)
        if n_classes and ids[-1] > 2**32 - 1:
            raise InputError("a shard's model is damaged: a class id is beyond 32 bits")
        if groups is not None and groups.max(initial=0) >= reader.n_groups:
            raise InputError(f"a shard's model is damaged: a class of group {groups.max()} of {reader.n_groups}")
        model = cls(total, ids.astype(np.uint32), octaves, groups, reader.n_groups, reader.largest_codes)
        for table in model.tables:
            contexts, symbols = model.shape(table)
            model.codes[table] = reader.next(contexts * symbols).reshape(contexts, symbols)
            if model.codes[table].max(initial=0) > 127:
                raise InputError(f"a shard's model is damaged: a code above 127 in table {table}")
        reader.end()
        return model


def scalar_tables(number: int) -> tuple[Table, Table]:
    """The tables of a scalar: its nats, and the quarters of one."""
    at = "_at_temperature" if number >= 2 else ""
    nats, quarter = _OF_SCALARS[number % 2 * 2 : number % 2 * 2 + 2]
    return nats + at, quarter + at


def _by_rank(groups: np.ndarray, octaves: np.ndarray, n_groups: int) -> np.ndarray:
    """The order of classes given by ascending id: by group, in a group the higher octave first, then the lower id."""
    span = int(octaves.max(initial=0)) + 1
    narrow = np.dtype(np.uint8 if n_groups * span < 256 else np.uint16)  # of which a stable sort is a radix sort
    return np.argsort(groups.astype(narrow) * span + (span - 1 - octaves), kind="stable")


@lru_cache(maxsize=2)
def _context_of_rank(bits: int) -> np.ndarray:
    """A gap's context by the rank before, int64 [2^bits - 1]: the bit length of that rank plus 1. The first gap of a
    list has 0 there."""
    return np.repeat(CLASSES_LEFT * np.arange(1, bits + 1), 1 << np.arange(bits))


@lru_cache(maxsize=8)
def _bucket_of_excess(total: int) -> np.ndarray:
    return buckets(1, total).of(np.arange(total + 1))


class _Frames:
    """Reads the Zstandard frames of a stored model one after another; the size of each is known beforehand."""

    def __init__(self, data: bytes, has_scalars: bool) -> None:
        self._data, self._at = data, 0
        self.total, self.n_classes = self._unpacked(_HEADER)
        self.n_groups, n_scalars = self._unpacked(_MORE) if has_scalars else (1, 0)
        if (
            self.total > LARGEST_COUNT
            or self.n_classes > LARGEST_VALUE
            or not 1 <= self.n_groups <= MOST_GROUPS
            or n_scalars not in ((2, 4) if has_scalars else (0,))
        ):
            raise InputError(
                f"a shard's model is damaged: total {self.total}, {self.n_classes} classes in {self.n_groups} groups, "
                f"{n_scalars} scalars"
            )
        self.largest_codes = [self._unpacked(_LARGEST)[0] for _ in range(n_scalars)]
        self._decompressor = zstandard.ZstdDecompressor()

    def _unpacked(self, struct_: struct.Struct) -> tuple[Any, ...]:
        if len(self._data) < self._at + struct_.size:
            raise InputError(f"expected a shard's model of more than {self._at} bytes, got {len(self._data)}")
        self._at += struct_.size
        return struct_.unpack_from(self._data, self._at - struct_.size)

    def next(self, size: int) -> np.ndarray:
        """The next frame, decompressed: uint8 [size]."""
        start = self._at + _LENGTH.size
        if start > len(self._data):
            raise InputError("a shard's model is damaged: it ends early")
        (length,) = _LENGTH.unpack_from(self._data, self._at)
        frame = self._data[start : start + length]
        self._at = start + length
        try:
            # The size is checked before decompression, so that a damaged frame can't ask for any amount of memory.
            if len(frame) < length or zstandard.get_frame_parameters(frame).content_size != size:
                raise InputError(f"a shard's model is damaged: a frame is cut or does not hold {size} bytes")
            return np.frombuffer(self._decompressor.decompress(frame, allow_extra_data=False), np.uint8)
        except zstandard.ZstdError as error:
            raise InputError(f"a shard's model is damaged: {error}") from error

    def end(self) -> None:
        """Raises InputError unless all bytes were read."""
        if self._at != len(self._data):
            raise InputError(f"a shard's model is damaged: {len(self._data) - self._at} bytes follow its end")
