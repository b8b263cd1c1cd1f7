"""Finding the checkpoint to resume from."""

import json
import re
from pathlib import Path


def last_whole_checkpoint(folder: Path) -> Path | None:
    """The latest checkpoint in ``folder`` that was written to its end, or None.

    The Trainer writes ``trainer_state.json`` last; a checkpoint without it, or with half of it, was interrupted.
    """
    found = {
        int(m[1]): path for path in folder.glob("checkpoint-*") if (m := re.fullmatch(r"checkpoint-(\d+)", path.name))
    }
    for _, path in sorted(found.items(), reverse=True):
        try:
            json.loads((path / "trainer_state.json").read_text(encoding="utf-8"))
        except (OSError, ValueError):
            continue
        return path
    return None
