"""One shard file: a header, the blocks of its samples, an index, a footer. ``docs/cache-format.md`` has the layout."""

import os
import struct
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import numpy as np
import xxhash

from selkd.cache import codec
from selkd.cache.codec import Rows
from selkd.errors import InputError

VERSION = 1
ID_BYTES = 16
_MAGIC = b"SELKDSHD"
_END_MAGIC = b"SELKDEND"
_HEADER = struct.Struct("<8sI16sI")
_FOOTER = struct.Struct("<QQ16s8s")
INDEX = np.dtype(
    [
        ("sample_id", "V16"),
        ("checksum", "<u8"),
        ("offset", "<u8"),
        ("length", "<u4"),
        ("positions", "<u4"),
        ("classes", "<u4"),
    ]
)


@dataclass(frozen=True)
class Shard:
    """What the index of one shard file says; the blocks are still unread.

    Attributes:
        size_bytes: the file's size.
        digest: 32 hex digits over header and index, and through the index's checksums over the blocks.
        index: one ``INDEX`` record a sample, in file order.
    """

    size_bytes: int
    digest: str
    index: np.ndarray

    @property
    def positions(self) -> int:
        """Positions with at least one class."""
        return int(self.index["positions"].sum(dtype=np.int64))

    @property
    def classes(self) -> int:
        return int(self.index["classes"].sum(dtype=np.int64))

    @property
    def ids_digest(self) -> str:
        return ids_digest([self.index["sample_id"].tobytes()])


def shard_name(number: int) -> str:
    return f"shard-{number:05d}.selkd"


def ids_digest(sample_ids: Iterable[bytes]) -> str:
    """xxh3_128 of the sample ids one after the other, as 32 hex digits: which samples a shard holds, in which order."""
    hasher = xxhash.xxh3_128()
    for sample_id in sample_ids:
        hasher.update(sample_id)
    return hasher.hexdigest()


def write_shard(file: BinaryIO, number: int, plan_checksum: str, samples: Iterable[tuple[bytes, Rows]]) -> None:
    """Writes a whole shard file, a sample at a time: memory does not grow with the shard but for its index."""
    header = _HEADER.pack(_MAGIC, VERSION, bytes.fromhex(plan_checksum), number)
    file.write(header)
    offset = len(header)
    entries = []
    for sample_id, rows in samples:
        block = codec.encode(*rows)
        file.write(block)
        n_positions = np.count_nonzero(rows.row_lengths)
        entries.append((sample_id, xxhash.xxh3_64_intdigest(block), offset, len(block), n_positions, len(rows.counts)))
        offset += len(block)
    index = np.array(entries, INDEX).tobytes()
    file.write(index)
    file.write(_FOOTER.pack(offset, len(entries), xxhash.xxh3_128_digest(header + index), _END_MAGIC))


def read_shard(path: Path, number: int, plan_checksum: str) -> Shard:
    """Reads header, index and footer, and checks that this is shard ``number`` of the cache with this plan.

    Raises:
        InputError: the file is missing, cut, damaged, another shard or another cache's; the message starts with its
            name.
    """
    try:
        with path.open("rb") as file:
            return _read_shard(file, path.name, number, plan_checksum)
    except OSError as error:
        raise InputError(f"{path.name} can't be read: {error}") from error


def _read_shard(file: BinaryIO, name: str, number: int, plan_checksum: str) -> Shard:
    size = os.fstat(file.fileno()).st_size
    if size < _HEADER.size + _FOOTER.size:
        raise InputError(f"{name} is truncated: {size} bytes, and a shard has at least {_HEADER.size + _FOOTER.size}")
    header = file.read(_HEADER.size)
    magic, version, stored_plan, stored_number = _HEADER.unpack(header)
    if magic != _MAGIC:
        raise InputError(f"{name} is damaged or not a selkd shard: it starts with {magic!r}, not {_MAGIC!r}")
    if version != VERSION:
        raise InputError(f"{name} has shard version {version}; this selkd reads version {VERSION}")
    if stored_plan.hex() != plan_checksum:
        raise InputError(f"{name} belongs to another cache: plan {stored_plan.hex()}, expected {plan_checksum}")
    if stored_number != number:
        raise InputError(f"{name} holds shard {stored_number} under the name of shard {number}: swapped or copied")
    file.seek(size - _FOOTER.size)
    index_offset, n_samples, digest, end_magic = _FOOTER.unpack(file.read(_FOOTER.size))
    if end_magic != _END_MAGIC or index_offset + n_samples * INDEX.itemsize + _FOOTER.size != size:
        raise InputError(f"{name} is truncated or damaged: its footer does not fit a file of {size} bytes")
    file.seek(index_offset)
    raw_index = file.read(n_samples * INDEX.itemsize)
    if xxhash.xxh3_128_digest(header + raw_index) != digest:
        raise InputError(f"{name} is damaged: its index does not match its digest")
    index = np.frombuffer(raw_index, INDEX)
    ends = _HEADER.size + np.cumsum(index["length"], dtype=np.uint64)
    starts = np.concatenate([[np.uint64(_HEADER.size)], ends])
    if not np.array_equal(starts, np.append(index["offset"], np.uint64(index_offset))):
        raise InputError(f"{name} is damaged: its blocks do not follow one another up to the index")
    return Shard(size_bytes=size, digest=digest.hex(), index=index)


def read_block(file: BinaryIO, name: str, entry: np.void) -> Rows:
    """The rows of one sample, by its record of the index.

    Raises:
        InputError: the block is not what was written; the message starts with the shard's name.
    """
    sample_id = entry["sample_id"].tobytes().hex()
    try:
        file.seek(int(entry["offset"]))
        block = file.read(int(entry["length"]))
    except OSError as error:
        raise InputError(f"{name} can't be read at sample {sample_id}: {error}") from error
    if xxhash.xxh3_64_intdigest(block) != int(entry["checksum"]):
        raise InputError(f"{name} is damaged at sample {sample_id}: its {len(block)} bytes do not match their checksum")
    try:
        rows = codec.decode(block)
    except InputError as error:
        raise InputError(f"{name} is damaged at sample {sample_id}: {error}") from error
    if np.count_nonzero(rows.row_lengths) != entry["positions"] or len(rows.counts) != entry["classes"]:
        raise InputError(f"{name} is damaged at sample {sample_id}: its rows do not agree with the index")
    return rows


def check_shard(path: Path, number: int, plan_checksum: str, expected_ids_digest: str) -> Shard:
    """Reads every byte of a shard and decodes every sample.

    Raises:
        InputError: as ``read_shard`` and ``read_block``, or the shard holds other samples than planned.
    """
    shard = read_shard(path, number, plan_checksum)
    if shard.ids_digest != expected_ids_digest:
        raise InputError(f"{path.name} holds other samples than planned, or in another order")
    try:
        with path.open("rb") as file:
            for entry in shard.index:
                read_block(file, path.name, entry)
    except OSError as error:
        raise InputError(f"{path.name} can't be read: {error}") from error
    return shard


def check_sample_ids(sample_ids: Sequence[bytes]) -> None:
    """Raises InputError unless each is 16 raw bytes and none comes twice."""
    seen = set()
    for sample_id in sample_ids:
        if not isinstance(sample_id, bytes) or len(sample_id) != ID_BYTES:
            raise InputError(f"a sample id must be {ID_BYTES} raw bytes; got {sample_id!r}")
        if sample_id in seen:
            raise InputError(f"sample {sample_id.hex()} is planned twice: pass each sample of the same content once")
        seen.add(sample_id)
