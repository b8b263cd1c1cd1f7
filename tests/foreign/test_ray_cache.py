"""Whoever writes the shards of a cache, its bytes are the same."""

import importlib.util
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from tiny_run import make_recipe

from selkd.errors import InputError
from selkd.recipe.files import load_recipe
from selkd.run.pipeline import cache_only, score_only
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
