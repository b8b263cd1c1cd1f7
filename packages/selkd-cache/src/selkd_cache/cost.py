"""``cost.json``: what building a cache took. A cache may have one; no reader needs it."""

import json
from pathlib import Path
from typing import Any, Final

from selkd_cache.files import replacing

COST: Final = "cost.json"
Cost = dict[str, float]


def read_cost(folder: Path) -> Cost | None:
    """``seconds`` and ``teacher_tokens`` that building the cache took; None if unknown: no file, or a damaged one."""
    try:
        cost: Any = json.loads((folder / COST).read_bytes())
    except (OSError, ValueError, RecursionError):
        return None
    keys = {"seconds", "teacher_tokens"}
    is_cost = isinstance(cost, dict) and cost.keys() == keys and all(type(cost[key]) in (int, float) for key in keys)
    return cost if is_cost else None


def add_cost(folder: Path, cost: Cost) -> None:
    """Write a cost, its seconds added to those that are known: a cache may be built in several runs, and in steps.

    Raises:
        RunError: the disk refused.
    """
    seconds = (read_cost(folder) or {}).get("seconds", 0) + cost["seconds"]
    with replacing(folder / COST) as file:
        file.write(json.dumps(cost | {"seconds": round(seconds, 3)}).encode() + b"\n")
