"""Measures seconds and bytes of steps in this process, and bytes of one step in a process of its own."""

import json
import resource
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Mapping
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import torch

from selkd.bench.progress import Progress
from selkd.errors import RunError
from selkd.recipe.recipe import Recipe

_STATUS, _CLEAR = (Path(f"/proc/self/{name}") for name in ("status", "clear_refs"))
SAMPLE_SECONDS, TRACED_STEPS = 0.004, 3  # a trace reads memory so often, through so many calls
Step = Callable[[], None]


@dataclass(frozen=True)
class Timing:
    """Seconds of each repeat of one variant, and the processor's seconds over all threads of this process."""

    seconds: tuple[float, ...]
    cpu_seconds: tuple[float, ...]

    @property
    def median(self) -> float:
        return statistics.median(self.seconds)

    @property
    def cpu_median(self) -> float:
        """The processor's median: with one thread, ``median`` on an idle machine. Waiting threads count as busy."""
        return statistics.median(self.cpu_seconds)


def interleaved(
    steps: Mapping[str, Step], repeats: int, device: torch.device, progress: Progress | None = None
) -> dict[str, Timing]:
    """Time all steps in turns, ``repeats`` times, after one turn to warm up.

    With ``progress`` it may be stopped: steps that were not measured are left out then, and of those that were measured
    once the warm-up is kept.
    """
    timings: dict[str, list[tuple[float, float]]] = {name: [] for name in steps}
    with progress.until_stopped() if progress is not None else nullcontext():
        for _ in range(repeats + 1):
            for name, step in steps.items():
                busy = time.process_time()
                seconds = seconds_of(step, device)
                timings[name].append((seconds, time.process_time() - busy))
                if progress is not None:
                    progress.told(name, f"{seconds:.3f} s")
    return {name: Timing(*zip(*(found[1:] or found), strict=True)) for name, found in timings.items() if found}


def seconds_of(step: Step, device: torch.device) -> float:
    """Time one call: on a GPU by CUDA's events, once all queued work has finished, else by the clock."""
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
    """The most memory in use during ``repeats`` calls, after one to warm up, in bytes.

    On a GPU these are its allocations (``max_memory_allocated``). On a CPU it is the process's resident memory: Linux
    counts the peak of these calls; elsewhere it is the peak since the process began.
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
    """Memory in use during ``TRACED_STEPS`` calls, after one to warm up.

    Returns:
        ``seconds`` and ``bytes`` of each reading, and ``step_seconds``, when each call began and the last one ended.
    """
    step()
    readings: dict[str, list[float]] = {"seconds": [], "bytes": [], "step_seconds": []}
    finished = threading.Event()
    started = time.perf_counter()

    def read() -> None:
        while not finished.wait(SAMPLE_SECONDS):
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
        finished.set()
        reader.join()
    return readings


MEMORY_JOBS: dict[str, Callable[[Step, torch.device], Any]] = {"peak": peak_bytes, "trace": bytes_over_time}


def _in_use(device: torch.device) -> int:
    if device.type == "cuda":
        return int(torch.cuda.memory_allocated(device))
    return int(psutil.Process().memory_info().rss)


def in_own_process(job: str, variant: str, recipe: Recipe) -> Any:
    """Run ``MEMORY_JOBS[job]`` on the step of ``variant`` in a fresh process, and return its answer.

    Raises:
        RunError: that process failed; the message has the end of its error output.
    """
    command = [sys.executable, "-m", "selkd.bench", job, variant]
    process = subprocess.run(command, input=json.dumps(recipe.resolved()), capture_output=True, text=True, check=False)
    if process.returncode:
        reason = "\n".join(process.stderr.strip().splitlines()[-3:])
        raise RunError(
            f"bench: the process that measures the memory of {variant} ended with {process.returncode}: {reason}"
        )
    return json.loads(process.stdout.splitlines()[-1])
