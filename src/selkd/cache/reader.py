"""Reading a cache: open it, look samples up by content, verify every byte."""

from collections.abc import Mapping
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from selkd.cache.codec import Rows
from selkd.cache.manifest import (
    MANIFEST,
    PLAN,
    Fingerprint,
    check_fingerprint,
    check_same_fingerprint,
    describe_shard,
    read_manifest,
    read_plan,
)
from selkd.cache.shard import ID_BYTES, Shard, check_shard, read_block, read_shard, shard_name
from selkd.errors import InputError


class _Table(NamedTuple):
    """The indices of all shards. Ids are digests, so their first halves alone, sorted, lead to a sample."""

    first_halves: np.ndarray  # uint64 [N], ascending
    rows: np.ndarray  # int64 [N], the row below of each first half
    entries: np.ndarray  # shard.INDEX [N], in the order of the shards
    shards: np.ndarray  # uint32 [N], the shard of each entry


class TeacherCache:
    """A complete teacher cache: the drawn classes at every position of every kept sample, found by its content.

    Holds no open file and no lock: it may be shared by threads, forked, or sent to worker processes.
    """

    def __init__(self, directory: Path, manifest: dict[str, Any]) -> None:
        self.directory = directory
        self._manifest = manifest

    @classmethod
    def open(cls, directory: str | Path, expected: Fingerprint | None = None) -> "TeacherCache":
        """Opens a complete cache. Shards are read when they are needed; ``verify`` reads them all.

        Args:
            directory: the cache's folder.
            expected: the whole fingerprint that the caller computes, or None to take any.

        Raises:
            InputError: no cache there, an incomplete one, an unknown version, a changed manifest, or any field of the
                fingerprint that differs or is on one side only (named, with the stored and the expected value).
        """
        directory = Path(directory)
        manifest = _read_manifest(directory)
        missing = [entry["name"] for entry in manifest["shards"] if not (directory / entry["name"]).is_file()]
        if missing:
            raise InputError(
                f"the teacher cache in {directory} is incomplete: {len(missing)} of {len(manifest['shards'])} shards "
                f"are missing, the first {missing[0]}: build it again to the end"
            )
        if expected is not None:
            check_fingerprint(expected)
            check_same_fingerprint(manifest["fingerprint"], expected, directory)
        return cls(directory, manifest)

    @property
    def fingerprint(self) -> dict[str, str | int | float]:
        return dict(self._manifest["fingerprint"])

    def __len__(self) -> int:
        """The number of samples."""
        return int(self._manifest["n_samples"])

    def __contains__(self, sample_id: object) -> bool:
        return isinstance(sample_id, bytes) and len(sample_id) == ID_BYTES and self._find(sample_id) is not None

    def sample_ids(self) -> list[bytes]:
        """The ids (16 raw bytes) of all samples, in the order of the shards."""
        ids = self._table.entries["sample_id"].tobytes()
        return [ids[at : at + ID_BYTES] for at in range(0, len(ids), ID_BYTES)]

    def get(self, sample_id: bytes) -> Rows:
        """The rows of one sample: row_lengths uint16 [n], class_ids uint32 [sum], counts uint16 [sum]; see ``Rows``.

        Raises:
            InputError: the sample is not in the cache, or what is stored is not what was written. The first look-up
                reads and checks the index of every shard, so a damaged index anywhere is refused then.
        """
        if not isinstance(sample_id, bytes) or len(sample_id) != ID_BYTES:
            raise InputError(f"a sample id must be {ID_BYTES} raw bytes; got {sample_id!r}")
        row = self._find(sample_id)
        if row is None:
            raise InputError(
                f"sample {sample_id.hex()} is not in the teacher cache in {self.directory} ({len(self)} samples): "
                "build the cache for this data"
            )
        # Opened for each look-up: a memory map would turn a file that was cut meanwhile into a crash (SIGBUS), and one
        # open handle a shard would meet the limit on open files.
        path = self.directory / shard_name(int(self._table.shards[row]))
        try:
            with path.open("rb") as file:
                return read_block(file, path.name, self._table.entries[row])
        except OSError as error:
            raise InputError(f"{path.name} in {self.directory} can't be read: {error}") from error

    def verify(self) -> list[str]:
        """Reads every byte of the folder as it is now; the problems found, each naming its file. Empty: all is well."""
        return verify_cache(self.directory)

    def stats(self) -> dict[str, int | float]:
        """The cache's size (all files of it) against what plainer layouts would take.

        A position counts if it has a class. ``fixed_width`` is 3 bytes a draw, ``full_logits`` 2 bytes a class (bf16).
        """
        shards = self._manifest["shards"]
        positions = sum(entry["positions"] for entry in shards)
        classes = sum(entry["classes"] for entry in shards)
        names = [MANIFEST, PLAN, *(entry["name"] for entry in shards)]
        try:
            size_bytes = sum((self.directory / name).stat().st_size for name in names)
        except OSError as error:
            raise InputError(f"the teacher cache in {self.directory} has lost a file: {error}") from error
        return {
            "bytes": size_bytes,
            "samples": len(self),
            "shards": len(shards),
            "positions": positions,
            "bytes_per_position": size_bytes / max(positions, 1),
            "classes_per_position": classes / max(positions, 1),
            "fixed_width_bytes_per_position": 3 * int(self._manifest["fingerprint"]["draws"]),
            "full_logits_bytes_per_position": 2 * int(self._manifest["fingerprint"]["vocabulary"]),
        }

    @cached_property
    def _table(self) -> _Table:
        shards = []
        for number, entry in enumerate(self._manifest["shards"]):
            shard = read_shard(self.directory / entry["name"], number, self._manifest["plan"])
            _check_against_manifest(number, shard, entry)
            shards.append(shard)
        entries = np.concatenate([shard.index for shard in shards])
        numbers = np.repeat(np.arange(len(shards), dtype=np.uint32), [len(shard.index) for shard in shards])
        halves = np.frombuffer(entries["sample_id"].tobytes(), ">u8")[::2].astype(np.uint64)
        rows = np.argsort(halves, kind="stable")
        return _Table(halves[rows], rows, entries, numbers)

    def _find(self, sample_id: bytes) -> int | None:
        """The sample's row in the table's entries."""
        half = np.uint64(int.from_bytes(sample_id[:8], "big"))
        table = self._table
        # Ids that share their first half stand together; as a rule there is one.
        at = int(np.searchsorted(table.first_halves, half))
        while at < len(table.first_halves) and table.first_halves[at] == half:
            row = int(table.rows[at])
            if table.entries[row]["sample_id"].tobytes() == sample_id:
                return row
            at += 1
        return None


def verify_cache(directory: str | Path) -> list[str]:
    """Every problem of a cache's folder, each naming its file; works where ``TeacherCache.open`` refuses."""
    directory = Path(directory)
    try:
        manifest = _read_manifest(directory)
    except InputError as error:
        return [str(error)]
    problems = []
    try:
        if read_plan(directory / PLAN)[1] != manifest["plan"]:
            problems.append(f"{PLAN} in {directory} is another cache's")
    except InputError as error:
        problems.append(str(error))
    for number, entry in enumerate(manifest["shards"]):
        try:
            shard = check_shard(directory / entry["name"], number, manifest["plan"], entry["ids_digest"])
            _check_against_manifest(number, shard, entry)
        except InputError as error:
            problems.append(str(error))
    known = {entry["name"] for entry in manifest["shards"]}
    for path in sorted(directory.iterdir()):
        if path.suffix == ".selkd" and path.name not in known:
            problems.append(f"{path.name} is no shard of this cache: it has {len(known)} shards")
    return problems


def _read_manifest(directory: Path) -> dict[str, Any]:
    if not directory.is_dir():
        raise InputError(f"there is no teacher cache at {directory}: build it first, or set cache.path to one")
    if not (directory / MANIFEST).exists():
        if not (directory / PLAN).exists():
            raise InputError(f"{directory} is not a teacher cache: it has neither {MANIFEST} nor {PLAN}")
        plan, _ = read_plan(directory / PLAN)
        n_there = sum((directory / shard_name(number)).exists() for number in range(len(plan["shards"])))
        raise InputError(
            f"the teacher cache in {directory} is incomplete: {n_there} of {len(plan['shards'])} shards are there and "
            "it was not finished: build it again to the end"
        )
    return read_manifest(directory / MANIFEST)


def _check_against_manifest(number: int, shard: Shard, entry: Mapping[str, Any]) -> None:
    there = describe_shard(number, shard)
    if differences := [f"{key} {there[key]}, listed {entry[key]}" for key in there if there[key] != entry[key]]:
        raise InputError(f"{entry['name']} is not the shard that the manifest lists: {'; '.join(differences)}")
