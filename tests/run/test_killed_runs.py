"""Runs that are killed at their writes and continued end as one that nothing disturbed; ``benchmarks/kills.py`` kills.

    OMP_NUM_THREADS=1 python benchmarks/kills.py --kills 200

kills as often as docs/results/kills.md says.
"""

import importlib
import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from tiny_run import make_recipe

from selkd import distill
from selkd.files import write_whole
from selkd.recipe.part import parse_part
from selkd.recipe.recipe import Recipe
from selkd.run.pipeline import score_only
from selkd.selection.samples import SampleScores
from selkd.teacher import build_cache
from selkd_cache.writer import CacheWriter

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
    assert kills("--kills", 3, "--processes", 2, "--recipes", "cached", "--out", tmp_path)["kills"] >= 3


def test_every_window_of_a_write_is_struck(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Killed at each in turn, a file that is replaced is the old one or the new one, and half a file is temporary."""
    monkeypatch.syspath_prepend(str(HARNESS.parent))
    strikes = importlib.import_module("strikes")
    struck, halves, place = [], 0, tmp_path / "file"
    while not struck or struck[-1] is not None:
        for path in tmp_path.iterdir():
            path.unlink()
        place.write_bytes(b"old" * 100)
        page = strikes.new_page()
        if (child := os.fork()) == 0:
            strikes.Watch(str(tmp_path), page, len(struck) + 1, signal.SIGKILL).install()
            write_whole(place, b"new" * 100)
            os._exit(0)
        code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        is_struck, window = strikes.read_page(page)
        assert code == (-signal.SIGKILL if is_struck else 0)
        struck.append((window.phase, window.call) if is_struck else None)
        is_renamed = struck[-1] is None or ("after", "rename") in struck
        assert place.read_bytes() == (b"new" if is_renamed else b"old") * 100
        halves += [path.stat().st_size for path in tmp_path.glob("*.tmp")] == [150]
    assert halves == 1
    assert struck == [
        *(("before", "open"), ("after", "open"), ("torn", "write"), ("before", "fsync"), ("after", "fsync")),
        *(("before", "rename"), ("after", "rename"), ("after", "close"), None),
    ]


def test_what_differs_between_two_runs_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(HARNESS.parent))
    run_content = importlib.import_module("run_content")
    runs = [distill(make_recipe(tmp_path, cache=None, samples=None), tmp_path / name).path for name in ("a", "b")]
    first, second = (run_content.content_of(run, tmp_path / "none") for run in runs)
    assert run_content.differences(second, first) == []
    assert run_content.remains_of(runs[1], tmp_path / "none") == []
    student, metrics = runs[1] / "student" / "model.safetensors", runs[1] / "metrics.jsonl"
    student.write_bytes(student.read_bytes()[:-1] + b"x")
    metrics.write_text(metrics.read_text().replace('"loss": ', '"loss": 1'))
    (runs[1] / "selection" / "examples.json").unlink()
    (runs[1] / "student" / "README.md.0123456789abcdef.tmp").touch()
    told = run_content.differences(run_content.content_of(runs[1], tmp_path / "none"), first)
    assert {line.partition(":")[0].partition("[")[0] for line in told} == {
        *("student/model.safetensors", "metrics.jsonl", "selection/examples.json"),
        *(f"record.json.files.{name}" for name in ("student/model.safetensors", "metrics.jsonl")),
    } | {"record.json.files.selection/examples.json"}
    assert run_content.remains_of(runs[1], tmp_path / "none") == ["student/README.md.0123456789abcdef.tmp"]


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
