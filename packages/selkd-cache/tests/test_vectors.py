"""The committed test vectors, read by both readers; what makes them makes the same content again."""

import json
from pathlib import Path

import numpy as np
import pytest
from cache_samples import assert_same_rows
from make_vectors import HERE, caches, write
from second_reader import read_cache

from selkd.data.samples import Sample
from selkd_cache import Rows, TeacherCache, verify_cache
from selkd_cache.scalars import values_of

VECTORS = sorted(path.with_suffix("") for path in HERE.glob("*/*.json"))


def as_pairs(rows: Rows) -> list[list[list[int]]]:
    ends = np.cumsum(rows.row_lengths, dtype=np.int64)[:-1]
    pairs = np.stack([rows.class_ids.astype(np.int64), rows.counts.astype(np.int64)], axis=1)
    return [each.tolist() for each in np.split(pairs, ends)] if len(rows.row_lengths) else []


@pytest.mark.parametrize("folder", VECTORS, ids=lambda path: f"{path.parent.name}-{path.name}")
def test_both_readers_read_what_the_json_says(folder: Path) -> None:
    content = json.loads(folder.with_suffix(".json").read_text())
    assert verify_cache(folder) == []
    cache = TeacherCache.open(folder, content["fingerprint"])
    assert {each.hex(): as_pairs(cache.get(each)) for each in cache.sample_ids()} == content["samples"]
    assert [each.hex() for each in cache.sample_ids()] == list(content["samples"])
    fingerprint, samples = read_cache(folder)
    assert fingerprint == content["fingerprint"]
    if "scalars" in content:
        first = {each.hex(): values_of(cache.get(each).scalars).tolist() for each in cache.sample_ids()}
        assert first == content["scalars"]
        assert {each: [numbers for _, numbers in rows] for each, rows in samples.items()} == content["scalars"]
        samples = {each: [row for row, _ in rows] for each, rows in samples.items()}
    second = {each: [[list(pair) for pair in row.items()] for row in rows] for each, rows in samples.items()}
    assert second == content["samples"]


def test_what_makes_the_vectors_makes_these(tmp_path: Path) -> None:
    write(tmp_path)
    assert {f"{path.parent.name}/{path.name}" for path in VECTORS} == caches().keys()
    for path in (*caches(), "sample_ids"):
        assert (tmp_path / f"{path}.json").read_bytes() == (HERE / f"{path}.json").read_bytes()
    for path in caches():
        made, kept = TeacherCache.open(tmp_path / path), TeacherCache.open(HERE / path)
        assert made.sample_ids() == kept.sample_ids()
        for each in kept.sample_ids():
            assert_same_rows(made.get(each), kept.get(each))


def test_selkd_gives_samples_the_ids_of_the_document() -> None:
    for sample in json.loads((HERE / "sample_ids.json").read_text()):
        targets = None if sample["is_target"] is None else np.array(sample["is_target"], bool)
        made = Sample(np.array(sample["token_ids"]), np.array(sample["document_starts"]), targets)
        assert made.id.hex() == sample["id"]
