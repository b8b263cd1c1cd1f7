"""A cached teacher for any trainer: what the collator adds is what the cache holds, wherever an example stands."""

from pathlib import Path

import numpy as np
import pytest
import torch
from tiny import make_tokenizer
from transformers import DataCollatorForSeq2Seq

from selkd.data.collate import collate
from selkd.data.samples import Sample
from selkd.errors import InputError
from selkd.run.teacher_dataset import TeacherDataset
from selkd.teacher.cached import CachedTeacher
from selkd.teacher.collator import TeacherCollator, sample_of
from selkd_cache import CacheWriter, TeacherCache

V, U = 40, 12
SAMPLES = [
    Sample(np.arange(5, 14), np.array([0])),
    Sample(np.arange(9, 21), np.array([0, 4, 5])),
    Sample(np.arange(3, 10), np.array([0]), np.array([0, 0, 0, 1, 1, 0, 1], bool)),
    Sample(np.array([7]), np.array([0])),
]


def drawn(sample: Sample) -> tuple[bytes, np.ndarray, np.ndarray, np.ndarray]:
    rng = np.random.default_rng(sample.token_ids)
    rows = [np.unique(rng.integers(0, V, U), return_counts=True) for _ in range(sample.n_valid)]
    ids, counts = (np.concatenate([row[part] for row in rows] or [np.zeros(0, np.int64)]) for part in (0, 1))
    return sample.id, np.array([len(row[0]) for row in rows], np.int64), ids, counts


def write(folder: Path, **fields: str | float) -> TeacherCache:
    writer = CacheWriter(folder, {"draws": U, "vocabulary": V, **fields}, [[sample.id for sample in SAMPLES]])
    writer.write_shard(0, map(drawn, SAMPLES))
    writer.finish()
    return TeacherCache.open(folder)


@pytest.fixture
def cache(tmp_path: Path) -> TeacherCache:
    return write(tmp_path / "cache")


@pytest.mark.parametrize("side", ["right", "left"])
def test_a_batch_has_what_selkds_own_batch_has(cache: TeacherCache, side: str) -> None:
    dataset = TeacherDataset(SAMPLES, cache)
    tokenizer = make_tokenizer()
    tokenizer.padding_side = side
    order = [2, 0, 3, 1]
    padding = DataCollatorForSeq2Seq(tokenizer, return_tensors="pt")
    batch = TeacherCollator(cache, padding)([dataset[index] for index in order])
    own = collate([SAMPLES[index] for index in order], tokenizer.pad_token_id, padding_side=side)
    own |= CachedTeacher(cache).read(own)
    for name in ("input_ids", "position_ids", "valid_mask", "sample_ids", "teacher_class_ids", "teacher_counts"):
        assert torch.equal(batch[name], own[name]), name
    assert (batch["teacher_counts"].sum(-1) == U * batch["valid_mask"]).all()
    # Where the next label is to be learned, and there alone, the teacher's classes stand.
    assert torch.equal(batch["valid_mask"][:, :-1], batch["labels"][:, 1:] != -100)


def test_an_example_is_found_by_its_content(cache: TeacherCache) -> None:
    dataset = TeacherDataset(SAMPLES, cache)
    assert [sample_of(dataset[index]).id for index in range(4)] == [sample.id for sample in SAMPLES]
    plain = {"input_ids": list(range(5, 14))}
    assert sample_of(plain).id == sample_of({**plain, "labels": list(range(5, 14))}).id == SAMPLES[0].id
    completion = {"input_ids": list(range(3, 10)), "completion_mask": [0, 0, 0, 1, 1, 0, 1]}
    assert sample_of(completion).id == SAMPLES[2].id
    with pytest.raises(InputError, match="is not in the teacher cache"):
        TeacherCollator(cache)([{"input_ids": [1, 2, 3]}])
    with pytest.raises(InputError, match="position_ids: expected 3, one a token"):
        sample_of({"input_ids": [1, 2, 3], "position_ids": [0, 1]})


def test_what_would_stand_elsewhere_is_refused(cache: TeacherCache, tmp_path: Path) -> None:
    item = TeacherDataset(SAMPLES, cache)[0]
    for joined, message in (
        (torch.arange(30)[None], r"a row of input_ids for each of the 2 examples, got \[1, 30\]"),
        (torch.zeros(2, 9, dtype=torch.int64), "9 tokens, 9 wide, neither begins nor ends with them"),
        (torch.zeros(2, 5, dtype=torch.int64), "9 tokens, 5 wide"),
    ):
        with pytest.raises(InputError, match=message):
            TeacherCollator(cache, lambda _, joined=joined: {"input_ids": joined})([item, item])
    with pytest.raises(InputError, match="lacks 1 of 2 samples"):
        TeacherDataset([SAMPLES[0], Sample(np.arange(4), np.array([0]))], cache)
    with pytest.raises(InputError, match=r"keeps the tail as one more class.*DistillTrainer"):
        TeacherCollator(write(tmp_path / "tail", tail="one class"))


def test_how_a_cache_was_drawn_is_handed_on_and_its_temperature_compared(cache: TeacherCache, tmp_path: Path) -> None:
    warm = write(tmp_path / "warm", sampler="top_k", temperature=2.0)
    with pytest.raises(InputError, match=r"drawn at temperature 2\.0, and this collator is for 1\. Give .*2\.0"):
        TeacherCollator(warm)
    assert TeacherCollator(warm, temperature=2.0).classes == {"sampler": "top_k", "draws": U}
    assert TeacherCollator(cache).classes is None  # it does not say
    own = write(tmp_path / "own", sampler="some.module:sampler", temperature=1.0)
    assert TeacherCollator(own).classes is None  # nobody's module is imported because a cache names it
