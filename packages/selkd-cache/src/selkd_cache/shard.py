"""One shard file: header, model, one block a sample, index, footer. The package's README has the layout."""

import os
import struct
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import xxhash

from selkd_cache import codec
from selkd_cache.errors import InputError
from selkd_cache.fingerprint import Fingerprint, count_total, n_scalars, n_stored_classes
from selkd_cache.frequency_model import Model
from selkd_cache.rows import Rows

VERSION = 2
VERSION_WITH_SCALARS = 3
ID_BYTES = 16
_MAGIC = b"SELKDSHD"
_END_MAGIC = b"SELKDEND"
_HEADER = struct.Struct("<8sI16sII")
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
    """A shard file's header, model and index in memory; the blocks stay on disk.

    Attributes:
        name: the file's name.
        size_bytes: the file's size.
        digest: 32 hex digits over header, model and index. The index holds the blocks' checksums, so it covers them.
        model_bytes: the stored model that the blocks are coded with.
        index: one ``INDEX`` record a sample, in file order.
        has_scalars: whether its version is the one with scalars.
    """

    name: str
    size_bytes: int
    digest: str
    model_bytes: bytes
    index: np.ndarray
    has_scalars: bool = False

    @cached_property
    def model(self) -> Model:
        """Raises InputError where the stored bytes are no model."""
        try:
            return Model.from_bytes(self.model_bytes, has_scalars=self.has_scalars)
        except InputError as error:
            raise InputError(f"{self.name} is damaged: {error}") from error

    @property
    def entry(self) -> dict[str, str | int]:
        """The shard's entry in the manifest; ``positions`` counts those with at least one class."""
        return {
            "name": self.name,
            "bytes": self.size_bytes,
            "samples": len(self.index),
            "positions": int(self.index["positions"].sum(dtype=np.int64)),
            "classes": int(self.index["classes"].sum(dtype=np.int64)),
            "digest": self.digest,
            "ids_digest": ids_digest([self.index["sample_id"].tobytes()]),
        }

    def check(self, document: Mapping[str, Any], number: int) -> None:
        """Raises InputError unless the shard is the expected one, and holds what the fingerprint says.

        Args:
            document: the cache's manifest, or its plan, in which a shard has fewer fields.
            number: which shard it is.
        """
        entry, expected = self.entry, document["shards"][number]
        if entry["ids_digest"] != expected["ids_digest"]:
            raise InputError(f"{self.name} holds other samples than planned, or in another order")
        if differences := [
            f"{field} {value}, listed {expected[field]}"
            for field, value in entry.items()
            if expected.get(field, value) != value
        ]:
            raise InputError(f"{self.name} is not the shard that the manifest lists: {'; '.join(differences)}")
        self._check_content(document["fingerprint"])

    def _check_content(self, fingerprint: Fingerprint) -> None:
        scalars, total, n_classes = n_scalars(fingerprint), count_total(fingerprint), n_stored_classes(fingerprint)
        found = None
        if len(self.model.largest_codes) != scalars:
            found = f"{len(self.model.largest_codes)} scalars a position, expected {scalars}"
        elif self.model.total != total and self.index["classes"].any():
            found = f"rows whose counts sum to {self.model.total}, expected {total}"
        elif self.model.ids.max(initial=0) >= n_classes:
            found = f"class {self.model.ids.max()}, expected classes below {n_classes}"
        if found is not None:
            raise InputError(f"{self.name} has {found}: it is not of its cache's fingerprint")

    def read(self, path: Path, row: int) -> Rows:
        """The rows of the sample at ``row`` of the index.

        Raises:
            InputError: the block is not what was written; the message starts with the shard's name.
        """
        # The file is opened for each sample: touching a memory map of a file that was cut meanwhile would crash the
        # process (SIGBUS), and a handle kept open for each shard would exceed the limit on open files.
        with _reading(path) as file:
            return self.decode(row, self.block(file, row))

    def samples(self, path: Path, rows: Sequence[int]) -> Iterator[tuple[bytes, Rows]]:
        """The ids and the rows of some samples of the index, one after the other. Raises as ``read`` does."""
        with _reading(path) as file:
            for row in rows:
                yield self.index["sample_id"][row].tobytes(), self.decode(row, self.block(file, row))

    def block(self, file: BinaryIO, row: int) -> bytes:
        """The bytes of the sample at ``row``. Raises InputError where they do not match their checksum."""
        entry = self.index[row]
        sample_id = entry["sample_id"].tobytes()
        file.seek(int(entry["offset"]))
        block = file.read(int(entry["length"]))
        if _checksum(sample_id, block) != int(entry["checksum"]):
            raise InputError(
                f"{self.name} is damaged at sample {sample_id.hex()}: its {len(block)} bytes do not match their "
                "checksum"
            )
        return block

    def decode(self, row: int, block: bytes) -> Rows:
        """The rows of a block whose checksum is right. Raises InputError where they do not agree with the index."""
        entry = self.index[row]
        where = f"{self.name} is damaged at sample {entry['sample_id'].tobytes().hex()}"
        try:
            rows = codec.decode(self.model, block, int(entry["classes"]))
        except InputError as error:
            raise InputError(f"{where}: {error}") from error
        if np.count_nonzero(rows.row_lengths) != entry["positions"]:
            raise InputError(f"{where}: its rows do not agree with the index")
        return rows


def shard_name(number: int) -> str:
    return f"shard-{number:05d}.selkd"


def ids_digest(sample_ids: Iterable[bytes]) -> str:
    """32 hex digits that stand for the samples of a shard and their order: xxh3_128 of the ids one after another."""
    hasher = xxhash.xxh3_128()
    for sample_id in sample_ids:
        hasher.update(sample_id)
    return hasher.hexdigest()


def write_shard(file: BinaryIO, number: int, plan_checksum: str, samples: Iterable[tuple[bytes, Rows]]) -> None:
    """Writes a whole shard file. Its model is fitted to all of its samples, so their rows are held in memory."""
    samples = list(samples)
    model = codec.fit(rows for _, rows in samples)
    model_bytes = model.to_bytes()
    version = VERSION_WITH_SCALARS if model.largest_codes else VERSION
    header = _HEADER.pack(_MAGIC, version, bytes.fromhex(plan_checksum), number, len(model_bytes))
    file.write(header + model_bytes)
    offset = len(header) + len(model_bytes)
    entries = []
    for sample_id, rows in samples:
        block = codec.encode(model, rows)
        file.write(block)
        n_positions = np.count_nonzero(rows.row_lengths)
        entries.append((sample_id, _checksum(sample_id, block), offset, len(block), n_positions, len(rows.counts)))
        offset += len(block)
    index = np.array(entries, INDEX).tobytes()
    file.write(index)
    file.write(_FOOTER.pack(offset, len(entries), xxhash.xxh3_128_digest(header + model_bytes + index), _END_MAGIC))


def read_shard(folder: Path, number: int, plan_checksum: str) -> Shard:
    """Reads header, model, index and footer of shard ``number`` of the cache that has this plan.

    Raises:
        InputError: the file is missing, cut, damaged, another shard or another cache's; the message starts with its
            name.
    """
    name = shard_name(number)
    with _reading(folder / name) as file:
        return _read_shard(file, name, number, plan_checksum)


def shard_problem(
    folder: Path, number: int, plan_checksum: str, document: Mapping[str, Any], *, blocks: bool, decode: bool
) -> str | None:
    """What is wrong with a shard, or None.

    Args:
        document: as ``Shard.check`` takes it.
        blocks: read every byte and compare all checksums; else header, model, index and footer alone, and the size. A
            block is compared with its checksum in the index whenever it is read.
        decode: also decode every block.
    """
    try:
        shard = read_shard(folder, number, plan_checksum)
        with _reading(folder / shard.name) as file:
            for row in range(len(shard.index)) if blocks else ():
                block = shard.block(file, row)
                if decode:
                    shard.decode(row, block)
        shard.check(document, number)
    except InputError as error:
        return str(error)
    return None


def check_sample_ids(sample_ids: Sequence[bytes]) -> None:
    """Raises InputError unless every id is 16 raw bytes and no id comes twice."""
    seen = set()
    for sample_id in sample_ids:
        if not isinstance(sample_id, bytes) or len(sample_id) != ID_BYTES:
            raise InputError(f"a sample id must be {ID_BYTES} raw bytes; got {sample_id!r}")
        if sample_id in seen:
            raise InputError(f"sample {sample_id.hex()} is planned twice: pass each sample of the same content once")
        seen.add(sample_id)


@contextmanager
def _reading(path: Path) -> Iterator[BinaryIO]:
    """Opens a shard's file. Raises InputError where the operating system refuses to open it or to read it."""
    try:
        with path.open("rb") as file:
            yield file
    except OSError as error:
        raise InputError(f"{path.name} can't be read: {error}") from error


def _checksum(sample_id: bytes, block: bytes) -> int:
    """A checksum over the id too, so that no block passes for another sample's."""
    return xxhash.xxh3_64_intdigest(sample_id + block)


def _read_shard(file: BinaryIO, name: str, number: int, plan_checksum: str) -> Shard:
    size = os.fstat(file.fileno()).st_size
    if size < _HEADER.size + _FOOTER.size:
        raise InputError(f"{name} is truncated: {size} bytes, and a shard has at least {_HEADER.size + _FOOTER.size}")
    header = file.read(_HEADER.size)
    magic, version, stored_plan, stored_number, model_length = _HEADER.unpack(header)
    if magic != _MAGIC:
        raise InputError(f"{name} is damaged or not a selkd shard: it starts with {magic!r}, not {_MAGIC!r}")
    if version not in (VERSION, VERSION_WITH_SCALARS):
        raise InputError(f"{name} has shard version {version}; this selkd reads {VERSION} and {VERSION_WITH_SCALARS}")
    if stored_plan.hex() != plan_checksum:
        raise InputError(f"{name} belongs to another cache: plan {stored_plan.hex()}, expected {plan_checksum}")
    if stored_number != number:
        raise InputError(f"{name} holds shard {stored_number} under the name of shard {number}: swapped or copied")
    if _HEADER.size + model_length + _FOOTER.size > size:
        raise InputError(f"{name} is truncated or damaged: a model of {model_length} bytes in a file of {size}")
    model_bytes = file.read(model_length)
    file.seek(size - _FOOTER.size)
    index_offset, n_samples, digest, end_magic = _FOOTER.unpack(file.read(_FOOTER.size))
    if end_magic != _END_MAGIC or index_offset + n_samples * INDEX.itemsize + _FOOTER.size != size:
        raise InputError(f"{name} is truncated or damaged: its footer does not fit a file of {size} bytes")
    file.seek(index_offset)
    raw_index = file.read(n_samples * INDEX.itemsize)
    if xxhash.xxh3_128_digest(header + model_bytes + raw_index) != digest:
        raise InputError(f"{name} is damaged: header, model or index do not match their digest")
    index = np.frombuffer(raw_index, INDEX)
    begin = _HEADER.size + model_length
    starts = np.concatenate([[np.uint64(begin)], begin + np.cumsum(index["length"], dtype=np.uint64)])
    if not np.array_equal(starts, np.append(index["offset"], np.uint64(index_offset))):
        raise InputError(f"{name} is damaged: its blocks do not follow one another up to the index")
    return Shard(name, size, digest.hex(), model_bytes, index, version == VERSION_WITH_SCALARS)
