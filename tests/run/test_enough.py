"""What a stage needs is compared with what there is before it begins, and a lack is told with both figures."""

import logging
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import psutil
import pytest
from tiny_run import make_recipe

from selkd import distill
from selkd.needs.architecture import teacher_and_student
from selkd.needs.disk import disk
from selkd.needs.plan import make_plan
from selkd.recipe.part import parse_part
from selkd.recipe.recipe import Recipe
from selkd.run.enough import warn_if_short
from selkd.run.workspace import Workspace


def test_a_lack_of_memory_or_of_space_is_told_before_the_stage_begins_and_only_then(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    recipe = make_recipe(tmp_path)
    with caplog.at_level(logging.WARNING, "selkd.run.enough"):
        distill(recipe, tmp_path / "roomy")
        assert [entry for entry in caplog.records if entry.name == "selkd.run.enough"] == []
        rss = psutil.Process().memory_info().rss
        none_left = SimpleNamespace(available=-rss - 2**34, percent=100.0)
        monkeypatch.setattr(psutil, "virtual_memory", lambda: none_left)
        monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=1000))
        distill(recipe, tmp_path / "poor")
    told = [entry.getMessage() for entry in caplog.records if entry.name == "selkd.run.enough"]
    for stage in ("score", "cache", "train", "evaluate"):
        assert [line for line in told if line.startswith(f"{stage} is expected to take ")], stage
    for stage, folder in (("cache", "teacher_cache"), ("train", "checkpoints")):
        (line,) = [line for line in told if line.startswith(f"{stage} is expected to write ")]
        assert f"into {tmp_path / 'poor' / folder}, where 1.00 kB are free" in line


@pytest.mark.parametrize("limit", [None, 2])
def test_the_bytes_of_checkpoints_are_those_that_are_written(tmp_path: Path, limit: int | None) -> None:
    recipe = make_recipe(tmp_path, samples=None, evaluation={"suite": []}, cache=None, classes={"sampler": "all"})
    recipe["training"] |= {"save_total_limit": limit, "max_steps": 9}
    run = distill(recipe, tmp_path / "run")
    work = Workspace(parse_part(Recipe, recipe), tmp_path / "run")
    teacher, student = teacher_and_student(work.recipe, work.teacher_source, None)
    assert student.parameters < teacher.parameters
    counted = disk(student, make_plan(work.recipe, work.arguments, 1, work.splits))
    weights = 4 * student.parameters
    (least, most) = (5, 5) if limit is None else (limit, limit + 1)  # the new one comes before an old one goes
    kept = list((run.path / "checkpoints").iterdir())
    assert len(kept) == least
    assert counted == {"cache": 0, "train": most * 3 * weights + weights}
    for checkpoint in kept:
        size = sum((checkpoint / name).stat().st_size for name in ("model.safetensors", "optimizer.pt"))
        assert 3 * weights < size < 3 * weights + 20_000  # headers and names


def test_a_family_that_can_not_be_counted_ends_no_run(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def unknown(*_: object) -> None:
        raise TypeError("a size for each layer")

    teacher = SimpleNamespace(is_foreign=False)
    work: Any = SimpleNamespace(state=SimpleNamespace(is_main_process=True), recipe=SimpleNamespace(teacher=teacher))
    monkeypatch.setattr("selkd.run.enough._needs", unknown)
    with caplog.at_level(logging.WARNING, "selkd.run.enough"):
        warn_if_short(work, "score")
    assert "score: what it needs can't be counted (TypeError: a size for each layer)" in caplog.text
