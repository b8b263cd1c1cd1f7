"""A cache as Arrow batches and as a Parquet file, read by pyarrow and by ``datasets``."""

import json
from pathlib import Path

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from cache_samples import FINGERPRINT, build, make_rows, sample_id

from selkd_cache.arrow import METADATA, write_parquet
from selkd_cache.errors import InputError
from selkd_cache.reader import TeacherCache


@pytest.fixture
def cache(tmp_path: Path) -> TeacherCache:
    build(tmp_path / "cache")
    return TeacherCache.open(tmp_path / "cache")


def assert_as_stored(rows: list[dict]) -> None:
    assert [row["sample_id"] for row in rows] == [sample_id(number) for number in range(12)]
    for number, row in enumerate(rows):
        expected = make_rows(number)
        assert [len(position) for position in row["class_ids"]] == expected.row_lengths.tolist()
        for name in ("class_ids", "counts"):
            assert np.array_equal(np.concatenate(row[name]), getattr(expected, name))


@pytest.mark.parametrize("positions_at_once", [1, 50, 10_000])
def test_a_table_has_every_sample(cache: TeacherCache, positions_at_once: int) -> None:
    reader = cache.to_arrow(positions_at_once)
    assert json.loads(reader.schema.metadata[METADATA]) == FINGERPRINT
    batches = list(reader)
    assert len(batches) == {1: 12, 50: 4, 10_000: 1}[positions_at_once]  # samples have 20 positions
    assert_as_stored(pa.Table.from_batches(batches).to_pylist())


def test_a_parquet_file_is_read_by_others(cache: TeacherCache, tmp_path: Path) -> None:
    write_parquet(cache, tmp_path / "cache.parquet")
    assert_as_stored(pq.read_table(tmp_path / "cache.parquet").to_pylist())
    files = {"data_files": str(tmp_path / "cache.parquet"), "split": "train"}
    assert_as_stored(list(datasets.load_dataset("parquet", streaming=True, **files)))
    assert_as_stored(list(datasets.load_dataset("parquet", cache_dir=str(tmp_path / "hf"), **files)))


def test_a_damaged_sample_leaves_no_file(cache: TeacherCache, tmp_path: Path) -> None:
    shard = cache.directory / "shard-00002.selkd"
    data = bytearray(shard.read_bytes())
    data[-300] ^= 1
    shard.write_bytes(data)
    with pytest.raises(InputError, match=r"shard-00002\.selkd is damaged"):
        write_parquet(cache, tmp_path / "cache.parquet")
    assert [path.name for path in tmp_path.iterdir()] == ["cache"]


def test_scalars_are_columns_of_their_own() -> None:
    folder = Path(__file__).parent / "vectors" / "version-3" / "at-temperature"
    content = json.loads(folder.with_suffix(".json").read_text())
    rows = TeacherCache.open(folder).to_arrow(5).read_all().to_pylist()
    names = ["entropy_nats", "ce_nats", "entropy_nats_at_temperature", "ce_nats_at_temperature"]
    assert list(rows[0]) == ["sample_id", "class_ids", "counts", *names]
    for row in rows:
        stored = content["scalars"][row["sample_id"].hex()]
        assert [list(numbers) for numbers in zip(*(row[name] for name in names), strict=True)] == stored
