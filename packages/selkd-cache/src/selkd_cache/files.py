"""Files that are either whole or not there: written under a temporary name, locked meanwhile, synced, renamed."""

import errno
import fcntl
import hashlib
import os
import re
import secrets
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import BinaryIO

import xxhash

from selkd_cache.errors import RunError

# What file systems without locks, or without syncing of folders, answer.
NO_LOCKS = (errno.ENOSYS, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOLCK)
_NO_SYNC = (errno.EINVAL, errno.ENOTSUP, errno.EOPNOTSUPP)
_TEMPORARY = re.compile(r".+\.[0-9a-f]{16}\.tmp")


def is_temporary(name: str) -> bool:
    """Whether a file of this name is a write of ours, under way or interrupted."""
    return _TEMPORARY.fullmatch(name) is not None


def file_digest(path: Path) -> str:
    """xxh3_128 (32 hex digits) of a file's content, which is read a part at a time. Raises OSError if it can't be."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, xxhash.xxh3_128).hexdigest()


@contextmanager
def replacing(path: Path, stays: Callable[[], bool] | None = None) -> Iterator[BinaryIO]:
    """A file to write that takes ``path``'s place once the block ends, and leaves nothing behind if the block raises.

    Args:
        stays: asked where a file has the name by then: whether that one stays, and the new one goes.

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
                if stays is None or not _is_named(temporary, path, stays):
                    temporary.replace(path)
                sync(path.parent)
            except BaseException:
                temporary.unlink(missing_ok=True)
                raise
    except OSError as error:
        raise RunError(
            f"{path.name} in {path.parent} could not be finished: {error}. Nothing finished before it was touched; "
            "remove the cause and run again to continue"
        ) from error


def remove_temporary_files(folder: Path) -> None:
    """Removes the files that interrupted writes of ours left, not those that another process is writing.

    Where the file system has no locks, the two can't be told apart: remains stay. They do no harm.
    """
    with suppress(OSError):  # a folder that can't be listed keeps them
        for path in folder.iterdir():
            if is_temporary(path.name) and not path.is_dir():
                with suppress(OSError):  # being written, just finished, or not ours to remove
                    _remove_unless_written(path)


def sync(path: Path) -> None:
    """Make a file's content, or a rename in a folder, outlast a power cut, where the file system can."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno not in _NO_SYNC:
            raise
    finally:
        os.close(descriptor)


def _is_named(temporary: Path, path: Path, stays: Callable[[], bool]) -> bool:
    """Gives a file the name unless another has it that ``stays``. Answers False where it is to take that one's place.

    A link, unlike a rename, is refused in the moment in which another has the name.
    """
    try:
        os.link(temporary, path)
    except OSError:  # another file has the name, or there are no links here
        if not (path.exists() and stays()):
            return False
    temporary.unlink()
    return True


def _new_temporary(path: Path) -> BinaryIO:
    """A new locked file beside ``path``; the lock ends with the process, however it ends, and tells remains apart.

    A name of its own for each attempt: two processes that write the same file do not mix their bytes. Where the file
    system has no locks the file goes without: there ``remove_temporary_files`` removes nothing.
    """
    while True:
        if (file := new_locked(path.with_name(f"{path.name}.{secrets.token_hex(8)}.tmp"))) is not None:
            return file


def new_locked(path: Path) -> BinaryIO | None:
    """A new file, locked if the file system can; None if it was removed in the moment between its making and its lock.

    Raises:
        OSError: it can't be made.
    """
    file = path.open("xb")
    try:
        fcntl.flock(file, fcntl.LOCK_EX)
    except OSError as error:
        if error.errno not in NO_LOCKS:
            file.close()
            path.unlink(missing_ok=True)
            raise
        return file
    if path.exists():
        return file
    file.close()
    return None


def _remove_unless_written(path: Path) -> None:
    with path.open("r+b") as file:  # for writing: over NFS a lock is refused to one who only reads
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        path.unlink(missing_ok=True)
