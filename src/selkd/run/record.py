"""What a run's record tells of its stages: seconds, peaks of memory, teacher tokens, the cost of shared parts."""

import json
import platform
import resource
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path
from typing import Any

import psutil
import torch
from transformers import PreTrainedModel

from selkd.files import write_whole
from selkd.models.loading import n_parameters
from selkd.run.directory import RunDirectory
from selkd.run.workspace import Workspace

PLACES = ("process", "accelerator")
_PROC = Path("/proc/self")


def restart_peaks() -> bool:
    """Begin anew to look for the peaks; False where this system can't, so that what follows is the whole process's."""
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
    try:
        (_PROC / "clear_refs").write_text("5")  # proc(5): resets the peak of the resident set
    except OSError:
        return False
    return True


def peaks() -> dict[str, int | None]:
    """Bytes since ``restart_peaks``: the process's largest resident set, and what tensors held on the accelerator."""
    unit = 1 if sys.platform == "darwin" else 1024
    return {
        "process": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit,
        "accelerator": torch.cuda.max_memory_allocated() if torch.cuda.is_available() else None,
    }


@contextmanager
def timed(run: RunDirectory, stage: str) -> Iterator[None]:
    """Add a stage's seconds to the record; the peak of memory, too."""
    is_alone, started = begin_peaks(run), time.perf_counter()
    yield
    add_seconds(run, stage, time.perf_counter() - started, is_alone)


def add_seconds(run: RunDirectory, stage: str, seconds: float, is_alone: bool) -> None:
    """Add to a stage's time in the record, and keep total and peak memory up to date.

    ``is_alone``: the peaks were begun anew for this stage, so they are its own.
    """
    times = run.record.setdefault("seconds", dict.fromkeys(("prepare", "score", "cache", "train", "evaluate", "total")))
    times[stage] = round((times[stage] or 0.0) + seconds, 3)
    times["total"] = round(sum(value or 0.0 for name, value in times.items() if name != "total"), 3)
    by_stage = note_peaks(run).setdefault("by_stage", {}).setdefault(stage, dict.fromkeys(PLACES))
    for place, value in peaks().items():
        if value is not None and is_alone:
            by_stage[place] = max(by_stage[place] or 0, value)


def begin_peaks(run: RunDirectory) -> bool:
    """Begin anew to look for a stage's peak of memory; False where the system can't tell it from the whole run's."""
    note_peaks(run)
    return restart_peaks()


def note_peaks(run: RunDirectory) -> dict[str, Any]:
    """The record's peaks of the whole run, with what the present one adds."""
    whole: dict[str, Any] = run.record.setdefault("peak_memory_bytes", dict.fromkeys(PLACES))
    for place, value in peaks().items():
        if value is not None:
            whole[place] = max(whole[place] or 0, value)
    return whole


COUNTS = ("samples", "samples_kept", "positions_valid", "positions_selected", "teacher_tokens")


def count_teacher_tokens(work: Workspace, run: RunDirectory, **tokens: int) -> None:
    """Write down what the teacher ran on, by stage; a stage that ran again replaces its count."""
    by_stage = run.record.setdefault("teacher_tokens", {})
    by_stage.update(work.teacher_tokens | tokens)
    run.record["counts"]["teacher_tokens"] = sum(by_stage.values())


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


def size(model: PreTrainedModel) -> dict[str, int]:
    """Parameters and layers, for the record."""
    config = model.config.get_text_config(decoder=True)
    return {"parameters": n_parameters(model), "layers": int(config.num_hidden_layers)}


def environment(workspace: Workspace) -> dict[str, Any]:
    """Versions and machine, for the record."""
    names = ("selkd", "torch", "transformers", "accelerate", "datasets", "numpy")
    return {
        **{name: version(name) for name in names},
        "python": platform.python_version(),
        "platform": platform.platform(),
        "processor": _processor(),
        "cores": psutil.cpu_count(logical=True),
        "device": str(workspace.device),
        "precision": f"student {workspace.dtype} over float32 weights, teacher {workspace.teacher_precision}".replace(
            "torch.", ""
        ),
        "world_size": workspace.state.num_processes,
    }


def _processor() -> str:
    if torch.cuda.is_available():
        return torch.cuda.get_device_name()
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        for line in cpuinfo.read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor()
