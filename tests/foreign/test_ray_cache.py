"""Whoever writes the shards of a cache, its bytes are the same."""

import importlib.util
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from tiny_run import make_recipe

from selkd.errors import InputError, RunError
from selkd.recipe.files import load_recipe
from selkd.recipe.part import parse_part
from selkd.recipe.recipe import Recipe
from selkd.run import shards
from selkd.run.pipeline import before_cache, cache_only, score_only
from selkd.run.shards import CacheShards
from selkd.teacher import build_cache

EXAMPLE = Path(__file__).parents[2] / "examples" / "ray_cache.py"


@pytest.fixture
def recipe(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(build_cache, "SHARD_TOKENS", 300)
    path = tmp_path / "toy.yaml"
    path.write_text(yaml.safe_dump(make_recipe(tmp_path)))
    return path


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.name != "cost.json"}


def test_shards_written_one_by_one_in_any_order_are_the_same_cache(recipe: Path, tmp_path: Path) -> None:
    loaded = load_recipe(recipe)
    with pytest.raises(InputError, match="not scored yet"):
        CacheShards(loaded, tmp_path / "one")
    score_only(loaded, tmp_path / "one")
    first, second = (CacheShards(loaded, tmp_path / "one") for _ in range(2))
    assert len(first.missing) > 3
    for number in reversed(first.missing):
        (first if number % 2 else second).write(number)
    cache_only(loaded, tmp_path / "one")
    cache_only(loaded, tmp_path / "two")
    assert contents(tmp_path / "one" / "teacher_cache") == contents(tmp_path / "two" / "teacher_cache")


def test_a_cache_that_scores_the_samples_is_written_shard_by_shard(recipe: Path, tmp_path: Path) -> None:
    """It holds the whole text, and its shards are there before any score."""
    samples = {"metric": "kl", "fraction": 0.3, "from_cache": True}
    loaded = parse_part(Recipe, yaml.safe_load(recipe.read_text()) | {"samples": samples})
    before_cache(loaded, tmp_path / "one")
    single = CacheShards(loaded, tmp_path / "one")
    assert len(single.missing) > 3
    assert not (tmp_path / "one" / "selection").exists()
    for number in single.missing:
        single.write(number)
    cache_only(loaded, tmp_path / "one")
    cache_only(loaded, tmp_path / "two")
    assert contents(tmp_path / "one" / "teacher_cache") == contents(tmp_path / "two" / "teacher_cache")


def test_of_a_larger_shared_cache_no_shard_is_missing(recipe: Path, tmp_path: Path) -> None:
    content = yaml.safe_load(recipe.read_text()) | {"cache": {"path": str(tmp_path / "shared")}}
    cache_only(parse_part(Recipe, content | {"samples": None}), tmp_path / "all")
    before, kept = contents(tmp_path / "shared"), parse_part(Recipe, content)
    before_cache(kept, tmp_path / "some")
    single = CacheShards(kept, tmp_path / "some")
    assert single.missing == []
    with pytest.raises(InputError, match="complete; no shard of it is missing"):
        single.write(0)
    cache_only(kept, tmp_path / "some")
    assert contents(tmp_path / "shared") == before


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"cache": {"path": "s3://bucket/cache"}}, "built in a local folder, and s3://bucket/cache is an address"),
        ({"cache": None}, "keeps its teacher live"),
        (
            {
                "teacher": {"model": "toy", "imported": True},
                "classes": {"sampler": "top_k", "draws": 8, "tail": True},
                "samples": None,
                "evaluation": {},
                "student": {"model": "student"},
            },
            "built from files alone",
        ),
    ],
)
def test_a_cache_that_is_not_built_here_is_refused(
    recipe: Path, tmp_path: Path, changes: dict[str, object], message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    loaded = parse_part(Recipe, yaml.safe_load(recipe.read_text()) | changes)
    with pytest.raises(InputError, match=message):
        CacheShards(loaded, tmp_path / "run")
    assert not (tmp_path / "s3:").exists()
    assert not (tmp_path / "run").exists()


class Closing:
    """A teacher behind a server, whose connections are closed by its first failure."""

    def rows(self, _: object) -> list[object]:
        raise RunError("teacher.server: no whole answer")


def test_after_a_failure_the_next_shard_has_a_new_teacher(
    recipe: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    loaded, row_source, made = load_recipe(recipe), shards.row_source, []

    def source(work: object) -> object:
        made.append(Closing() if not made else row_source(work))
        return made[-1]

    monkeypatch.setattr(shards, "row_source", source)
    before_cache(loaded, tmp_path / "run")
    single = CacheShards(loaded, tmp_path / "run")
    with pytest.raises(RunError, match="no whole answer"):
        single.write(single.missing[0])
    for number in single.missing[:2]:
        single.write(number)
    assert len(made) == 2
    assert len(CacheShards(loaded, tmp_path / "run").missing) == len(single.missing) - 2


def test_rays_actors_build_the_same_cache(recipe: Path, tmp_path: Path) -> None:
    if importlib.util.find_spec("ray") is None:
        pytest.skip("Ray is not installed")
    code = f"""
import runpy, sys, ray
from selkd.teacher import build_cache
build_cache.SHARD_TOKENS = 300
sys.argv = ["ray_cache.py"]
example = runpy.run_path({str(EXAMPLE)!r})
ray.init(num_cpus=2, include_dashboard=False, logging_level="error")

class Small(example["TeacherActor"]):
    def __init__(self, *given):
        from selkd.teacher import build_cache
        build_cache.SHARD_TOKENS = 300
        super().__init__(*given)

example["main"].__globals__["TeacherActor"] = Small
print(example["main"]({str(recipe)!r}, {str(tmp_path / "ray")!r}, 2))
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    cache_only(load_recipe(recipe), tmp_path / "alone")
    assert contents(tmp_path / "ray" / "teacher_cache") == contents(tmp_path / "alone" / "teacher_cache")
