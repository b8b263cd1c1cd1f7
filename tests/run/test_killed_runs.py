"""Runs that are killed at their writes and continued end as one that nothing disturbed; ``benchmarks/kills.py`` kills.

    OMP_NUM_THREADS=1 python benchmarks/kills.py --kills 200

kills as often as docs/results/kills.md says.
"""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from tiny_run import make_recipe

from selkd import distill
from selkd.cache.writer import CacheWriter
from selkd.recipe.part import parse_part
from selkd.recipe.recipe import Recipe
from selkd.run.pipeline import score_only
from selkd.selection.samples import SampleScores
from selkd.teacher import build_cache

HARNESS = Path(__file__).parent.parent.parent / "benchmarks" / "kills.py"


class Killed(BaseException):
    """Stands for the end of a process: nothing in a run may catch it."""


def kills(*arguments: object) -> dict[str, Any]:
    command = [sys.executable, str(HARNESS), *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=900, check=False)
    assert done.stdout, done.stderr
    report: dict[str, Any] = json.loads(done.stdout)
    assert report["bad"] == [], json.dumps(report["bad"], indent=1)
    assert done.returncode == 0
    return report


@pytest.mark.slow
def test_a_dozen_kills_in_every_stage_lose_nothing(tmp_path: Path) -> None:
    report = kills("--runs", 9, "--recipes", "cached", "--out", tmp_path)
    assert report["kills"] >= 9
    assert report["struck_by_stage"].keys() >= {"prepare", "score", "cache", "train", "evaluate", "finish"}
    windows = set(report["struck_by_window"])
    assert {window.split()[0] for window in windows} >= {"before", "torn", "after"}
    assert {window.split()[1] for window in windows} >= {"open", "fsync", "rename", "time"}


@pytest.mark.slow
def test_one_rank_of_two_is_killed_and_nothing_is_lost(tmp_path: Path) -> None:
    assert kills("--runs", 3, "--processes", 2, "--recipes", "cached", "--out", tmp_path)["kills"] >= 3


@pytest.mark.parametrize("strikes", ["in the middle of a build", "between a build and its record"])
def test_what_a_killed_build_ran_on_is_counted_once(
    strikes: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(build_cache, "SHARD_TOKENS", 256)
    shared = {"path": str(tmp_path / "cache")}
    recipe = make_recipe(tmp_path, evaluation={"suite": []}, cache=shared)
    write, finish, written = CacheWriter.write_shard, CacheWriter.finish, []

    def write_shard(self: CacheWriter, number: int, samples: Any) -> None:
        if len(written) == 2 and strikes == "in the middle of a build":
            raise Killed
        write(self, number, samples)
        written.append(number)

    def finish_and_end(self: CacheWriter) -> None:
        finish(self)
        raise Killed

    with monkeypatch.context() as killed:
        killed.setattr(CacheWriter, "write_shard", write_shard)
        killed.setattr(CacheWriter, "finish", finish_and_end)
        with pytest.raises(Killed):
            distill(recipe, tmp_path / "run")
    assert len(written) >= 2
    record = distill(recipe, tmp_path / "run").record
    straight = distill(recipe | {"cache": {"path": str(tmp_path / "other")}}, tmp_path / "straight").record
    assert record["teacher_tokens"] == straight["teacher_tokens"]
    assert record["counts"] == straight["counts"]
    costs = [record["shared"]["cache"], straight["shared"]["cache"]]
    assert costs[0]["teacher_tokens"] == costs[1]["teacher_tokens"] == straight["teacher_tokens"]["cache"]
    assert all(cost["seconds"] > 0 for cost in costs)


def test_what_scoring_ran_on_is_counted_although_its_record_was_not_reached(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    samples = {"metric": "kl", "fraction": 0.2, "path": str(tmp_path / "scores.parquet")}
    approximate = {"scoring": "approximate", "metric": "student_entropy", "frequent_classes": 20, "tail_classes": 20}
    for name, options in {"exact": samples, "approximate": samples | approximate}.items():
        options |= {"path": str(tmp_path / f"{name}.parquet")}
        recipe = make_recipe(tmp_path, evaluation={"suite": []}, cache=None, samples=options)
        write = SampleScores.write

        def write_and_end(self: SampleScores, *arguments: Any, write: Any = write) -> None:
            write(self, *arguments)
            raise Killed

        with monkeypatch.context() as killed:
            killed.setattr(SampleScores, "write", write_and_end)
            with pytest.raises(Killed):
                distill(recipe, tmp_path / name)
        record = distill(recipe, tmp_path / name).record
        options |= {"path": str(tmp_path / f"{name}-straight.parquet")}
        straight = distill(recipe | {"samples": options}, tmp_path / f"{name}-straight").record
        assert record["teacher_tokens"] == straight["teacher_tokens"]
        agreements = [each.get("scoring_agreement") for each in (record, straight)]
        assert all(each is None or each.pop("seconds") > 0 for each in agreements)
        assert agreements[0] == agreements[1]
        assert (agreements[0] is not None) == (name == "approximate")


def test_a_student_is_cut_once_on_a_machine_and_counted_in_every_run(tmp_path: Path) -> None:
    recipe = make_recipe(tmp_path, evaluation={"suite": []}, samples=None, cache=None)
    first, second = (distill(recipe, tmp_path / name).record["teacher_tokens"] for name in ("first", "second"))
    assert first["prune"] > 0
    assert first == second


def test_what_killed_processes_left_goes_when_the_run_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SELKD_CACHE", str(tmp_path / "shared"))
    recipe = make_recipe(tmp_path, evaluation={"suite": []}, cache=None)
    score_only(parse_part(Recipe, recipe), tmp_path / "run")
    tail = "0123456789abcdef.tmp"
    left = [f"run/{name}.{tail}" for name in ("record.json", "selection/samples.parquet", "student/README.md")]
    left += [f"shared/fingerprints/a.json.{tail}", f"shared/students/.a.{tail}/lock", f"run/.best_student.{tail}/lock"]
    others = [
        tmp_path / name for name in ("run/notes.tmp", f"shared/students/.a.{tail}b/lock", f"shared/b/c/d/e.{tail}")
    ]
    for path in (*(tmp_path / name for name in left), *others):
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()
    distill(recipe, tmp_path / "run")
    assert [name for name in left if (tmp_path / name).exists()] == []
    assert all(path.exists() for path in others)
