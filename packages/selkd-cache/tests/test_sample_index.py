"""``index.selkd`` at scale: a million ids are opened without being read, and found by binary search."""

import os
import time
import tracemalloc
from pathlib import Path

import numpy as np
import pytest

from selkd_cache.errors import InputError
from selkd_cache.sample_index import SampleIndex, write_sample_index

PLAN = "0123456789abcdef" * 2
N = 1_000_000
PER_SHARD = 256


@pytest.fixture(scope="module")
def ids() -> np.ndarray:
    """uint8 [N, 16], distinct with certainty for all practical purposes."""
    return np.random.default_rng(0).integers(0, 256, (N, 16), dtype=np.uint8)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory, ids: np.ndarray) -> Path:
    folder = tmp_path_factory.mktemp("index")
    write_sample_index(folder, PLAN, (ids[at : at + PER_SHARD].view("V16").ravel() for at in range(0, N, PER_SHARD)))
    return folder


def test_a_million_samples_are_opened_at_once_and_found(folder: Path, ids: np.ndarray) -> None:
    tracemalloc.start()
    started = time.process_time()
    index = SampleIndex(folder / "index.selkd", PLAN, N)
    opened = time.process_time() - started
    places = np.random.default_rng(1).integers(0, N, 5000).tolist()
    wanted = [ids[place].tobytes() for place in places]
    started = time.process_time()
    found = [index.find(sample_id) for sample_id in wanted]
    per_look_up = (time.process_time() - started) / len(wanted)
    memory = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert found == [divmod(place, PER_SHARD) for place in places]
    assert opened < 1
    assert per_look_up < 1e-3  # some 10 microseconds, of the processor's time: others may be at work beside it
    assert memory < 10e6  # of 24 MB


def test_what_is_not_there_is_not_found(folder: Path, ids: np.ndarray) -> None:
    index = SampleIndex(folder / "index.selkd", PLAN, N)
    near = bytearray(ids[7].tobytes())
    near[15] ^= 1
    for sample_id in (bytes(near), bytes(16), b"\xff" * 16):
        assert index.find(sample_id) is None


def test_ids_come_back_in_the_order_of_the_shards(folder: Path, ids: np.ndarray) -> None:
    assert SampleIndex(folder / "index.selkd", PLAN, N).ids().tobytes() == ids.tobytes()


def test_another_cache_or_size_is_refused(folder: Path) -> None:
    with pytest.raises(InputError, match="damaged or another cache's"):
        SampleIndex(folder / "index.selkd", PLAN[::-1], N)
    with pytest.raises(InputError, match="expected 999999 samples"):
        SampleIndex(folder / "index.selkd", PLAN, N - 1)


def test_an_index_that_was_cut_after_it_was_opened_is_refused(folder: Path, tmp_path: Path) -> None:
    """A look-up in a memory map of a cut file would be killed by SIGBUS."""
    path = tmp_path / "index.selkd"
    path.write_bytes((folder / "index.selkd").read_bytes())
    index = SampleIndex(path, PLAN, N)
    os.truncate(path, 4096)
    with pytest.raises(InputError, match=r"was cut to 4096 of .* bytes since it was opened"):
        index.find(bytes(16))
    with pytest.raises(InputError, match="was cut to 4096"):
        index.ids()
    path.unlink()
    with pytest.raises(InputError, match="can't be read"):
        index.find(bytes(16))
