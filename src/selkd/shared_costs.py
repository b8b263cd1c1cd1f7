"""What scores and caches that several runs share took to make, kept beside them, so that each run's report can tell."""

import json
from pathlib import Path

from selkd.run_directory import RunDirectory, write_whole

CACHE_COST = "cost.json"  # beside a cache's shards
Cost = dict[str, float]


def cost_of(seconds: float, teacher_tokens: int) -> Cost:
    return {"seconds": round(seconds, 3), "teacher_tokens": teacher_tokens}


def note_shared(run: RunDirectory, stage: str, cost: Cost | None) -> None:
    """Write down what a part that other runs may use took whoever made it; None: nobody knows."""
    run.record.setdefault("shared", {})[stage] = cost


def read_cost(path: Path) -> Cost | None:
    try:
        cost: Cost = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return cost


def add_cost(path: Path, cost: Cost) -> None:
    """A cache may be built in several goes."""
    earlier = read_cost(path) or {}
    write_whole(path, json.dumps({key: round(earlier.get(key, 0) + more, 3) for key, more in cost.items()}) + "\n")
