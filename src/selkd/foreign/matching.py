"""Which of a run's samples a text of a file is, by its tokens, and a place on disk where its rows wait for the others.

Shapes: n tokens of a text.
"""

import sqlite3
from collections.abc import Iterator
from contextlib import AbstractContextManager
from typing import Any

import numpy as np
import xxhash

from selkd.data.samples import Sample, SampleDataset
from selkd.errors import RunError
from selkd.foreign.scored import Piece, StoredRows, pieces

CACHE_KIB = 65_536  # of SQLite's memory; beyond it, rows are in a temporary file


class Wanted:
    """The documents of a run's samples, found by the tokens before each distribution that is wanted of them.

    The last token of a document is compared by nothing: its distribution depends on those before it alone.

    Args:
        samples: the run's.
        shards: the number of each shard that is to be written -> the indices of its samples.
    """

    def __init__(self, samples: SampleDataset, shards: dict[int, list[int]]) -> None:
        self.samples = samples
        self.n_pieces = 0
        self._by_context: dict[bytes, list[tuple[int, int, int]]] = {}
        lengths = set()
        for shard, indices in shards.items():
            for index in indices:
                sample = samples[index]
                for number, piece in enumerate(pieces(sample)):
                    context = sample.token_ids[piece.begin : piece.begin + int(piece.tokens.max())]
                    lengths.add(len(context))
                    digest = xxhash.xxh3_128_digest(context.astype("<i4").tobytes())
                    self._by_context.setdefault(digest, []).append((shard, index, number))
                    self.n_pieces += 1
        self._lengths = np.array(sorted(lengths), np.int64)

    def of(self, token_ids: np.ndarray) -> Iterator[tuple[int, int, int]]:
        """The shard, the sample and the number of each document whose wanted distributions this text determines."""
        digest, done = xxhash.xxh3_128(), 0
        tokens = token_ids.astype("<i4")
        for length in self._lengths[: int(np.searchsorted(self._lengths, len(tokens), side="right"))].tolist():
            digest.update(tokens[done:length].tobytes())
            done = length
            yield from self._by_context.get(digest.digest(), ())

    def piece(self, index: int, number: int) -> tuple[Sample, Piece]:
        sample = self.samples[index]
        return sample, pieces(sample)[number]


class Spool(AbstractContextManager["Spool"]):
    """Rows on their way into a cache, on disk in a file that goes with the process, however it ends."""

    def __init__(self) -> None:
        self._database = sqlite3.connect("", isolation_level=None)
        for line in (
            f"PRAGMA cache_size = -{CACHE_KIB}",
            "PRAGMA journal_mode = OFF",
            "PRAGMA synchronous = OFF",
            "CREATE TABLE rows (shard INT, sample INT, piece INT, lengths BLOB, ids BLOB, counts BLOB)",
            "CREATE UNIQUE INDEX place ON rows (shard, sample, piece)",
        ):
            self._execute(line)

    def __exit__(self, *_: object) -> None:
        self._database.close()

    def has(self, place: tuple[int, int, int]) -> bool:
        found = self._execute("SELECT 1 FROM rows WHERE shard = ? AND sample = ? AND piece = ?", place)
        return found.fetchone() is not None

    def put(self, place: tuple[int, int, int], rows: StoredRows) -> None:
        """Keep the rows of a document. Raises RunError where the disk is full."""
        self._execute("INSERT INTO rows VALUES (?, ?, ?, ?, ?, ?)", (*place, *(array.tobytes() for array in rows)))

    def __len__(self) -> int:
        return int(self._execute("SELECT COUNT(*) FROM rows").fetchone()[0])

    def missing(self, shard: int, wanted: dict[int, int]) -> list[int]:
        """The samples of a shard, of ``wanted`` numbers of documents, that are not whole."""
        found = dict(self._execute("SELECT sample, COUNT(*) FROM rows WHERE shard = ? GROUP BY sample", (shard,)))
        return [index for index, number in wanted.items() if found.get(index, 0) < number]

    def shard(self, shard: int, index: int) -> list[StoredRows]:
        """The rows of the documents of a sample, in order."""
        found = self._execute(
            "SELECT lengths, ids, counts FROM rows WHERE shard = ? AND sample = ? ORDER BY piece", (shard, index)
        )
        return [
            StoredRows(np.frombuffer(a, np.uint16), np.frombuffer(b, np.uint32), np.frombuffer(c, np.uint16))
            for a, b, c in found
        ]

    def _execute(self, line: str, values: tuple[Any, ...] = ()) -> sqlite3.Cursor:
        try:
            return self._database.execute(line, values)
        except sqlite3.Error as error:
            raise RunError(
                f"the imported rows can't be kept in a temporary file ({error}): free space where temporary files are, "
                "or set SQLITE_TMPDIR to another folder"
            ) from error
