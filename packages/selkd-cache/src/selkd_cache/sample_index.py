"""``index.selkd``: the shard and row of each sample of a cache, sorted by id; memory-mapped, so opening is cheap."""

import struct
from collections.abc import Iterable
from pathlib import Path
from typing import Any, Final

import numpy as np

from selkd_cache.errors import InputError
from selkd_cache.files import file_digest, replacing

INDEX_FILE: Final = "index.selkd"
VERSION: Final = 1
_MAGIC = b"SELKDIDX"
_HEADER = struct.Struct("<8sI16s4xQ")
_BYTES_A_SAMPLE = 24


class SampleIndex:
    """Looks samples up by their ids. The index of N samples takes 24 N bytes on disk and next to none in memory.

    Raises:
        InputError: the file is missing, or is of another cache, version or size.
    """

    def __init__(self, path: Path, plan_checksum: str, n_samples: int) -> None:
        self.path = path
        try:
            size = path.stat().st_size
            with path.open("rb") as file:
                header = file.read(_HEADER.size)
        except OSError as error:
            raise InputError(f"{path.name} in {path.parent} can't be read: {error}") from error
        expected = _HEADER.pack(_MAGIC, VERSION, bytes.fromhex(plan_checksum), n_samples)
        if header != expected or size != _HEADER.size + _BYTES_A_SAMPLE * n_samples:
            raise InputError(
                f"{path.name} in {path.parent} is damaged or another cache's: expected {n_samples} samples of plan "
                f"{plan_checksum}. `selkd cache verify --repair` makes it anew"
            )
        self._size = size
        data = np.memmap(path, np.uint8, mode="r", offset=_HEADER.size) if n_samples else np.zeros(0, np.uint8)
        ends = np.cumsum([8 * n_samples, 8 * n_samples, 4 * n_samples])
        first, second, shards, rows = np.split(data, ends)
        self._first, self._second = first.view("<u8"), second.view("<u8")
        self._shards, self._rows = shards.view("<u4"), rows.view("<u4")

    def find(self, sample_id: bytes) -> tuple[int, int] | None:
        """A sample's shard number and its row there, or None. Raises InputError if the file was cut meanwhile."""
        self._require_size()
        first, second = (int.from_bytes(half, "big") for half in (sample_id[:8], sample_id[8:]))
        # Ids are digests, so two of them hardly ever share their first half.
        place = int(np.searchsorted(self._first, np.uint64(first)))
        while place < len(self._first) and int(self._first[place]) == first:
            if int(self._second[place]) == second:
                return int(self._shards[place]), int(self._rows[place])
            place += 1
        return None

    def ids(self) -> np.ndarray:
        """All ids, V16 [N], in the order of the shards and of their rows. Raises InputError as ``find`` does."""
        self._require_size()
        order = np.lexsort((self._rows, self._shards))
        halves = np.stack([self._first[order], self._second[order]], axis=1).astype(">u8")
        return np.ascontiguousarray(halves).view("V16").ravel()

    def is_sorted(self) -> bool:
        """Whether the ids ascend, as looking up needs. Raises InputError as ``find`` does."""
        self._require_size()
        first, second = self._first, self._second
        ascends = (first[:-1] < first[1:]) | ((first[:-1] == first[1:]) & (second[:-1] < second[1:]))
        return bool(ascends.all())

    def _require_size(self) -> None:
        """Raises InputError if the file was cut since it was opened: touching its memory map would crash (SIGBUS)."""
        try:
            size = self.path.stat().st_size
        except OSError as error:
            raise InputError(f"{self.path.name} in {self.path.parent} can't be read: {error}") from error
        if size < self._size:
            raise InputError(
                f"{self.path.name} in {self.path.parent} was cut to {size} of {self._size} bytes since it was opened. "
                "`selkd cache verify --repair` makes it anew"
            )


def write_sample_index(folder: Path, plan_checksum: str, shard_ids: Iterable[np.ndarray]) -> None:
    """Writes the index of shards with these ids, V16 arrays, unless the file already has the right content."""
    ids, shards, rows = [], [], []
    for number, sample_ids in enumerate(shard_ids):
        ids.append(np.ascontiguousarray(sample_ids).view(">u8").reshape(-1, 2).astype("<u8"))
        shards.append(np.full(len(sample_ids), number, "<u4"))
        rows.append(np.arange(len(sample_ids), dtype="<u4"))
    halves = np.concatenate(ids)
    order = np.lexsort((halves[:, 1], halves[:, 0]))
    columns = [halves[order, 0], halves[order, 1], np.concatenate(shards)[order], np.concatenate(rows)[order]]
    header = _HEADER.pack(_MAGIC, VERSION, bytes.fromhex(plan_checksum), len(order))
    data = header + b"".join(column.tobytes() for column in columns)
    path = folder / INDEX_FILE
    if not path.exists() or path.read_bytes() != data:
        with replacing(path) as file:
            file.write(data)


def describe_index(path: Path) -> dict[str, Any]:
    """The size and digest of the file, for the manifest. Raises InputError where it can't be read."""
    try:
        return {"bytes": path.stat().st_size, "digest": file_digest(path)}
    except OSError as error:
        raise InputError(f"{path.name} can't be read: {error}") from error
