"""Finding the checkpoint to resume from."""

import re
from pathlib import Path

from selkd.training.state import stored_schedule


def last_whole_checkpoint(folder: Path) -> Path | None:
    """The latest checkpoint in ``folder`` that was written to its end, or None.

    The first process writes ``trainer_state.json`` last; a checkpoint without it, or with half of it, was interrupted.
    It does not wait for the others' random states, so these are looked for, too.
    """
    found = {
        int(m[1]): path for path in folder.glob("checkpoint-*") if (m := re.fullmatch(r"checkpoint-(\d+)", path.name))
    }
    for _, path in sorted(found.items(), reverse=True):
        try:
            schedule = stored_schedule(path)
        except (OSError, ValueError):
            continue
        if schedule is None or _has_random_states(path, schedule["processes"]):
            return path
    return None


def _has_random_states(checkpoint: Path, processes: int) -> bool:
    """Whether every process left its random state; of a model saved alone (``save_only_model``) there is none."""
    if not any(checkpoint.glob("optimizer*")):
        return True
    names = ["rng_state.pth"] if processes == 1 else [f"rng_state_{rank}.pth" for rank in range(processes)]
    return all((checkpoint / name).is_file() for name in names)
