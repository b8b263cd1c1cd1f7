"""Checkpoints that can be believed: sealed by the digests of their files, and checked against these before resuming."""

import json
import logging
import shutil
from collections.abc import Iterator
from pathlib import Path

from selkd.errors import RunError
from selkd.files import file_digest, is_temporary, saving, settle, write_whole
from selkd.training.checkpoints import random_states, stored_schedule

DIGESTS = "digests.json"
"""File of a checkpoint: each other file's path in it -> ``files.file_digest``. Written last: it makes it complete."""
_BEING_WRITTEN = "checkpoint-is-incomplete.txt"  # the Trainer's mark while it writes a checkpoint on a signal
_MISSING = (FileNotFoundError, NotADirectoryError, IsADirectoryError)
_logger = logging.getLogger(__name__)


def seal(checkpoint: Path) -> None:
    """Make a checkpoint's files outlast a power cut, and then say what they are in ``digests.json``.

    Raises:
        RunError: the operating system refused (disk full, …).
    """
    with saving(checkpoint):
        settle(checkpoint)
    digests = {}
    for path in sorted(checkpoint.rglob("*")):
        if path.is_file() and not is_temporary(path.name) and path.name not in (DIGESTS, _BEING_WRITTEN):
            digests[path.relative_to(checkpoint).as_posix()] = file_digest(path)
    write_whole(checkpoint / DIGESTS, json.dumps(digests, indent=1) + "\n")


def unseal(checkpoint: Path) -> None:
    """Before a checkpoint is written again, or removed: it is no complete one any more."""
    (checkpoint / DIGESTS).unlink(missing_ok=True)


def fault_of(checkpoint: Path) -> str | None:
    """What speaks against resuming from a checkpoint, in words that follow its name; None if it is as it was written.

    One from before there were digests is believed if the main process wrote ``trainer_state.json``, its last file,
    to the end, and every process its random state.
    """
    try:
        return _fault_of(checkpoint)
    except OSError as error:
        return f"it can't be read ({error})"


def _fault_of(checkpoint: Path) -> str | None:
    """As ``fault_of``. Raises OSError where the system refuses to read a file, which says nothing of what it holds."""
    return _fault_of_sealed(checkpoint) if (checkpoint / DIGESTS).exists() else _fault_of_unsealed(checkpoint)


def _fault_of_sealed(checkpoint: Path) -> str | None:
    name = DIGESTS
    try:
        for name, digest in _digests(checkpoint).items():
            if file_digest(checkpoint / name) != digest:
                return f"{name} is not as it was written"
    except _MISSING as error:
        return f"{name} can't be read ({error.strerror})"
    except ValueError:
        return f"{DIGESTS} is not as it was written"
    return None


def _digests(checkpoint: Path) -> dict[str, str]:
    digests = json.loads((checkpoint / DIGESTS).read_text(encoding="utf-8"))
    if not isinstance(digests, dict):
        raise ValueError("expected a mapping of names to digests")
    return digests


def _fault_of_unsealed(checkpoint: Path) -> str | None:
    try:
        schedule = stored_schedule(checkpoint)
    except (*_MISSING, ValueError):
        return "it was not written to its end, as trainer_state.json is not there or cut off"
    if schedule is None:
        return None
    if schedule.get("is_sealed"):
        return f"it was not written to its end, as {DIGESTS} is not there"
    # Without the optimiser it is a model saved alone (``save_only_model``), which needs no random state.
    names = random_states(schedule["processes"]) if any(checkpoint.glob("optimizer*")) else []
    missing = [name for name in names if not (checkpoint / name).is_file()]
    return f"it was not written to its end, as {missing[0]} is not there" if missing else None


def last_complete_checkpoint(folder: Path) -> Path | None:
    """The latest checkpoint in ``folder`` without a fault, or None. Those passed over are told in the log.

    Raises:
        RunError: the system refuses to read one. It may be whole, and a training without it would replace it.
    """
    passed_over = []
    found = None
    for path in reversed(checkpoints_in(folder)):
        try:
            fault = _fault_of(path)
        except OSError as error:
            raise RunError(
                f"{path} can't be read ({error}). Make it readable, or move it away to go on without it; nothing was "
                "changed."
            ) from None
        if fault is None:
            found = path
            break
        passed_over.append((path, fault))
    instead = "the training begins anew, as there is none before it" if found is None else f"{found.name} is used"
    for path, fault in passed_over:
        _logger.warning("%s is damaged or incomplete: %s. In its place %s; nothing was deleted.", path, fault, instead)
    return found


def rotate(newest: Path, limit: int | None, best: str | None) -> None:
    """Remove the oldest checkpoints beside ``newest`` until ``limit`` are left, but neither it nor ``best``.

    A checkpoint's age is its step, whatever a clock said. Those of later steps are of a past that was given up: they
    were damaged, or an earlier one was asked for, so they go first.
    """
    if limit is None or limit <= 0:
        return
    checkpoints = checkpoints_in(newest.parent)
    place = checkpoints.index(newest)
    oldest_first = [*checkpoints[place + 1 :], *checkpoints[:place]]
    removable = [path for path in oldest_first if best is None or path != Path(best)]
    for path in removable[: max(0, len(checkpoints) - limit)]:
        unseal(path)
        shutil.rmtree(path, ignore_errors=True)  # what can't be removed is no reason to end a training


def checkpoints_in(folder: Path) -> list[Path]:
    """The folders that are named like checkpoints, in the order of their steps."""

    def numbered() -> Iterator[tuple[int, Path]]:
        for path in folder.glob("checkpoint-*"):
            step = path.name.removeprefix("checkpoint-")
            if step.isascii() and step.isdigit() and path.is_dir():
                yield int(step), path

    return [path for _, path in sorted(numbered())]
