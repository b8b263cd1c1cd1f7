"""Reading a cache: open it, look samples up by content."""

from collections.abc import Callable
from functools import cached_property, lru_cache
from pathlib import Path
from typing import Any

from selkd.cache.manifest import (
    MANIFEST,
    PLAN,
    Fingerprint,
    check_fingerprint,
    check_same_fingerprint,
    check_same_shard,
    read_complete,
)
from selkd.cache.rows import Rows
from selkd.cache.sample_index import INDEX_FILE, SampleIndex, describe_index
from selkd.cache.shard import ID_BYTES, Shard, read_shard, shard_name
from selkd.cache.verify import verify_cache
from selkd.errors import InputError

# Of each, model and index stay in memory: some 0.4 MB, so that memory does not grow with the cache. At 2^17 tokens a
# shard, 32 million tokens are read without reading a model twice.
SHARDS_IN_MEMORY = 256


class TeacherCache:
    """A complete teacher cache: the drawn classes at every position of every kept sample, found by its content.

    Holds no open file and no lock: it may be shared by threads, forked, or sent to worker processes. Memory does not
    grow with the number of samples.
    """

    def __init__(self, directory: Path, manifest: dict[str, Any]) -> None:
        self.directory = directory
        self._manifest = manifest
        self._index = SampleIndex(directory / INDEX_FILE, manifest["plan"], manifest["n_samples"])
        self._is_index_whole = False  # until every byte of it was read

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
        manifest = read_complete(directory)
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

    def __reduce__(self) -> tuple[Any, ...]:
        return TeacherCache, (self.directory, self._manifest)

    @property
    def fingerprint(self) -> dict[str, str | int | float]:
        return dict(self._manifest["fingerprint"])

    def __len__(self) -> int:
        """The number of samples."""
        return int(self._manifest["n_samples"])

    def __contains__(self, sample_id: object) -> bool:
        """Raises InputError where the index is damaged, rather than deny a sample that is there."""
        if not isinstance(sample_id, bytes) or len(sample_id) != ID_BYTES:
            return False
        if self._index.find(sample_id) is not None:
            return True
        self._require_whole_index()  # before a sample is called missing
        return False

    def sample_ids(self) -> list[bytes]:
        """The ids (16 raw bytes) of all samples, in the order of the shards."""
        self._require_whole_index()
        ids = self._index.ids().tobytes()
        return [ids[at : at + ID_BYTES] for at in range(0, len(ids), ID_BYTES)]

    def get(self, sample_id: bytes) -> Rows:
        """The rows of one sample: row_lengths uint16 [n], class_ids uint32 [sum], counts uint16 [sum]; see ``Rows``.

        Raises:
            InputError: the sample is not in the cache, or what is stored is not what was written.
        """
        if not isinstance(sample_id, bytes) or len(sample_id) != ID_BYTES:
            raise InputError(f"a sample id must be {ID_BYTES} raw bytes; got {sample_id!r}")
        place = self._index.find(sample_id)
        if place is None:
            self._require_whole_index()
            raise InputError(
                f"sample {sample_id.hex()} is not in the teacher cache in {self.directory} ({len(self)} samples): "
                "build the cache for this data"
            )
        number, row = place
        if number < len(self._manifest["shards"]):
            try:
                shard = self._shard(number)
                if row < len(shard.index) and shard.index["sample_id"][row].tobytes() == sample_id:
                    return shard.read(self.directory / shard.name, row)
            except InputError as error:
                raise InputError(
                    f"{error} (in {self.directory}). `selkd cache verify --repair`, with the recipe that built it, "
                    "mends it"
                ) from error
        self._require_whole_index()
        raise InputError(f"{INDEX_FILE} in {self.directory} leads to another sample than {sample_id.hex()}")

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
        names = [MANIFEST, PLAN, INDEX_FILE, *(entry["name"] for entry in shards)]
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

    def _require_whole_index(self) -> None:
        """Reads every byte of the index, once. Raises InputError where it is not as it was written."""
        if not self._is_index_whole and describe_index(self.directory / INDEX_FILE) != self._manifest["index"]:
            raise InputError(
                f"{INDEX_FILE} in {self.directory} is damaged: it does not match its digest. "
                "`selkd cache verify --repair` makes it anew"
            )
        self._is_index_whole = True

    @cached_property
    def _shard(self) -> Callable[[int], Shard]:
        def read(number: int) -> Shard:
            entry = self._manifest["shards"][number]
            shard = read_shard(self.directory / shard_name(number), number, self._manifest["plan"])
            check_same_shard(number, shard, entry)
            return shard

        return lru_cache(SHARDS_IN_MEMORY)(read)
