"""Files and folders that are either whole or not there: written under a temporary name, synced, renamed."""

import errno
import fcntl
import os
import re
import secrets
import shutil
import stat
import traceback
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from tempfile import TemporaryFile

from selkd_cache.errors import InputError, RunError
from selkd_cache.files import NO_LOCKS, file_digest, is_temporary, new_locked, remove_temporary_files, replacing, sync

__all__ = [
    "DISK_FULL",
    "LOCK",
    "NO_LOCKS",
    "RECIPE",
    "RECORD",
    "file_digest",
    "is_temporary",
    "new_folder",
    "possible_path",
    "remove_temporaries",
    "remove_temporaries_below",
    "replacing",
    "require_writable",
    "saving",
    "settle",
    "sync",
    "write_whole",
]

RECIPE, RECORD = "recipe.yaml", "record.json"  # what makes a folder a run's
_HIDDEN_LOCK = "lock"
_REFUSED = re.compile(r"\(os error \d+\)|PytorchStreamWriter|inline_container|unexpected pos|iostream error")
_SAVERS = {"save_file": "filename", "save": "f"}  # of safetensors and torch: the argument that is the file
LOCK = "run.lock"  # in a run's folder: who works in it
DISK_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


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
        _remove_left_folders(path.parent)
        with _hidden_beside(path) as hidden:
            new = hidden / "new"  # readable for others as far as the umask says, which its parent is not
            new.mkdir()
            with saving(new, path):
                yield new
                settle(new)
            old = path.rename(hidden / "old") if replace and path.exists() else None
            try:
                new.rename(path)
            except OSError:
                if old is not None and not path.exists():
                    old.rename(path)
                if old is not None or not path.is_dir():
                    raise
            sync(path.parent)
    except OSError as error:
        raise _folder_refused(path, error) from error


@contextmanager
def saving(folder: Path, shown: Path | None = None) -> Iterator[None]:
    """Where the system refuses what a library writes into ``folder`` in the block, the error says which file it was.

    Args:
        shown: the folder's name for the error; None: its own.

    Raises:
        RunError: the operating system refused (disk full, no permission, …).
    """
    try:
        yield
    except Exception as error:
        # Rust's libraries raise errors of their own, which end in "(os error 28)"; torch.save raises RuntimeError.
        if not isinstance(error, OSError) and not _REFUSED.search(str(error)):
            raise
        path = _refused_file(error, folder)
        if folder in (path, *path.parents):
            path = (shown or folder) / path.relative_to(folder)
        raise _folder_refused(path, error) from error


def settle(folder: Path) -> None:
    """Make what a library wrote into ``folder`` outlast a power cut, and as readable for others as the folder is.

    Safetensors makes its files readable for their owner alone, whatever the umask says.
    """
    usual = folder.stat().st_mode & 0o666
    for path in (*folder.rglob("*"), folder):
        mode = stat.S_IMODE(path.stat().st_mode)
        if path.is_file() and mode | usual != mode:
            path.chmod(mode | usual)
        sync(path)


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
    """Removes the remains of interrupted writes of ours, files and folders, not what another process is writing.

    Where the file system has no locks, the two can't be told apart: remains stay. They do no harm.
    """
    remove_temporary_files(folder)
    _remove_left_folders(folder)


def remove_temporaries_below(folder: Path) -> None:
    """``remove_temporaries`` of a folder and of those inside it, two deep, as runs and selkd's cache folder are."""
    for inside in (folder, *folder.glob("*/"), *folder.glob("*/*/")):
        remove_temporaries(inside)


@contextmanager
def _hidden_beside(path: Path) -> Iterator[Path]:
    """A new hidden folder beside ``path``, which goes when the block ends; a lock in it tells remains apart."""
    lock = None
    while lock is None:
        hidden = path.with_name(f".{path.name}.{secrets.token_hex(8)}.tmp")
        hidden.mkdir(mode=0o700)
        with suppress(FileNotFoundError):  # removed as a remnant before it had its lock
            lock = new_locked(hidden / _HIDDEN_LOCK)
    with lock:
        try:
            yield hidden
        finally:
            shutil.rmtree(hidden, ignore_errors=True)


def _remove_left_folders(parent: Path) -> None:
    """Removes the hidden folders that killed processes left, not those that are being filled, nor what isn't ours."""
    with suppress(OSError):  # a folder that can't be listed keeps them
        for path in parent.iterdir():
            if path.name.startswith(".") and is_temporary(path.name) and path.is_dir() and not path.is_symlink():
                with suppress(OSError):  # being filled, just finished, or not ours to remove
                    _remove_unless_filled(path)


def _remove_unless_filled(hidden: Path) -> None:
    names = {path.name for path in hidden.iterdir()}
    if not names:
        hidden.rmdir()  # killed before there was a lock
    elif _HIDDEN_LOCK in names and names <= {_HIDDEN_LOCK, "new", "old"}:
        with (hidden / _HIDDEN_LOCK).open("r+b") as file:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            path = hidden.with_name(hidden.name[1:].rpartition(".")[0].rpartition(".")[0])
            if "old" in names and not path.exists():  # killed between the two renames: the new one is whole
                (hidden / "new").rename(path)
            shutil.rmtree(hidden)


def _folder_refused(path: Path, error: Exception) -> RunError:
    return RunError(
        f"{path} can't be written ({error}). Nothing finished before it was touched. Free space there, or choose "
        "another folder (SELKD_CACHE, --out); then run again to continue."
    )


def _refused_file(error: Exception, folder: Path) -> Path:
    """The file that a library could not write into ``folder``, or the folder if nothing tells."""
    if isinstance(error, OSError) and error.filename is not None:
        return Path(os.fsdecode(error.filename))
    for frame, _ in traceback.walk_tb(error.__traceback__):
        argument = frame.f_locals.get(_SAVERS.get(frame.f_code.co_name, ""))
        if isinstance(argument, str | os.PathLike):
            return Path(argument)
    with suppress(OSError):  # else the file that was written last
        return max(
            (path for path in folder.rglob("*") if path.is_file()),
            key=lambda path: path.stat().st_mtime_ns,
            default=folder,
        )
    return folder
