"""Peak memory since a moment, of this process and of its accelerator: what one stage of a run needed."""

import resource
import sys
from pathlib import Path

import torch

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
