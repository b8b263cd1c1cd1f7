"""Made-up samples for the tests of the cache, and the plain build that the tests compare with."""

import hashlib
from pathlib import Path

import numpy as np

from selkd_cache.rows import Rows
from selkd_cache.writer import CacheWriter, SampleRows

VOCABULARY = 2**18
FINGERPRINT: dict[str, str | int | float] = {
    "teacher": "0123456789abcdef",
    "sampler": "rs_kd",
    "draws": 64,
    "vocabulary": VOCABULARY,
    "temperature": 1.0,
    "seed": 1337,
}


def sample_id(number: int) -> bytes:
    return hashlib.md5(b"%d" % number, usedforsecurity=False).digest()


def make_rows(number: int, n_positions: int = 20) -> Rows:
    """Rows of about eight classes drawn 64 times together; every fifth row is empty."""
    rng = np.random.default_rng(number)
    lengths = rng.integers(1, 16, n_positions)
    lengths[::5] = 0
    ids = [np.sort(rng.choice(VOCABULARY, size=length, replace=False)) for length in lengths]
    counts = [1 + rng.multinomial(64 - length, np.full(length, 1 / length)) for length in lengths if length]
    return Rows(
        lengths.astype(np.uint16), np.concatenate(ids).astype(np.uint32), np.concatenate(counts).astype(np.uint16)
    )


def plan(n_shards: int = 3, n_per_shard: int = 4) -> list[list[bytes]]:
    return [[sample_id(shard * n_per_shard + at) for at in range(n_per_shard)] for shard in range(n_shards)]


def shard_samples(shard: int, n_per_shard: int = 4) -> list[SampleRows]:
    numbers = range(shard * n_per_shard, (shard + 1) * n_per_shard)
    return [(sample_id(number), *make_rows(number)) for number in numbers]


def build(directory: Path, n_shards: int = 3) -> CacheWriter:
    """Builds what is missing, as every caller does: new, continued or repaired."""
    writer = CacheWriter(directory, FINGERPRINT, plan(n_shards))
    for shard in writer.missing_shards():
        writer.write_shard(shard, shard_samples(shard))
    writer.finish()
    return writer


def contents(directory: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in directory.iterdir()}


def assert_same_rows(got: Rows, expected: Rows) -> None:
    for there, wanted in zip(got, expected, strict=True):
        if wanted is None:
            assert there is None
            continue
        assert there.dtype == wanted.dtype
        np.testing.assert_array_equal(there, wanted)
