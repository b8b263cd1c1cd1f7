"""The model of a shard: which classes its samples have, how often, and how the coded symbols are distributed.

``codec.fit`` makes it from the shard's own draws; the shard stores it. The package's README defines the bytes.
"""

import struct
from collections.abc import Sequence
from functools import cached_property
from typing import Final, Literal

import numpy as np
import zstandard

from selkd_cache.errors import InputError
from selkd_cache.integers import LARGEST_VALUE, Buckets, bit_length, frequencies
from selkd_cache.rows import LARGEST_COUNT, Rows

CLASSES_LEFT: Final = 16  # contexts tell apart 1, 2, … 15 classes left, and 16 or more
Table = Literal["singles", "heavies", "gaps", "counts"]
TABLES: Final[tuple[Table, ...]] = ("singles", "heavies", "gaps", "counts")

_LEVEL = 19
_HEADER = struct.Struct("<II")
_LENGTH = struct.Struct("<I")


class Model:
    """The part of a shard that all of its samples are coded with.

    Args:
        total: the sum of the counts of each row that is not empty.
        classes: uint32 [D], the ids of the D drawn classes by rank: those drawn more often first.
        octaves: uint8 [D], the bit length of how often each class was drawn, descending; equal ones by ascending id.
        codes: for each of ``TABLES``, uint8 [contexts, symbols]: how often each symbol was coded, as
            ``integers.to_codes`` rounds it.
    """

    def __init__(self, total: int, classes: np.ndarray, octaves: np.ndarray, codes: dict[Table, np.ndarray]) -> None:
        self.total = total
        self.classes = classes
        self.octaves = octaves
        self.codes = codes
        largest_rank = max(len(classes) - 1, 0)
        # Singles and heavies count the classes of a row that were drawn once, and more often.
        self.buckets: dict[Table, Buckets] = {
            "singles": Buckets(3, total),
            "heavies": Buckets(3, total // 2),
            "gaps": Buckets(1, largest_rank),
            "counts": Buckets(1, total),
        }
        self.n_octaves = len(classes).bit_length() + 1
        # A gap's context depends on the bit length of the rank before, plus 1; the first gap of a list has 0 there.
        self.context_of_rank = CLASSES_LEFT * bit_length(np.arange(1, len(classes) + 1))
        self._bucket_of_excess = self.buckets["counts"].of(np.arange(total + 1))

    @classmethod
    def of_classes(cls, samples: Sequence[Rows]) -> "Model":
        """The model of these checked samples, still without tables."""
        ids, n_drawn = np.unique(np.concatenate([rows.class_ids for rows in samples]), return_counts=True)
        if len(ids) > LARGEST_VALUE:
            raise InputError(f"a shard holds at most {LARGEST_VALUE} distinct classes; got {len(ids)}")
        octaves = bit_length(n_drawn).astype(np.uint8)
        order = np.argsort(-octaves.astype(np.int16), kind="stable")
        sums = [rows.counts[: rows.row_lengths[rows.row_lengths > 0][0]] for rows in samples if len(rows.counts)]
        total = int(sums[0].sum(dtype=np.int64)) if sums else 0
        if total > LARGEST_COUNT:
            raise InputError(f"the counts of a row sum to at most {LARGEST_COUNT}; got {total}")
        return cls(total, ids[order].astype(np.uint32), octaves[order], {})

    def shape(self, table: Table) -> tuple[int, int]:
        """The number of contexts and of symbols of a table."""
        contexts = {
            "singles": 1,
            "heavies": self.buckets["singles"].n,
            "gaps": 2 * self.n_octaves * CLASSES_LEFT,
            "counts": self.buckets["counts"].n * CLASSES_LEFT,
        }
        return contexts[table], max(2, self.buckets[table].n)

    def gap_context(self, is_single: np.ndarray, rank_context: np.ndarray | np.int64, left: np.ndarray) -> np.ndarray:
        """The context of each gap.

        Args:
            is_single: 1 in lists of singles, 0 in lists of heavies.
            rank_context: ``context_of_rank`` of the rank before.
            left: how many classes of its list are still to come, this one included.
        """
        group = is_single * (self.n_octaves * CLASSES_LEFT) - 1
        return group + rank_context + np.minimum(left, CLASSES_LEFT)

    def count_context(self, excess: np.ndarray, left: np.ndarray) -> np.ndarray:
        """The context of each count.

        Args:
            excess: the draws of the row still to be told out, beyond two for each heavy class.
            left: how many heavy classes of the row are still to come, this one included.
        """
        return self._bucket_of_excess[excess] * CLASSES_LEFT + np.minimum(left, CLASSES_LEFT) - 1

    @cached_property
    def weights(self) -> dict[Table, np.ndarray]:
        """Each frequency less one, float32 [contexts, symbols]: numbers that constriction brings back exactly."""
        return {table: (frequencies(self.codes[table]) - 1).astype(np.float32) for table in TABLES}

    @cached_property
    def rank_of_class(self) -> tuple[np.ndarray, np.ndarray]:
        """Class ids ascending, uint32 [D], and the rank of each, int64 [D]."""
        order = np.argsort(self.classes, kind="stable")
        return self.classes[order], order

    def ranks(self, class_ids: np.ndarray) -> np.ndarray:
        """int64, the rank of each class; all of them must be classes of the model."""
        ids, ranks = self.rank_of_class
        return ranks[np.searchsorted(ids, class_ids)]

    def to_bytes(self) -> bytes:
        ids, ranks = self.rank_of_class
        gaps = np.diff(ids.astype(np.int64), prepend=-1) - 1
        arrays = [*gaps.astype("<u4").view(np.uint8).reshape(-1, 4).T, self.octaves[ranks]]
        arrays += [self.codes[table] for table in TABLES]
        compressor = zstandard.ZstdCompressor(level=_LEVEL)
        frames = [compressor.compress(np.ascontiguousarray(array).tobytes()) for array in arrays]
        return _HEADER.pack(self.total, len(ids)) + b"".join(_LENGTH.pack(len(frame)) + frame for frame in frames)

    @classmethod
    def from_bytes(cls, data: bytes) -> "Model":
        """Raises InputError where these are not the bytes of a model."""
        reader = _Frames(data)
        total, n_classes = reader.total, reader.n_classes
        planes = np.stack([reader.next(n_classes) for _ in range(4)], axis=1)
        gaps = np.ascontiguousarray(planes).view("<u4").ravel().astype(np.int64)
        octaves = reader.next(n_classes)
        ids = np.cumsum(gaps + 1) - 1
        if n_classes and ids[-1] > 2**32 - 1:
            raise InputError("a shard's model is damaged: a class id is beyond 32 bits")
        order = np.argsort(-octaves.astype(np.int16), kind="stable")
        model = cls(total, ids[order].astype(np.uint32), octaves[order], {})
        for table in TABLES:
            contexts, symbols = model.shape(table)
            model.codes[table] = reader.next(contexts * symbols).reshape(contexts, symbols)
            if model.codes[table].max() > 127:
                raise InputError(f"a shard's model is damaged: a code above 127 in table {table}")
        reader.end()
        return model


class _Frames:
    """Reads the Zstandard frames of a stored model one after another; the size of each is known beforehand."""

    def __init__(self, data: bytes) -> None:
        if len(data) < _HEADER.size:
            raise InputError(f"expected a shard's model of at least {_HEADER.size} bytes, got {len(data)}")
        self.total, self.n_classes = _HEADER.unpack_from(data)
        if self.total > LARGEST_COUNT or self.n_classes > LARGEST_VALUE:
            raise InputError(f"a shard's model is damaged: total {self.total}, {self.n_classes} classes")
        self._data, self._at = data, _HEADER.size
        self._decompressor = zstandard.ZstdDecompressor()

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
