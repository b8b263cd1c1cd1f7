"""``selkd cache verify --repair`` and ``--rescore``, and ``inspect``, on a toy teacher's real cache."""

import json
import shutil
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from cache_samples import contents
from tiny_run import make_recipe, make_teacher

from selkd import build_cache
from selkd.cache.inspect import contents as contents_of
from selkd.cache.inspect import summary
from selkd.cache.reader import TeacherCache
from selkd.cache.rows import row_sums
from selkd.cli import main
from selkd.pipeline import cache_only
from selkd.recipe_files import load_recipe

Command = Callable[..., tuple[int, dict[str, Any]]]


@pytest.fixture
def selkd_json(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Command:
    """Runs a command with ``--json`` in this process: its exit code, and its answer or error message."""

    def run(*arguments: object) -> tuple[int, dict[str, Any]]:
        monkeypatch.setattr(sys, "argv", ["selkd", *map(str, arguments), "--json"])
        with pytest.raises(SystemExit) as exit_info:
            main()
        captured = capsys.readouterr()
        return int(exit_info.value.code or 0), json.loads(captured.out) if captured.out else {"error": captured.err}

    return run


@contextmanager
def small_shards(folder: Path) -> Iterator[None]:
    """Several shards at toy size, and what is made once kept in ``folder``."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(build_cache, "SHARD_TOKENS", 400)
        patch.setattr(build_cache, "TOKENS_AT_ONCE", 128)
        patch.setenv("SELKD_CACHE", str(folder / "selkd"))
        yield


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with ``toy.yaml`` and ``run``, whose cache is of several shards."""
    folder = tmp_path_factory.mktemp("built")
    (folder / "toy.yaml").write_text(yaml.safe_dump(make_recipe(folder)))
    with small_shards(folder):
        run = cache_only(load_recipe(folder / "toy.yaml"), folder / "run")
    assert run.record["teacher_cache"]["shards"] >= 3
    return folder


@pytest.fixture
def run_path(built: Path, tmp_path: Path) -> Iterator[Path]:
    """A copy of the run, beside a copy of its recipe."""
    shutil.copy(built / "toy.yaml", tmp_path)
    with small_shards(built):
        yield Path(shutil.copytree(built / "run", tmp_path / "run"))


def flip(path: Path, at: int) -> None:
    data = bytearray(path.read_bytes())
    data[at] ^= 16
    path.write_bytes(data)


def test_repair_rebuilds_only_what_is_damaged(run_path: Path, selkd_json: Command) -> None:
    cache = run_path / "teacher_cache"
    before = contents(cache)
    stamps = {path.name: path.stat().st_mtime_ns for path in cache.iterdir()}
    flip(cache / "shard-00001.selkd", 900)
    flip(cache / "plan.json", 60)
    flip(cache / "index.selkd", 70)
    code, answer = selkd_json("cache", "verify", cache)
    assert code == 1
    assert [problem.split()[0] for problem in answer["problems"]] == ["plan.json", "shard-00001.selkd", "index.selkd"]
    code, answer = selkd_json("cache", "verify", cache, "--repair")
    assert code == 0, answer
    assert len(answer["problems"]) == 3
    assert answer["problems_left"] == []
    assert contents(cache) == before
    changed = {path.name for path in cache.iterdir() if path.stat().st_mtime_ns != stamps[path.name]}
    assert changed == {"shard-00001.selkd", "plan.json", "index.selkd"}


def test_a_lost_manifest_and_plan_are_written_again(run_path: Path, selkd_json: Command) -> None:
    cache = run_path / "teacher_cache"
    before = contents(cache)
    (cache / "manifest.json").unlink()
    flip(cache / "plan.json", 60)
    assert selkd_json("cache", "verify", cache)[0] == 1
    assert selkd_json("cache", "verify", cache, "--repair")[0] == 0
    assert contents(cache) == before


def test_repair_removes_nothing_that_it_did_not_write(run_path: Path, selkd_json: Command) -> None:
    cache = run_path / "teacher_cache"
    (cache / "shard-00099.selkd").write_bytes(b"mine")
    code, answer = selkd_json("cache", "verify", cache, "--repair")
    assert code == 1
    assert answer["problems_left"] == answer["problems"]
    assert "shard-00099.selkd is no shard of this cache" in answer["problems"][0]
    assert (cache / "shard-00099.selkd").read_bytes() == b"mine"


def test_a_cache_outside_its_run_needs_its_recipe(run_path: Path, selkd_json: Command, tmp_path: Path) -> None:
    cache = tmp_path / "elsewhere"
    recipe = tmp_path / "toy.yaml"
    shared = ("--out", tmp_path / "shared", "--set", f"cache.path={cache}")
    assert selkd_json("cache", "build", recipe, *shared)[0] == 0
    before = contents(cache)
    flip(cache / "shard-00000.selkd", 900)
    code, answer = selkd_json("cache", "verify", cache, "--repair")
    assert code == 2
    assert "give --recipe RECIPE" in answer["error"]
    code, answer = selkd_json("cache", "verify", cache, "--repair", "--recipe", recipe, "--out", run_path)
    assert code == 2
    assert f"this recipe keeps its cache in {run_path / 'teacher_cache'}" in answer["error"]
    code, answer = selkd_json("cache", "verify", cache, "--repair", "--recipe", recipe, *shared)
    assert code == 0, answer
    assert contents(cache) == before


def test_rescoring_with_the_same_teacher_finds_the_same_draws(run_path: Path, selkd_json: Command) -> None:
    cache = run_path / "teacher_cache"
    code, answer = selkd_json("cache", "verify", cache, "--rescore", 5)
    assert code == 0, answer
    rescored = answer["rescored"]
    assert rescored["samples"] == 5
    assert rescored["identical_positions"] == rescored["positions"] > 100
    assert rescored["distance"] == 0
    everything = selkd_json("cache", "verify", cache, "--rescore", 10_000)[1]["rescored"]
    assert everything["samples"] == len(TeacherCache.open(cache))


def test_rescoring_finds_draws_that_are_not_the_teachers(
    run_path: Path, selkd_json: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The fingerprint is right and the content is not, as if the teacher had been run in another way."""
    from selkd import workspace

    load = workspace.load_model
    other = make_teacher(run_path.parent / "other", seed=9)

    source = workspace.locate(str(other), run_path)
    monkeypatch.setattr(workspace, "load_model", lambda _, *arguments: load(source, *arguments))
    code, answer = selkd_json("cache", "verify", run_path / "teacher_cache", "--rescore", 5)
    assert code == 1
    assert answer["problems"] == []
    assert not answer["rescored"]["agrees"]
    assert answer["rescored"]["distance"] > 0.2
    assert bytes.fromhex(answer["rescored"]["worst_sample"]) in TeacherCache.open(run_path / "teacher_cache")


def test_another_recipe_is_refused_by_name(run_path: Path, selkd_json: Command, tmp_path: Path) -> None:
    (tmp_path / "other.yaml").write_text(
        yaml.safe_dump(make_recipe(tmp_path, classes={"sampler": "rs_kd", "draws": 8}))
    )
    arguments = ("--recipe", tmp_path / "other.yaml", "--out", tmp_path / "new")
    keeps = ("--set", f"cache.path={run_path / 'teacher_cache'}")
    code, answer = selkd_json("cache", "verify", run_path / "teacher_cache", "--rescore", 2, *arguments, *keeps)
    assert code == 2
    assert "draws: stored 32, expected 8" in answer["error"]


def test_inspect_says_what_is_there(run_path: Path, selkd_json: Command, tmp_path: Path) -> None:
    folder = run_path / "teacher_cache"
    code, answer = selkd_json("cache", "inspect", folder, "--plots", tmp_path / "plots")
    assert code == 0, answer
    cache = TeacherCache.open(folder)
    rows = [cache.get(sample_id) for sample_id in cache.sample_ids()]
    classes = np.concatenate([each.row_lengths for each in rows])
    counts = np.concatenate([each.counts for each in rows])
    assert all((row_sums(each) == 32).all() for each in rows)
    assert answer["samples_read"] == len(rows)
    assert answer["classes_median"] == np.median(classes)
    assert answer["classes_max"] == classes.max()
    assert answer["drawn_once_share"] == pytest.approx((counts == 1).mean())
    assert answer["covered_mass_estimate"] == pytest.approx(1 - (counts == 1).sum() / (32 * len(classes)))
    assert answer["fixed_width_bytes_per_position"] == 96
    names = {Path(path).name for path in answer["plots"]}
    assert names == {"classes.svg", "bytes.svg", "counts.svg", "covered_mass.svg"}
    assert all("<svg" in Path(path).read_text() for path in answer["plots"])


def test_inspect_reads_as_many_samples_as_it_is_told(run_path: Path) -> None:
    cache = TeacherCache.open(run_path / "teacher_cache")
    found = contents_of(cache, 3)
    assert summary(found)["samples_read"] == found.samples == 3
    assert len(found.sample_bytes_per_position) == 3


def test_covered_mass_is_estimated() -> None:
    """Against the mass that draws of a known law cover; what is estimated is the mass that one draw fewer covers."""
    from selkd.cache.inspect import _singles
    from selkd.cache.rows import Rows

    rng = np.random.default_rng(0)
    p = rng.dirichlet(np.full(300, 0.2))
    drawn = [np.unique(rng.choice(300, 64, p=p), return_counts=True) for _ in range(2000)]
    rows = Rows(
        np.array([len(ids) for ids, _ in drawn], np.uint16),
        np.concatenate([ids for ids, _ in drawn]).astype(np.uint32),
        np.concatenate([counts for _, counts in drawn]).astype(np.uint16),
    )
    covered = np.mean([p[ids].sum() for ids, _ in drawn])
    assert covered - 1 / 64 < 1 - _singles(rows).mean() / 64 < covered
