"""Files and folders that are either whole or not there: written under a temporary name, synced, renamed."""

import errno
import fcntl
import hashlib
import os
import re
import secrets
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from tempfile import TemporaryDirectory, TemporaryFile
from typing import BinaryIO

import xxhash

from selkd.errors import InputError, RunError

RECIPE, RECORD = "recipe.yaml", "record.json"  # what makes a folder a run's
_TEMPORARY = re.compile(r".+\.[0-9a-f]{16}\.tmp")
LOCK = "run.lock"  # in a run's folder: who works in it
# What file systems without locks, or without syncing of folders, answer.
NO_LOCKS = (errno.ENOSYS, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOLCK)
_NO_SYNC = (errno.EINVAL, errno.ENOTSUP, errno.EOPNOTSUPP)


def is_temporary(name: str) -> bool:
    """Whether a file of this name is a write of ours, under way or interrupted."""
    return _TEMPORARY.fullmatch(name) is not None


def file_digest(path: Path) -> str:
    """xxh3_128 (32 hex digits) of a file's content, which is read a part at a time. Raises OSError if it can't be."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, xxhash.xxh3_128).hexdigest()


def possible_path(text: str) -> str:
    """``text``, if a file or folder may have this path. Raises ValueError, without a look at the disk, if none may."""
    name = max(os.fsencode(text).split(b"/"), key=len)
    if not text.strip():
        raise ValueError("expected a path, but it is empty")
    if "\0" in text:
        raise ValueError("expected a path, but it holds a NUL character")
    if len(name) > 255 or len(os.fsencode(text)) > 4095:
        raise ValueError(f"{text[:60]}… is too long for a path: a name has at most 255 bytes, a path 4,095")
    return text


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
                sync(path.parent)
            except BaseException:
                temporary.unlink(missing_ok=True)
                raise
    except OSError as error:
        raise RunError(
            f"{path.name} in {path.parent} could not be finished: {error}. Nothing finished before it was touched; "
            "remove the cause and run again to continue"
        ) from error


@contextmanager
def new_folder(path: Path, *, replace: bool = False) -> Iterator[Path]:
    """An empty folder to fill, which takes the name ``path`` once the block ends: whole, or not at all if it raises.

    Args:
        replace: the folder that has the name goes once the new one is whole. Else it stays and the new one goes:
            another process was first, with the same content.

    Raises:
        RunError: the operating system refused (disk full, no permission, …).
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with TemporaryDirectory(prefix=f".{path.name}-", dir=path.parent, ignore_cleanup_errors=True) as temporary:
            new = Path(temporary, "new")  # readable for others as far as the umask says, which its parent is not
            new.mkdir()
            yield new
            for written in new.rglob("*"):
                sync(written)
            old = path.rename(new.with_name("old")) if replace and path.exists() else None
            try:
                new.rename(path)
            except OSError:
                if old is not None and not path.exists():
                    old.rename(path)
                if old is not None or not path.is_dir():
                    raise
            sync(path.parent)
    except OSError as error:
        raise RunError(
            f"{path} can't be written ({error}). Free space there, or choose another folder (SELKD_CACHE, --out); then "
            "run again."
        ) from error


def write_whole(path: Path, content: str | bytes) -> None:
    """Write a file, text as UTF-8, whole or not at all; its folder is made if it is not there.

    Raises:
        RunError: the disk refused.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise RunError(f"{path.parent}: can't be made ({error}). Give another folder, then run again.") from None
    with replacing(path) as file:
        file.write(content.encode("utf-8") if isinstance(content, str) else content)


def require_writable(folder: Path) -> None:
    """Make ``folder`` if it is not there. Raises InputError if no file can be made in it."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise InputError(f"{folder}: expected a folder that can be written ({error}). Give another --out.") from None


def remove_temporaries(folder: Path) -> None:
    """Removes the remains of interrupted writes of ours, not the files that another process is writing.

    Where the file system has no locks, the two can't be told apart: remains stay. They do no harm.
    """
    with suppress(OSError):  # a folder that can't be listed keeps them
        for path in folder.iterdir():
            if is_temporary(path.name):
                with suppress(OSError):  # being written, just finished, or not ours to remove
                    _remove_unless_written(path)


def _new_temporary(path: Path) -> BinaryIO:
    """A new locked file beside ``path``; the lock ends with the process, however it ends, and tells remains apart.

    A name of its own for each attempt: two processes that write the same file do not mix their bytes. Where the file
    system has no locks the file goes without: there ``remove_temporaries`` removes nothing.
    """
    while True:
        temporary = path.with_name(f"{path.name}.{secrets.token_hex(8)}.tmp")
        file = temporary.open("xb")
        try:
            fcntl.flock(file, fcntl.LOCK_EX)
        except OSError as error:
            if error.errno not in NO_LOCKS:
                file.close()
                temporary.unlink(missing_ok=True)
                raise
            return file
        if temporary.exists():
            return file
        file.close()  # removed as a remnant in the moment between its making and its lock


def _remove_unless_written(path: Path) -> None:
    with path.open("r+b") as file:  # for writing: over NFS a lock is refused to one who only reads
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        path.unlink(missing_ok=True)


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
