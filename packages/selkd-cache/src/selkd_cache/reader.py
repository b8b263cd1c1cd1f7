"""Reading a cache: open it, look samples up by content, and say how large it is and what it holds."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cached_property, lru_cache
from itertools import groupby
from operator import itemgetter
from pathlib import Path
from typing import TYPE_CHECKING, Any, overload

import numpy as np

from selkd_cache.errors import InputError
from selkd_cache.fingerprint import Fingerprint, check_fingerprint, check_same_fingerprint
from selkd_cache.manifest import MANIFEST, PLAN, read_complete
from selkd_cache.rows import Rows
from selkd_cache.sample_index import INDEX_FILE, SampleIndex, describe_index
from selkd_cache.shard import ID_BYTES, Shard, read_shard
from selkd_cache.verify import verify_cache

if TYPE_CHECKING:
    import pyarrow

# The models and indices of so many shards stay in memory, up to 1 MB each, so memory does not grow with the cache. At
# 2^17 tokens a shard, 32 million tokens can be read without reading a model twice.
SHARDS_IN_MEMORY = 256


class TeacherCache:
    """A complete teacher cache: the drawn classes at every position of every kept sample, looked up by its content.

    It holds no open file and no lock, so threads may share it, and it may be forked or sent to worker processes.
    """

    def __init__(self, directory: Path, manifest: dict[str, Any]) -> None:
        self.directory = directory
        self._manifest = manifest
        self._index = SampleIndex(directory / INDEX_FILE, manifest["plan"], manifest["n_samples"])
        self._ends = np.cumsum([entry["samples"] for entry in manifest["shards"]])
        self._is_index_whole = False  # until every byte of it was read

    @classmethod
    def open(cls, directory: str | Path, expected: Fingerprint | None = None) -> "TeacherCache":
        """Opens a complete cache. Shards are read when they are needed; ``verify`` reads them all.

        Args:
            expected: the whole fingerprint that the cache must have, or None to take any.

        Raises:
            InputError: there is no cache, it is incomplete or of an unknown version, its manifest was changed, or its
                fingerprint is another (each field that differs is named, with the stored and the expected value).
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
        """Whether the sample is there. Raises InputError if the index is damaged, rather than answer False."""
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

    @overload
    def __getitem__(self, place: int) -> Rows: ...

    @overload
    def __getitem__(self, place: slice) -> list[Rows]: ...

    def __getitem__(self, place: int | slice) -> Rows | list[Rows]:
        """The rows of the sample at a place in the stored order, or of all those that a slice names."""
        if isinstance(place, slice):
            return [rows for _, rows in self.items(place)]
        places = range(len(self))[place : place + 1 or None]
        if not places:
            raise IndexError(f"sample {place} of the teacher cache in {self.directory}, which has {len(self)}")
        ((_, rows),) = self._at(places)
        return rows

    def __iter__(self) -> Iterator[Rows]:
        """The rows of each sample in the stored order, as ``items`` gives them."""
        return (rows for _, rows in self.items())

    def items(self, places: slice = slice(None)) -> Iterator[tuple[bytes, Rows]]:
        """The id and the rows of each sample in the stored order, or of those that a slice names, read one by one.

        Raises:
            InputError: a shard or a sample is damaged.
        """
        return self._at(range(len(self))[places])

    def to_arrow(self, positions_at_once: int = 65_536) -> "pyarrow.RecordBatchReader":
        """All samples in the stored order as a stream of Arrow record batches; ``read_all()`` makes a table of it.

        A row is a sample: ``sample_id`` and, for each position, ``class_ids`` and ``counts``, and with scalars
        ``entropy_nats`` and ``ce_nats``, and both ``_at_temperature``. The schema's metadata has the fingerprint. It
        needs pyarrow: ``pip install 'selkd-cache[arrow]'``.

        Args:
            positions_at_once: a batch ends with the sample that reaches so many.
        """
        from selkd_cache.arrow import record_batches

        return record_batches(self.items(), self.fingerprint, positions_at_once)

    def get(self, sample_id: bytes) -> Rows:
        """The rows of one sample: row_lengths uint16 [n], class_ids uint32 [sum], counts uint16 [sum], and scalars
        where the cache has them; see ``Rows``.

        Raises:
            InputError: the sample is not in the cache, or its bytes are damaged.
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
            with self._named_in_errors():
                shard = self._shard(number)
                if row < len(shard.index) and shard.index["sample_id"][row].tobytes() == sample_id:
                    return shard.read(self.directory / shard.name, row)
        self._require_whole_index()
        raise InputError(f"{INDEX_FILE} in {self.directory} leads to another sample than {sample_id.hex()}")

    def verify(self) -> list[str]:
        """Reads every byte of the folder as it is now and lists the problems, named by file; empty if all is well."""
        return verify_cache(self.directory)

    def stats(self) -> dict[str, int | float]:
        """The size of all files of the cache, beside that of plainer layouts.

        Positions with a class are counted. ``fixed_width`` is 3 bytes a draw, ``full_logits`` 2 bytes a class (bf16).
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

    def contents(self, n_samples: int = 1000, seed: int = 0) -> dict[str, int | float]:
        """What was drawn in random samples, or in all if there are fewer, at the positions that have a class.

        Returns:
            ``samples_read``; ``classes_p10``, ``_median``, ``_p90`` and ``_max`` of the distinct classes of a
            position; ``drawn_once_share``, the share of these classes that was drawn once.

        Raises:
            InputError: a sample is damaged.
        """
        ids = self.sample_ids()
        rows = [self.get(ids[index]) for index in np.random.default_rng(seed).permutation(len(ids))[:n_samples]]
        classes = np.concatenate([sample.row_lengths for sample in rows])
        classes = classes[classes > 0]
        p10, median, p90 = np.quantile(classes, [0.1, 0.5, 0.9]).tolist() if len(classes) else (0.0, 0.0, 0.0)
        return {
            "samples_read": len(rows),
            "classes_p10": p10,
            "classes_median": median,
            "classes_p90": p90,
            "classes_max": int(classes.max(initial=0)),
            "drawn_once_share": sum(int((sample.counts == 1).sum()) for sample in rows) / max(int(classes.sum()), 1),
        }

    def _require_whole_index(self) -> None:
        """Reads every byte of the index, once. Raises InputError where it does not match its digest."""
        if not self._is_index_whole and describe_index(self.directory / INDEX_FILE) != self._manifest["index"]:
            raise InputError(
                f"{INDEX_FILE} in {self.directory} is damaged: it does not match its digest. "
                "`selkd cache verify --repair` makes it anew"
            )
        self._is_index_whole = True

    def _at(self, places: range) -> Iterator[tuple[bytes, Rows]]:
        """The samples at these places of the stored order; those of a shard are read from one open file."""
        numbers = np.searchsorted(self._ends, np.asarray(places), side="right")
        for number, same in groupby(zip(numbers.tolist(), places, strict=True), key=itemgetter(0)):
            with self._named_in_errors():
                shard = self._shard(number)
                begin = int(self._ends[number]) - len(shard.index)
                yield from shard.samples(self.directory / shard.name, [place - begin for _, place in same])

    @contextmanager
    def _named_in_errors(self) -> Iterator[None]:
        try:
            yield
        except InputError as error:
            raise InputError(
                f"{error} (in {self.directory}). `selkd cache verify --repair`, with the recipe that built it, mends it"
            ) from error

    @cached_property
    def _shard(self) -> Callable[[int], Shard]:
        def read(number: int) -> Shard:
            shard = read_shard(self.directory, number, self._manifest["plan"])
            shard.check(self._manifest, number)
            return shard

        return lru_cache(SHARDS_IN_MEMORY)(read)
