"""The record of a run: seconds, peak memory, teacher tokens, the cost of shared parts, the machine."""

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

from selkd.models.loading import n_parameters
from selkd.run.directory import RunDirectory
from selkd.run.workspace import Workspace
from selkd_cache.cost import Cost

PLACES = ("process", "accelerator")
COUNTS = ("samples", "samples_kept", "positions_valid", "positions_selected", "teacher_tokens")
_PROC = Path("/proc/self")


class PeakMemory:
    """Records the peak memory in bytes, of the whole run and of each stage.

    It is made when a stage begins: it records the peak so far, and resets the system's peak where that is possible.
    """

    def __init__(self, run: RunDirectory) -> None:
        self._note(run)
        if torch.cuda.is_available():
            torch.cuda.reset_peak_memory_stats()
        try:
            (_PROC / "clear_refs").write_text("5")  # resets the peak of the resident set, see proc(5)
            self._is_new = True
        except OSError:  # the peak of the stage stays unknown
            self._is_new = False

    def note(self, run: RunDirectory, stage: str) -> None:
        """Record the peak of the stage that ends."""
        by_stage = self._note(run).setdefault("by_stage", {}).setdefault(stage, dict.fromkeys(PLACES))
        if self._is_new:
            _raise_to(by_stage, _peaks())

    @staticmethod
    def _note(run: RunDirectory) -> dict[str, Any]:
        run_peaks: dict[str, Any] = run.record.setdefault("peak_memory_bytes", dict.fromkeys(PLACES))
        return _raise_to(run_peaks, _peaks())


def _peaks() -> dict[str, int | None]:
    """The process's largest resident set and the accelerator's largest memory of tensors, since the last reset."""
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
    """Record the seconds and the peak memory of the block, which runs a stage; a closed record stays as it is."""
    if run.is_finished:
        yield
        return
    peaks, started = PeakMemory(run), time.perf_counter()
    yield
    if run.is_left_as_it_is:
        run.leave_as_it_is()
    else:
        add_seconds(run, stage, time.perf_counter() - started, peaks)


def add_seconds(run: RunDirectory, stage: str, seconds: float, peaks: PeakMemory) -> None:
    """Add to a stage's time in the record, and update the total time and the peak memory."""
    times = run.record.setdefault("seconds", dict.fromkeys(("prepare", "score", "cache", "train", "evaluate", "total")))
    times[stage] = round((times[stage] or 0.0) + seconds, 3)
    times["total"] = round(sum(value or 0.0 for name, value in times.items() if name != "total"), 3)
    peaks.note(run, stage)


def count_teacher_tokens(run: RunDirectory, **tokens: int) -> None:
    """Record by stage the tokens that the teacher ran on; a stage that runs again replaces its count."""
    if run.is_finished:
        return
    by_stage = run.record.setdefault("teacher_tokens", {})
    by_stage.update(tokens)
    run.record["counts"]["teacher_tokens"] = sum(by_stage.values())


def cost_of(seconds: float, teacher_tokens: int) -> Cost:
    return {"seconds": round(seconds, 3), "teacher_tokens": teacher_tokens}


def note_shared(run: RunDirectory, stage: str, cost: Cost | None) -> None:
    """Record the cost of building a part that other runs may share; None if unknown."""
    run.record.setdefault("shared", {})[stage] = cost


def size(model: PreTrainedModel) -> dict[str, int]:
    """The number of parameters and layers of a model."""
    config = model.config.get_text_config(decoder=True)
    return {"parameters": n_parameters(model), "layers": int(config.num_hidden_layers)}


def environment(workspace: Workspace) -> dict[str, Any]:
    """The versions of packages, and the machine."""
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
