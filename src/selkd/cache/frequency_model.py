"""What a shard's samples have in common: which classes are drawn how often, and how the coded symbols are distributed.

Made from the shard's own draws, stored at its head. ``docs/cache-format.md`` has the bytes.
"""

import struct
from collections.abc import Callable, Iterable
from functools import cached_property
from typing import Final, Literal

import numpy as np
import zstandard

from selkd.cache.integers import LARGEST_VALUE, Buckets, bit_length, frequencies, to_codes
from selkd.cache.rows import LARGEST_COUNT, Rows
from selkd.errors import InputError

CLASSES_LEFT: Final = 16  # contexts tell 1 to 15 classes left apart, and more
Table = Literal["singles", "heavies", "gaps", "counts"]
TABLES: Final[tuple[Table, ...]] = ("singles", "heavies", "gaps", "counts")

_LEVEL = 19
_HEADER = struct.Struct("<II")
_LENGTH = struct.Struct("<I")


class Model:
    """The shared part of a shard, which its samples are coded with.

    Args:
        total: what the counts of each row that is not empty sum to.
        classes: uint32 [D], the ids of the D drawn classes by rank: those drawn more often first.
        octaves: uint8 [D], the bits of how often each was drawn, descending; ids ascend where they are equal.
        codes: for each of ``TABLES`` uint8 [contexts, symbols]: how often each symbol came, as ``integers.to_codes``.
    """

    def __init__(self, total: int, classes: np.ndarray, octaves: np.ndarray, codes: dict[Table, np.ndarray]) -> None:
        self.total = total
        self.classes = classes
        self.octaves = octaves
        self.codes = codes
        largest_rank = max(len(classes) - 1, 0)
        # Singles and heavies: how many classes of a row were drawn once, and more often.
        self.buckets: dict[Table, Buckets] = {
            "singles": Buckets(3, total),
            "heavies": Buckets(3, total // 2),
            "gaps": Buckets(1, largest_rank),
            "counts": Buckets(1, total),
        }
        self.n_octaves = len(classes).bit_length() + 1
        # Contexts are told apart by the octave of the rank before, the bits of rank + 1; 0 stands before the first.
        self.context_of_rank = CLASSES_LEFT * bit_length(np.arange(1, len(classes) + 1))
        self._bucket_of_excess = self.buckets["counts"].of(np.arange(total + 1))

    def shape(self, table: Table) -> tuple[int, int]:
        """Contexts and symbols of a table."""
        contexts = {
            "singles": 1,
            "heavies": self.buckets["singles"].n,
            "gaps": 2 * self.n_octaves * CLASSES_LEFT,
            "counts": self.buckets["counts"].n * CLASSES_LEFT,
        }
        return contexts[table], max(2, self.buckets[table].n)

    def gap_context(self, is_single: np.ndarray, of_rank: np.ndarray | np.int64, left: np.ndarray) -> np.ndarray:
        """Of a gap: its group, ``context_of_rank`` of the rank before, the classes left in its list, this one too."""
        group = is_single * (self.n_octaves * CLASSES_LEFT) - 1
        return group + of_rank + np.minimum(left, CLASSES_LEFT)

    def count_context(self, excess: np.ndarray, left: np.ndarray) -> np.ndarray:
        """Of a count: the draws left beyond two for each heavy class left, and how many heavy classes are left."""
        return self._bucket_of_excess[excess] * CLASSES_LEFT + np.minimum(left, CLASSES_LEFT) - 1

    @cached_property
    def weights(self) -> dict[Table, np.ndarray]:
        """float32 [contexts, symbols], each frequency less one: what constriction takes, exactly."""
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


def fit(samples: Iterable[Rows], symbols_of: Callable[[Model, Rows], dict[Table, np.ndarray]]) -> Model:
    """The model of these samples.

    Args:
        samples: checked rows, gone through twice.
        symbols_of: for a model without tables and a sample, the cell (context * symbols + symbol) of each coded symbol.
    """
    samples = list(samples)
    ids, n_drawn = np.unique(np.concatenate([rows.class_ids for rows in samples]), return_counts=True)
    if len(ids) > LARGEST_VALUE:
        raise InputError(f"a shard holds at most {LARGEST_VALUE} distinct classes; got {len(ids)}")
    octaves = bit_length(n_drawn).astype(np.uint8)
    order = np.argsort(-octaves.astype(np.int16), kind="stable")
    sums = [rows.counts[: rows.row_lengths[rows.row_lengths > 0][0]] for rows in samples if len(rows.counts)]
    total = int(sums[0].sum(dtype=np.int64)) if sums else 0
    if total > LARGEST_COUNT:
        raise InputError(f"the counts of a row sum to at most {LARGEST_COUNT}; got {total}")
    model = Model(total, ids[order].astype(np.uint32), octaves[order], {})
    numbers = {table: np.zeros(np.prod(model.shape(table)), np.int64) for table in TABLES}
    for rows in samples:
        for table, cells in symbols_of(model, rows).items():
            numbers[table] += np.bincount(cells, minlength=len(numbers[table]))
    model.codes = {table: to_codes(numbers[table]).reshape(model.shape(table)) for table in TABLES}
    return model


class _Frames:
    """The Zstandard frames of a model one after the other, each of a size known beforehand."""

    def __init__(self, data: bytes) -> None:
        if len(data) < _HEADER.size:
            raise InputError(f"expected a shard's model of at least {_HEADER.size} bytes, got {len(data)}")
        self.total, self.n_classes = _HEADER.unpack_from(data)
        if self.total > LARGEST_COUNT or self.n_classes > LARGEST_VALUE:
            raise InputError(f"a shard's model is damaged: total {self.total}, {self.n_classes} classes")
        self._data, self._at = data, _HEADER.size
        self._decompressor = zstandard.ZstdDecompressor()

    def next(self, size: int) -> np.ndarray:
        """uint8 [size]."""
        start = self._at + _LENGTH.size
        if start > len(self._data):
            raise InputError("a shard's model is damaged: it ends early")
        (length,) = _LENGTH.unpack_from(self._data, self._at)
        frame = self._data[start : start + length]
        self._at = start + length
        try:
            # Checked before anything is decompressed, so that a damaged frame can't ask for any amount of memory.
            if len(frame) < length or zstandard.get_frame_parameters(frame).content_size != size:
                raise InputError(f"a shard's model is damaged: a frame is cut or does not hold {size} bytes")
            return np.frombuffer(self._decompressor.decompress(frame, allow_extra_data=False), np.uint8)
        except zstandard.ZstdError as error:
            raise InputError(f"a shard's model is damaged: {error}") from error

    def end(self) -> None:
        if self._at != len(self._data):
            raise InputError(f"a shard's model is damaged: {len(self._data) - self._at} bytes follow its end")
