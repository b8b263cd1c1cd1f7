"""Files that are either whole or not there: written under a temporary name, synced, renamed."""

import fcntl
import os
import re
import secrets
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

from selkd.errors import RunError

_TEMPORARY = re.compile(r"(plan\.json|manifest\.json|index\.selkd|shard-\d{5,}\.selkd)\.[0-9a-f]{16}\.tmp")


def is_temporary(name: str) -> bool:
    """Whether a file of this name is a write of ours, under way or interrupted."""
    return _TEMPORARY.fullmatch(name) is not None


@contextmanager
def replacing(path: Path) -> Iterator[BinaryIO]:
    """A file to write that takes ``path``'s place once the block ends, and leaves nothing behind if the block raises.

    Raises:
        RunError: the operating system refused (disk full, no permission, …).
    """
    try:
        with _new_temporary(path) as file:
            temporary = Path(file.name)
            try:
                yield file
                file.flush()
                os.fsync(file.fileno())
                temporary.replace(path)
                _sync_folder(path.parent)
            except BaseException:
                temporary.unlink(missing_ok=True)
                raise
    except OSError as error:
        raise RunError(
            f"{path.name} in {path.parent} could not be finished: {error}. Nothing finished before it was touched; "
            "remove the cause and run again to continue"
        ) from error


def remove_temporaries(folder: Path) -> None:
    """Removes the remains of interrupted writes of ours, not the files that another process is writing.

    Raises:
        RunError: the operating system refuses.
    """
    try:
        for path in folder.iterdir():
            if is_temporary(path.name):
                _remove_unless_written(path)
    except OSError as error:
        raise RunError(f"the remains of an interrupted write in {folder} can't be removed: {error}") from error


def _new_temporary(path: Path) -> BinaryIO:
    """A new locked file beside ``path``; the lock ends with the process, however it ends, and tells remains apart.

    A name of its own for each attempt: two processes that write the same file do not mix their bytes.
    """
    while True:
        temporary = path.with_name(f"{path.name}.{secrets.token_hex(8)}.tmp")
        file = temporary.open("xb")
        fcntl.flock(file, fcntl.LOCK_EX)
        if temporary.exists():
            return file
        file.close()  # removed as a remnant in the moment between its making and its lock


def _remove_unless_written(path: Path) -> None:
    try:
        with path.open("rb") as file:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            path.unlink(missing_ok=True)
    except (BlockingIOError, FileNotFoundError):  # being written, or just finished
        return


def _sync_folder(folder: Path) -> None:
    """Makes a rename in the folder last; without it a power cut may bring the old name back."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
