"""The committed test vectors, read by both readers; what makes them makes the same content again."""

import json
from pathlib import Path

import numpy as np
import pytest
from make_vectors import HERE, caches, write
from second_reader import read_cache

from selkd.data.samples import Sample
from selkd_cache import Rows, TeacherCache, verify_cache

VECTORS = sorted(path.with_suffix("") for path in HERE.glob("*/*.json") if path.name != "sample_ids.json")


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
    second = {each: [[list(pair) for pair in row.items()] for row in rows] for each, rows in samples.items()}
    assert second == content["samples"]


def test_what_makes_the_vectors_makes_these(tmp_path: Path) -> None:
    write(tmp_path)
    newest = max(HERE.glob("version-*"))
    assert {path.name for path in newest.glob("*.json")} == {f"{name}.json" for name in [*caches(), "sample_ids"]}
    for path in newest.glob("*.json"):
        assert (tmp_path / path.name).read_bytes() == path.read_bytes()
    for name in caches():
        made, kept = TeacherCache.open(tmp_path / name), TeacherCache.open(newest / name)
        assert made.sample_ids() == kept.sample_ids()
        assert all(as_pairs(made.get(each)) == as_pairs(kept.get(each)) for each in kept.sample_ids())


def test_selkd_gives_samples_the_ids_of_the_document() -> None:
    for sample in json.loads((max(HERE.glob("version-*")) / "sample_ids.json").read_text()):
        targets = None if sample["is_target"] is None else np.array(sample["is_target"], bool)
        made = Sample(np.array(sample["token_ids"]), np.array(sample["document_starts"]), targets)
        assert made.id.hex() == sample["id"]
