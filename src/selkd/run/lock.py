"""The lock of a run's folder: one command at a time works in it, and what locks it ends with the command's processes.

The file ``run.lock`` says who works in the folder. The system's lock on it (flock) ends with the last of the processes
that hold it, however they end: the main process takes it alone, and the run's other processes then share it, so that a
worker that outlives its launcher keeps the folder locked. File systems without locks, or with locks that other machines
don't see, get a heartbeat: each process writes a new number into the file every ``BEAT_SECONDS``. A lock that another
machine left, or that no system's lock stands behind, is watched for ``WATCH_SECONDS``; if its number stays, whoever
wrote it is gone. No clock is compared, so one that was set back locks nothing for ever.
"""

import errno
import fcntl
import json
import logging
import os
import secrets
import socket
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from datetime import UTC, datetime
from pathlib import Path
from typing import Any
from weakref import WeakSet

import psutil
from accelerate import PartialState
from accelerate.utils import broadcast_object_list

from selkd.errors import InputError, RunError
from selkd.files import DISK_FULL, LOCK, NO_LOCKS, sync

BEAT_SECONDS = 10.0
WATCH_SECONDS = 35.0
_SETTLE_SECONDS = 2.0  # after which the later of two that took over one left lock is seen in the file
_JOIN_SECONDS = 60.0  # a network's file system may show a new file late
_OPENING = '{"beat": "'  # the number follows: 16 hex digits
_logger = logging.getLogger(__name__)


class Unwritable(InputError):
    """No run can be in this folder, as it can't be made or written."""


@contextmanager
def working_in(folder: Path, state: PartialState | None = None, *, is_finished: bool = False) -> Iterator[None]:
    """Lock ``folder`` for the block, which all of a run's processes enter; a folder that it made and left empty goes.

    Args:
        folder: the folder, made with its parents if it is not there.
        state: the run's processes; None: this one alone.
        is_finished: whether the run in it is finished, and on a read-only disk goes without a lock.

    Raises:
        InputError: another command works in the folder, or it can't be made or written.
        RunError: the disk is full.
    """
    lock, is_shared = FolderLock(folder), state is not None and state.num_processes > 1
    refused: InputError | RunError | None = None
    try:
        if state is None or state.is_main_process:
            try:
                lock.acquire(shared=is_shared)
            except Unwritable as error:
                refused = None if is_finished else error
            except (InputError, RunError) as error:
                refused = error
        if is_shared:
            refused, lock.token = broadcast_object_list([refused, lock.token])
        if refused is not None:
            raise refused
        if lock.token and state is not None and not state.is_main_process:
            lock.join()
        yield
    finally:
        lock.release()


class FolderLock:
    """The lock of ``folder``. The main process acquires it, the others join; each releases it, or ends.

    Attributes:
        path: the lock's file.
        token: stands for this one hold of the lock; all processes of the run have it.
    """

    def __init__(self, folder: Path) -> None:
        self.folder, self.path, self.token = folder, folder / LOCK, ""
        self._made: list[Path] = []
        self._descriptor: int | None = None
        self._is_shared = self._is_locked = False
        self._stop = threading.Event()
        self._thread: threading.Thread | None = None

    def acquire(self, *, shared: bool = False) -> None:
        """Take the lock, alone; ``shared``: then let others join.

        Raises:
            InputError: another command holds it, or the folder can't be made or written.
            RunError: the disk is full.
        """
        try:
            self._make_folder()
            while not self._take():
                self._close()
                self._make_folder()  # another command that was refused may have removed it
            self._write_owner()
            if shared:
                self._share()
        except (OSError, ValueError) as error:  # ValueError: a name with a NUL, or the refusal itself
            self.release()
            if isinstance(error, InputError):
                raise
            if isinstance(error, OSError) and error.errno in DISK_FULL:
                raise RunError(f"{self.path} can't be written ({error}). Free space there, then run again.") from None
            if isinstance(error, PermissionError) and os.access(self.folder, os.W_OK) and self.path.exists():
                raise Unwritable(
                    f"{self.path}: another user's ({error}). If no command works in that folder, remove the file; else "
                    "give another --out."
                ) from None
            raise Unwritable(
                f"{self.folder}: expected a folder that can be made and written ({error}). Give another --out."
            ) from None
        except BaseException:  # Ctrl-C while it watches
            self.release()
            raise
        self._beat_on()

    def join(self) -> None:
        """Share the lock that the run's main process acquired; ``token`` is that of its hold."""
        until = time.monotonic() + _JOIN_SECONDS
        while True:
            try:
                self._descriptor = os.open(self.path, os.O_RDWR | os.O_NOFOLLOW)
                break
            except OSError as error:
                if time.monotonic() > until:
                    raise RunError(f"{self.path} can't be read, which the main process wrote ({error}).") from None
                time.sleep(0.1)
        self._is_shared = True
        self._share()
        self._beat_on()

    def release(self) -> None:
        """Give the lock back; the last process removes its file, and the folders that it made if nothing is in them."""
        self._stop.set()
        if self._thread is not None:
            self._thread.join()
        if self._descriptor is not None and self.token:
            # Without locks nobody knows whether others of the run still hold it: then the file stays, and is watched.
            is_last = self._lock(fcntl.LOCK_EX) if self._is_locked else not self._is_shared
            if is_last:
                with suppress(OSError):  # the lock itself ends with the process
                    self.path.unlink()
        self._close()
        for folder in self._made:
            with suppress(OSError, ValueError):  # not empty: something was done there; or never made
                folder.rmdir()
        self._made = []

    def _make_folder(self) -> None:
        """Make the folder and its parents, and note those that were not there, the innermost first."""
        missing = []
        for folder in (self.folder, *self.folder.parents):
            if os.path.lexists(folder):
                break
            missing.append(folder)
        self._made = missing or self._made
        self.folder.mkdir(parents=True, exist_ok=True)
        (self.folder / ("x" * 200)).exists()  # raises OSError where the path leaves no room for a run's names

    def _take(self) -> bool:
        """Open and lock the file; False: it was removed meanwhile, so try again.

        Raises:
            InputError: another command holds it.
        """
        is_new, flags = not os.path.lexists(self.path), os.O_RDWR | os.O_NOFOLLOW
        try:
            self._descriptor = os.open(self.path, flags | (os.O_CREAT | os.O_EXCL if is_new else 0), 0o666)
        except (FileExistsError, FileNotFoundError):
            return False
        if not self._lock(fcntl.LOCK_EX) and self._is_locked:
            raise self._in_use()
        if not self._is_named():
            return False
        if is_new:
            return True
        owner = self._owner()
        if not self._is_locked or owner.get("host", socket.gethostname()) != socket.gethostname():
            return self._is_left(owner)
        return True

    def _is_left(self, owner: dict[str, Any]) -> bool:
        """Watch a lock that may be held where the system's locks don't reach; False: it was released meanwhile.

        Raises:
            InputError: it is held.
        """
        _logger.warning(
            "%s: %s. No lock of the system's tells whether it still runs: watching its heartbeat for %.0f seconds.",
            self.folder, _told(owner), WATCH_SECONDS,
        )  # fmt: skip
        until, first = time.monotonic() + WATCH_SECONDS, self.path.read_bytes()
        while time.monotonic() < until:
            time.sleep(WATCH_SECONDS / 20)
            try:
                if self.path.read_bytes() != first:
                    raise self._in_use()
            except FileNotFoundError:
                return False
        self._write_owner()
        time.sleep(_SETTLE_SECONDS)
        if self._owner().get("token") != self.token:
            self.token = ""
            raise self._in_use()
        return True

    def _write_owner(self) -> None:
        self.token = secrets.token_hex(8)
        since = datetime.now(UTC).isoformat(timespec="seconds")
        owner = {"process": os.getpid(), "host": socket.gethostname(), "since": since, "token": self.token}
        content = f'{_OPENING}{secrets.token_hex(8)}", {json.dumps(owner)[1:]}\n'.encode()
        assert self._descriptor is not None, "the lock's file is open"
        with os.fdopen(self._descriptor, "r+b", closefd=False) as file:
            file.seek(0)
            file.truncate()
            file.write(content)
        sync(self.path)

    def _owner(self) -> dict[str, Any]:
        """Who holds the lock or left it; empty if the file does not say."""
        try:
            owner = json.loads(self.path.read_text(encoding="utf-8"))
        except (OSError, ValueError):
            return {}
        return owner if isinstance(owner, dict) else {}

    def _in_use(self) -> InputError:
        owner = self._owner()
        is_gone = owner.get("host") == socket.gethostname() and not psutil.pid_exists(int(owner.get("process", 0)))
        left = ". That process has ended and a worker of it still runs: end it" if is_gone else ". Wait until it ends"
        return InputError(f"{self.folder}: {_told(owner)}{left}, or give another --out; nothing was changed.")

    def _share(self) -> None:
        """Change to a lock that the run's other processes can have, too."""
        self._is_shared = True
        if not self._lock(fcntl.LOCK_SH) and self._is_locked:  # another took it in the moment between the two
            self.token = ""
            raise self._in_use()

    def _lock(self, kind: int) -> bool:
        """Try for the system's lock; False: another has it, or (``_is_locked`` is false) there are no locks here."""
        assert self._descriptor is not None, "the lock's file is open"
        self._is_locked = True
        try:
            fcntl.flock(self._descriptor, kind | fcntl.LOCK_NB)
        except OSError as error:
            self._is_locked = error.errno not in NO_LOCKS
            if self._is_locked and error.errno not in (errno.EAGAIN, errno.EACCES):  # the two for "another has it"
                raise
            return False
        _held.add(self)
        return True

    def _is_named(self) -> bool:
        """Whether the open file is still the one of that name."""
        assert self._descriptor is not None, "the lock's file is open"
        try:
            return os.path.samestat(os.fstat(self._descriptor), self.path.stat())
        except FileNotFoundError:
            return False

    def _close(self) -> None:
        _held.discard(self)
        if self._descriptor is not None:
            os.close(self._descriptor)
            self._descriptor = None

    def _beat_on(self) -> None:
        self._thread = threading.Thread(target=self._beat, name="run.lock", daemon=True)
        self._thread.start()

    def _beat(self) -> None:
        while not self._stop.wait(BEAT_SECONDS):
            try:
                if self._owner().get("token", self.token) != self.token:
                    print(f"selkd: {self.folder}: taken over by another command; this one ends.", file=sys.stderr)
                    os._exit(1)  # it would write into the other's run
                with self.path.open("r+b") as file:
                    file.seek(len(_OPENING))
                    file.write(secrets.token_hex(8).encode())
            except OSError as error:
                _logger.warning("%s can't be written (%s): other machines can't see that this run lives.", LOCK, error)


def _told(owner: dict[str, Any]) -> str:
    if not {"process", "host", "since"} <= owner.keys():
        return "another command works in this folder"
    return f"process {owner['process']} on {owner['host']} works in this folder since {owner['since']}"


_held: "WeakSet[FolderLock]" = WeakSet()


def _let_go() -> None:
    """In a process forked from this one, as the data loader's: the lock is not its own and must not outlive the run."""
    for lock in list(_held):
        lock._close()


os.register_at_fork(after_in_child=_let_go)
