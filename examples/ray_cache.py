"""A teacher cache built by Ray: actors hold the teacher, on whichever machines, and write one shard after the other.

    python examples/ray_cache.py RECIPE OUT [WORKERS]

The machines see one file system. The cache is byte for byte the one that ``selkd cache build RECIPE --out OUT`` builds,
whatever the number of workers, and a second start continues. Ray is no part of selkd: ``pip install ray``.
"""

import sys
from pathlib import Path
from typing import Any

import ray

from selkd.recipe.files import load_recipe
from selkd.run.pipeline import before_cache, cache_only
from selkd.run.shards import CacheShards


class TeacherActor:
    """A process of Ray's with a teacher of its own."""

    def __init__(self, recipe: str, out: str) -> None:
        self.shards = CacheShards(load_recipe(recipe), Path(out))

    def __call__(self, batch: dict[str, Any]) -> dict[str, Any]:
        for number in batch["shard"]:
            self.shards.write(int(number))
        return batch


def main(recipe: str, out: str, workers: int = 2, gpus: float = 0) -> Path:
    loaded = load_recipe(recipe)
    before_cache(loaded, Path(out))
    missing = CacheShards(loaded, Path(out)).missing
    if missing:
        shards = ray.data.from_items([{"shard": number} for number in missing], override_num_blocks=len(missing))
        pool = ray.data.ActorPoolStrategy(size=min(workers, len(missing)))
        shards.map_batches(
            TeacherActor, fn_constructor_args=(recipe, out), compute=pool, batch_size=1, num_gpus=gpus
        ).materialize()
    return cache_only(loaded, Path(out)).path / "teacher_cache"  # checks every shard, and completes the cache


if __name__ == "__main__":
    print(main(*sys.argv[1:3], *map(int, sys.argv[3:4])))
