"""Seconds and bytes of steps in this process, and bytes of one step in a process of its own."""

import json
import resource
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import torch

from selkd.errors import RunError
from selkd.recipe.recipe import Recipe

_STATUS, _CLEAR = (Path(f"/proc/self/{name}") for name in ("status", "clear_refs"))
SAMPLE_SECONDS, TRACED_STEPS = 0.004, 3  # of a trace: between two readings; calls
Step = Callable[[], None]


@dataclass(frozen=True)
class Timing:
    """Seconds of each repeat of one variant, and those that the processor spent on it: all threads of this process."""

    seconds: tuple[float, ...]
    cpu_seconds: tuple[float, ...]

    @property
    def median(self) -> float:
        return statistics.median(self.seconds)

    @property
    def cpu_median(self) -> float:
        """With one thread it is what ``median`` would be on an idle machine; waiting threads count as busy."""
        return statistics.median(self.cpu_seconds)


def interleaved(steps: Mapping[str, Step], repeats: int, device: torch.device) -> dict[str, Timing]:
    """Seconds of every step, ``repeats`` times in turns, after a turn to warm up."""
    timings: dict[str, list[tuple[float, float]]] = {name: [] for name in steps}
    for repeat in range(repeats + 1):
        for name, step in steps.items():
            busy = time.process_time()
            seconds = seconds_of(step, device)
            if repeat:
                timings[name].append((seconds, time.process_time() - busy))
    return {name: Timing(*zip(*both, strict=True)) for name, both in timings.items()}


def seconds_of(step: Step, device: torch.device) -> float:
    """Seconds of one call: by CUDA's events on a GPU, else by the clock, everything queued having finished."""
    if device.type == "cuda":
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        torch.cuda.synchronize(device)
        begin.record()
        step()
        end.record()
        torch.cuda.synchronize(device)
        return float(begin.elapsed_time(end)) / 1000
    started = time.perf_counter()
    step()
    return time.perf_counter() - started


def peak_bytes(step: Step, device: torch.device, repeats: int = 2) -> int:
    """The most memory in use during ``repeats`` calls, after one to warm up.

    A GPU's own allocations (``max_memory_allocated``); on a CPU the process's resident memory, from Linux's account
    of the peak, which is set back before, or, elsewhere, the peak of its whole life.
    """
    step()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
    elif _CLEAR.exists():
        _CLEAR.write_text("5")
    for _ in range(repeats):
        step()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        return int(torch.cuda.max_memory_allocated(device))
    if _CLEAR.exists():
        return 1024 * int(_STATUS.read_text().partition("VmHWM:")[2].split()[0])
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def bytes_over_time(step: Step, device: torch.device) -> dict[str, list[float]]:
    """Memory in use through some calls, after one to warm up: ``seconds`` and ``bytes`` of each reading, and
    ``step_seconds``, when each call began and the last one ended."""
    step()
    readings: dict[str, list[float]] = {"seconds": [], "bytes": [], "step_seconds": []}
    done = threading.Event()
    started = time.perf_counter()

    def read() -> None:
        while not done.wait(SAMPLE_SECONDS):
            readings["bytes"].append(_in_use(device))
            readings["seconds"].append(time.perf_counter() - started)

    reader = threading.Thread(target=read)
    reader.start()
    try:
        for _ in range(TRACED_STEPS):
            readings["step_seconds"].append(time.perf_counter() - started)
            step()
            if device.type == "cuda":
                torch.cuda.synchronize(device)
        readings["step_seconds"].append(time.perf_counter() - started)
    finally:
        done.set()
        reader.join()
    return readings


MEMORY_JOBS: dict[str, Callable[[Step, torch.device], Any]] = {"peak": peak_bytes, "trace": bytes_over_time}


def _in_use(device: torch.device) -> int:
    if device.type == "cuda":
        return int(torch.cuda.memory_allocated(device))
    return int(psutil.Process().memory_info().rss)


def in_own_process(job: str, variant: str, recipe: Recipe) -> Any:
    """What ``MEMORY_JOBS[job]`` answers about the step of ``variant`` in a fresh process.

    Raises:
        RunError: that process failed; the end of what it said is told.
    """
    command = [sys.executable, "-m", "selkd.bench", job, variant]
    done = subprocess.run(command, input=json.dumps(recipe.resolved()), capture_output=True, text=True, check=False)
    if done.returncode:
        said = "\n".join(done.stderr.strip().splitlines()[-3:])
        raise RunError(f"bench: the process that measures the memory of {variant} ended with {done.returncode}: {said}")
    return json.loads(done.stdout.splitlines()[-1])
