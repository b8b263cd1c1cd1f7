"""How the drawn classes of one sample become bytes and come back. Replace this module to change the coding.

The rest of the package uses ``NAME``, ``Rows``, ``encode`` and ``decode`` only. ``docs/cache-format.md`` has the bytes.
"""

import struct
from typing import Final, NamedTuple

import numpy as np
import zstandard

from selkd.errors import InputError

NAME: Final = "gap-planes-zstd"

# On real draws 15 costs 0.2% more bytes than 19 and half the time. The level is not part of the format.
_LEVEL = 15
_HEADER = struct.Struct("<IIBBB")
_LENGTH = struct.Struct("<I")
_LARGEST_UINT16 = 2**16 - 1
_LARGEST_UINT32 = 2**32 - 1
# The most bytes a value of each array can take: row lengths, gaps between class ids, counts.
_LARGEST_PLANES = (2, 4, 2)


class Rows(NamedTuple):
    """The drawn classes of one sample of n positions: ragged rows, flat. A position without a target has an empty row.

    Attributes:
        row_lengths: uint16 [n], the distinct classes of each position.
        class_ids: uint32 [sum(row_lengths)], strictly ascending within a row.
        counts: uint16 [sum(row_lengths)], how often each class was drawn, at least 1.
    """

    row_lengths: np.ndarray
    class_ids: np.ndarray
    counts: np.ndarray


def encode(row_lengths: np.ndarray, class_ids: np.ndarray, counts: np.ndarray) -> bytes:
    """The bytes of one sample; ``decode`` gives back exactly these integers.

    Args:
        row_lengths, class_ids, counts: as in ``Rows``, in any integer dtype.

    Raises:
        InputError: an array is not one-dimensional or not of integers, a value is out of range (nothing is ever cut to
            fit), lengths do not agree, or the class ids of a row do not ascend strictly.
    """
    lengths = _checked("row_lengths", row_lengths, 0, _LARGEST_UINT16)
    ids = _checked("class_ids", class_ids, 0, _LARGEST_UINT32)
    counts = _checked("counts", counts, 1, _LARGEST_UINT16)
    if not lengths.sum() == ids.size == counts.size:
        raise InputError(
            f"expected as many class_ids and counts as the sum of row_lengths, {lengths.sum()}; "
            f"got {ids.size} class_ids and {counts.size} counts"
        )
    if max(lengths.size, ids.size) > _LARGEST_UINT32:
        raise InputError(
            f"a sample holds at most {_LARGEST_UINT32} positions and classes; got {lengths.size}, {ids.size}"
        )
    starts = _row_starts(lengths)
    # Gaps are small where ids are close, so their high bytes are mostly zero. The first id of a row stands as it is.
    gaps = np.diff(ids, prepend=0) - 1
    gaps[starts] = ids[starts]
    if gaps.size and gaps.min() < 0:
        at = int(np.argmin(gaps))
        raise InputError(
            f"class_ids must ascend strictly within a row; got {ids[at]} after {ids[at - 1]} at index {at}: "
            "sort each row and merge equal ids into one count"
        )
    arrays = (lengths, gaps, counts)
    n_planes = [_n_planes(array) for array in arrays]
    frames = []
    compressor = zstandard.ZstdCompressor(level=_LEVEL)
    for array, n in zip(arrays, n_planes, strict=True):
        # One frame a plane: planes have different statistics, and one frame would share one Huffman table among them.
        for plane in array.astype("<u4").view(np.uint8).reshape(-1, 4).T[:n]:
            frame = compressor.compress(plane.tobytes())
            frames += [_LENGTH.pack(len(frame)), frame]
    return _HEADER.pack(lengths.size, ids.size, *n_planes) + b"".join(frames)


def decode(data: bytes) -> Rows:
    """The rows that ``encode`` was given.

    Raises:
        InputError: these are not the bytes of one encoded sample.
    """
    if len(data) < _HEADER.size:
        raise InputError(f"expected an encoded sample of at least {_HEADER.size} bytes, got {len(data)}")
    n_rows, n_classes, *n_planes = _HEADER.unpack_from(data)
    at = _HEADER.size
    decompressor = zstandard.ZstdDecompressor()
    arrays = []
    for size, n, largest in zip((n_rows, n_classes, n_classes), n_planes, _LARGEST_PLANES, strict=True):
        if n > largest or (n == 0) != (size == 0):
            raise InputError(f"an encoded sample is damaged: {n} byte planes for {size} values")
        planes = []
        for _ in range(n):
            contents, at = _read_frame(decompressor, data, at, size)
            planes.append(np.frombuffer(contents, np.uint8))
        values = np.zeros((size, 4), np.uint8)
        for place, plane in enumerate(planes):
            values[:, place] = plane
        arrays.append(values.view("<u4").ravel())
    lengths, gaps, counts = arrays
    if at != len(data):
        raise InputError(f"an encoded sample is damaged: {len(data) - at} bytes follow its end")
    if lengths.sum(dtype=np.uint64) != n_classes or not counts.all():
        raise InputError("an encoded sample is damaged: its row lengths, class ids and counts do not agree")
    return Rows(lengths.astype(np.uint16), _ids_of(gaps, lengths), counts.astype(np.uint16))


def _checked(name: str, values: np.ndarray, smallest: int, largest: int) -> np.ndarray:
    array = np.asarray(values)
    if array.ndim != 1 or array.dtype.kind not in "iu":
        raise InputError(f"{name} must be a one-dimensional array of integers; got {array.dtype} {list(array.shape)}")
    if array.size and not (smallest <= array.min() and array.max() <= largest):
        raise InputError(f"{name} must lie from {smallest} to {largest}; got {array.min()} to {array.max()}")
    return array.astype(np.int64)


def _row_starts(lengths: np.ndarray) -> np.ndarray:
    """Where each row that is not empty starts in the flat arrays."""
    return (np.cumsum(lengths) - lengths)[lengths > 0]


def _n_planes(array: np.ndarray) -> int:
    """How many bytes the largest value takes: none only where there is no value."""
    return max(1, (int(array.max()).bit_length() + 7) // 8) if array.size else 0


def _read_frame(decompressor: zstandard.ZstdDecompressor, data: bytes, at: int, size: int) -> tuple[bytes, int]:
    start = at + _LENGTH.size
    if start > len(data):
        raise InputError("an encoded sample is damaged: it ends early")
    (length,) = _LENGTH.unpack_from(data, at)
    frame = data[start : start + length]
    if len(frame) < length:
        raise InputError("an encoded sample is damaged: it ends early")
    try:
        # Checked before anything is decompressed, so that a damaged frame can't ask for any amount of memory.
        if zstandard.get_frame_parameters(frame).content_size != size:
            raise InputError("an encoded sample is damaged: a byte plane has the wrong size")
        return decompressor.decompress(frame, allow_extra_data=False), start + length
    except zstandard.ZstdError as error:
        raise InputError(f"an encoded sample is damaged: {error}") from error


def _ids_of(gaps: np.ndarray, lengths: np.ndarray) -> np.ndarray:
    # Sums wrap around in 64 bits, and differences of them stay exact: a row alone sums to less than 2^64.
    sums = np.cumsum(gaps.astype(np.uint64) + np.uint64(1))
    starts = _row_starts(lengths.astype(np.int64))
    before_row = sums[starts] - gaps[starts] - np.uint64(1)
    ids = sums - np.repeat(before_row, lengths[lengths > 0]) - np.uint64(1)
    if ids.size and ids.max() > _LARGEST_UINT32:
        raise InputError("an encoded sample is damaged: a class id is beyond 32 bits")
    return ids.astype(np.uint32)
