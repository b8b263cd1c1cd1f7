"""The data loader's workers read the cache ahead of training: several processes, the same numbers."""

import os
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny import V, make_arguments, make_model, make_samples, make_tokenizer
from tiny_run import make_recipe
from torch import Tensor

from selkd.data.samples import SampleDataset
from selkd.errors import InputError, RunError
from selkd.recipe.choices import ClassOptions
from selkd.recipe.part import parse_part
from selkd.recipe.recipe import Recipe
from selkd.run.workspace import Workspace
from selkd.teacher.build_cache import build_cache
from selkd.teacher.live import LiveTeacher
from selkd.training.trainer import DistillTrainer
from selkd_cache.reader import TeacherCache


class ReadBy(TeacherCache):
    """A cache that writes down which processes read it."""

    def get(self, sample_id: bytes) -> Any:
        (self.directory.parent / f"read-by-{os.getpid()}").touch()
        return super().get(sample_id)


def trained(folder: Path, samples: SampleDataset, cache: TeacherCache, workers: int) -> dict[str, Tensor]:
    """The student's weights after one epoch."""
    arguments = make_arguments(
        folder,
        positions={"policy": "all"},
        classes={"sampler": "rs_kd", "draws": 8},
        dataloader_num_workers=workers,
        seed=11,
        max_steps=4,
        per_device_train_batch_size=2,
    )
    student = make_model(1, layers=2)
    trainer = DistillTrainer(student, cache, arguments, train_dataset=samples, processing_class=make_tokenizer())
    trainer.train()
    return {name: weight.detach() for name, weight in student.state_dict().items()}


@pytest.mark.slow
def test_workers_read_the_cache_and_change_nothing(tmp_path: Path) -> None:
    samples = make_samples(8)
    fingerprint = {"sampler": "rs_kd", "draws": 8, "temperature": 1.0, "vocabulary": V, "seed": 11}
    options = ClassOptions(sampler="rs_kd", draws=8)
    teacher = LiveTeacher(make_model(0, layers=3), options, 1.0, 11, V)
    build_cache(tmp_path / "cache", fingerprint, samples, lambda: teacher, 1)
    opened = TeacherCache.open(tmp_path / "cache")
    cache = ReadBy(opened.directory, opened._manifest)
    alone = trained(tmp_path / "alone", samples, cache, workers=0)
    assert [path.name for path in tmp_path.glob("read-by-*")] == [f"read-by-{os.getpid()}"]
    (tmp_path / f"read-by-{os.getpid()}").unlink()
    helped = trained(tmp_path / "helped", samples, cache, workers=2)
    readers = {path.name for path in tmp_path.glob("read-by-*")}
    assert len(readers) == 2
    assert f"read-by-{os.getpid()}" not in readers
    assert all(torch.equal(alone[name], helped[name]) for name in alone)
    assert any(not torch.equal(alone[name], weight) for name, weight in make_model(1, layers=2).state_dict().items())


@pytest.mark.slow
@pytest.mark.parametrize("workers", [0, 1])
def test_what_a_worker_finds_damaged_is_told_in_the_readers_own_words(workers: int, tmp_path: Path) -> None:
    samples = make_samples(8)
    fingerprint = {"sampler": "rs_kd", "draws": 8, "temperature": 1.0, "vocabulary": V, "seed": 11}
    options = ClassOptions(sampler="rs_kd", draws=8)
    teacher = LiveTeacher(make_model(0, layers=3), options, 1.0, 11, V)
    build_cache(tmp_path / "cache", fingerprint, samples, lambda: teacher, 1)
    cache = TeacherCache.open(tmp_path / "cache")
    for shard in (tmp_path / "cache").glob("shard-*"):
        content = bytearray(shard.read_bytes())
        content[len(content) // 2] ^= 1
        shard.write_bytes(bytes(content))
    with pytest.raises((InputError, RunError)) as told:
        trained(tmp_path / "run", samples, cache, workers=workers)
    assert "\n" not in str(told.value)
    assert "DataLoader" not in str(told.value)
    assert str(tmp_path / "cache") in str(told.value)


@pytest.mark.parametrize(
    ("device", "changes", "workers"),
    [
        ("cpu", {}, 0),
        ("meta", {}, 1),
        ("meta", {"training": {"dataloader_num_workers": 0}}, 0),
        ("meta", {"cache": None}, 0),
    ],
)
def test_a_worker_reads_ahead_where_an_accelerator_trains_on_a_cache(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, device: str, changes: dict[str, Any], workers: int
) -> None:
    monkeypatch.setattr(Workspace, "device", torch.device(device))
    work = Workspace(parse_part(Recipe, make_recipe(tmp_path) | changes), tmp_path / "run")
    assert work.arguments.dataloader_num_workers == workers
