"""What the stages of a run write into its record: seconds, peak memory, teacher tokens, the cost of shared parts."""

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
COUNTS = ("samples", "samples_kept", "positions_valid", "positions_selected", "teacher_tokens")
_PROC = Path("/proc/self")


class PeakMemory:
    """The largest memory of a run in its record, of the whole run and of each stage, in bytes.

    Made when a stage begins: the peak of what went before is noted, and the system begins a new one if it can.
    """

    def __init__(self, run: RunDirectory) -> None:
        self._note(run)
        if torch.cuda.is_available():
            torch.cuda.reset_peak_memory_stats()
        try:
            (_PROC / "clear_refs").write_text("5")  # proc(5): resets the peak of the resident set
            self._is_new = True
        except OSError:  # the stage's can't be told from the whole run's
            self._is_new = False

    def note(self, run: RunDirectory, stage: str) -> None:
        """Note the peak of the stage that ends."""
        by_stage = self._note(run).setdefault("by_stage", {}).setdefault(stage, dict.fromkeys(PLACES))
        if self._is_new:
            _raise_to(by_stage, _peaks())

    @staticmethod
    def _note(run: RunDirectory) -> dict[str, Any]:
        whole: dict[str, Any] = run.record.setdefault("peak_memory_bytes", dict.fromkeys(PLACES))
        return _raise_to(whole, _peaks())


def _peaks() -> dict[str, int | None]:
    """The process's largest resident set since the last reset, and what tensors held on the accelerator."""
    unit = 1 if sys.platform == "darwin" else 1024
    return {
        "process": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit,
        "accelerator": torch.cuda.max_memory_allocated() if torch.cuda.is_available() else None,
    }


def _raise_to(noted: dict[str, Any], peaks: dict[str, int | None]) -> dict[str, Any]:
    for place, value in peaks.items():
        if value is not None:
            noted[place] = max(noted[place] or 0, value)
    return noted


@contextmanager
def timed(run: RunDirectory, stage: str) -> Iterator[None]:
    """Record the seconds and the peak of memory of the stage inside."""
    peaks, started = PeakMemory(run), time.perf_counter()
    yield
    add_seconds(run, stage, time.perf_counter() - started, peaks)


def add_seconds(run: RunDirectory, stage: str, seconds: float, peaks: PeakMemory) -> None:
    """Add to a stage's time in the record, and keep the total and the peaks of memory up to date."""
    times = run.record.setdefault("seconds", dict.fromkeys(("prepare", "score", "cache", "train", "evaluate", "total")))
    times[stage] = round((times[stage] or 0.0) + seconds, 3)
    times["total"] = round(sum(value or 0.0 for name, value in times.items() if name != "total"), 3)
    peaks.note(run, stage)


def count_teacher_tokens(work: Workspace, run: RunDirectory, **tokens: int) -> None:
    """Record the tokens that the teacher ran on, by stage; a stage that ran again replaces its count."""
    by_stage = run.record.setdefault("teacher_tokens", {})
    by_stage.update(work.teacher_tokens | tokens)
    run.record["counts"]["teacher_tokens"] = sum(by_stage.values())


CACHE_COST = "cost.json"  # beside a cache's shards
Cost = dict[str, float]


def cost_of(seconds: float, teacher_tokens: int) -> Cost:
    return {"seconds": round(seconds, 3), "teacher_tokens": teacher_tokens}


def note_shared(run: RunDirectory, stage: str, cost: Cost | None) -> None:
    """Record the cost of building a part that other runs may share; None if unknown."""
    run.record.setdefault("shared", {})[stage] = cost


def read_cost(path: Path) -> Cost | None:
    """The cost in a file; None where there is no such file, or it is damaged."""
    try:
        cost: Cost = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return cost


def add_cost(path: Path, cost: Cost) -> None:
    """Add to the cost in a file, for a cache that is built in several goes."""
    earlier = read_cost(path) or {}
    write_whole(path, json.dumps({key: round(earlier.get(key, 0) + more, 3) for key, more in cost.items()}) + "\n")


def size(model: PreTrainedModel) -> dict[str, int]:
    """How many parameters and layers a model has, for the record."""
    config = model.config.get_text_config(decoder=True)
    return {"parameters": n_parameters(model), "layers": int(config.num_hidden_layers)}


def environment(workspace: Workspace) -> dict[str, Any]:
    """The versions and the machine, for the record."""
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
