"""Ends a process at one of its writes: what ``benchmarks/kills.py`` puts under a run.

Each call that changes the disk below a folder has windows, which are numbered as they come: before it and after it, and
for a file's writing also "torn", with half of what was written on disk, which is what a kill in the middle leaves (what
was synced is never torn). At the window of a given number the process sends itself a signal.

Watched are Python's own calls (open for writing, close, fsync, rename, mkdir, unlink, rmdir) and the writers that go
around them: safetensors, ``torch.save`` and pyarrow's files.
"""

import io
import mmap
import os
import re
import signal
import sys
import tempfile
import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch.optim.optimizer import register_optimizer_step_post_hook

PAGE, _STEPS = 4096, slice(4088, 4096)
_RANDOM = (  # what names hold that differs from run to run
    (re.compile(r"\.[0-9a-f]{16}\.tmp"), ".*.tmp"),
    (re.compile(r"[0-9a-f]{32}"), "<digest>"),
    (re.compile(r"[0-9a-f]{16}"), "<digest>"),
    (re.compile(r"-[a-z0-9_]{8}(?=/|$)"), "-*"),
    (re.compile(r"/tmp[a-z0-9_]{8}"), "/tmp*"),
)
_STAGES = ("prepare", "score", "cache", "train", "evaluate")


@dataclass(frozen=True)
class Window:
    """One window.

    Attributes:
        stage: the stage of the run: prepare, score, cache, train, evaluate, finish, or start.
        call: what is done: open, close, fsync, rename, mkdir, unlink, rmdir, or a writer's name.
        name: the file, relative to the watched folder, without what differs from run to run.
        phase: before, after, or torn.
    """

    stage: str
    call: str
    name: str
    phase: str

    def __str__(self) -> str:
        return f"{self.stage}: {self.phase} {self.call} {self.name}"


@dataclass
class Watch:
    """Numbers the windows of this process, and sends it ``signal_number`` at one of them.

    Args:
        root: only what lies below it is watched.
        page: shared memory, in which the last window, whether it was struck, and the count of optimiser steps stand
            when the process is dead.
        at: the number of the window, from 1 on; 0: none.
        signal_number: the signal.
    """

    root: str
    page: mmap.mmap
    at: int = 0
    signal_number: int = signal.SIGKILL
    seen: list[Window] = field(default_factory=list)
    _lock: Any = field(default_factory=threading.RLock)
    _unsynced: dict[int, Callable[[], None]] = field(default_factory=dict)  # open files: what tears each of them

    def window(self, call: str, name: str, phase: str, tear: Callable[[], None] | None = None) -> None:
        """Pass a window; ``tear`` cuts the file, for a kill alone: a process that goes on has no half a file."""
        with self._lock:
            self.seen.append(Window(_stage(), call, name, phase))
            is_struck = len(self.seen) == self.at
            if is_struck or not 0 < self.at < len(self.seen):  # the page of one that was struck, and goes on, stays
                write_page(self.page, is_struck, self.seen[-1])
            if is_struck:
                if tear is not None and self.signal_number == signal.SIGKILL:
                    tear()
                os.kill(os.getpid(), self.signal_number)

    def name_of(self, path: Any, dir_fd: int | None = None) -> str | None:
        """The path below ``root`` as windows show it; None if it lies elsewhere."""
        if isinstance(path, int):
            path = _path_of(path)
        text = os.fsdecode(path)
        if dir_fd is not None and dir_fd >= 0:
            text = os.path.join(_path_of(dir_fd), text)  # noqa: PTH118
        text = os.path.abspath(text)  # noqa: PTH100
        if not text.startswith(self.root + os.sep):
            return None
        shown = text[len(self.root) + 1 :]
        for pattern, replacement in _RANDOM:
            shown = pattern.sub(replacement, shown)
        return shown

    def install(self) -> None:
        """Put the shim under this process, for good."""
        for name in ("rename", "replace", "fsync", "mkdir", "unlink", "remove", "rmdir"):
            setattr(os, name, self._watched(name, getattr(os, name)))
        self._watch_open()
        self._watch_writers()
        register_optimizer_step_post_hook(lambda *_: count_step(self.page))

    def _watched(self, call: str, original: Callable[..., Any]) -> Callable[..., Any]:
        shown = {"replace": "rename", "remove": "unlink"}.get(call, call)

        def watched(path: Any, *args: Any, **options: Any) -> Any:
            target = args[0] if shown == "rename" else path
            name = self.name_of(target, options.get("dir_fd"))
            if name is None:
                return original(path, *args, **options)
            if call == "fsync" and path in self._unsynced:
                self.window("write", name, "torn", self._unsynced.pop(path))
            self.window(shown, name, "before")
            found = original(path, *args, **options)
            self.window(shown, name, "after")
            return found

        return watched

    def _watch_open(self) -> None:
        open_file, open_descriptor, watch = io.open, os.open, self

        def watched_open(file: Any, mode: str = "r", buffering: int = -1, *args: Any, **options: Any) -> Any:
            name = None if isinstance(file, int) or not set(mode) & set("wax+") else watch.name_of(file)
            if name is None:
                return open_file(file, mode, buffering, *args, **options)
            encoding, errors, newline = [*args, *[options.get(key) for key in ("encoding", "errors", "newline")]][:3]
            watch.window("open", name, "before")
            opener = options.get("opener")
            raw = open_file(file, mode.replace("t", "").replace("b", "") + "b", 0, opener=opener)
            watch.window("open", name, "after")
            if buffering == 0:
                return raw
            buffer = watch._closing(io.BufferedRandom if "+" in mode else io.BufferedWriter)(raw)
            buffer.window_name, buffer.begin = name, raw.tell()
            watch._unsynced[raw.fileno()] = buffer.tear
            return buffer if "b" in mode else io.TextIOWrapper(buffer, encoding, errors, newline, buffering == 1)

        def watched_os_open(path: Any, flags: int, *args: Any, **options: Any) -> int:
            is_write = flags & (os.O_WRONLY | os.O_RDWR | os.O_CREAT)
            name = watch.name_of(path, options.get("dir_fd")) if is_write else None
            if name is not None:
                watch.window("open", name, "before")
            descriptor = open_descriptor(path, flags, *args, **options)
            if name is not None:
                watch.window("open", name, "after")
            return descriptor

        os.open = watched_os_open  # type: ignore[assignment]
        # pathlib opens by io.open; tempfile has a name of its own for the module.
        for module in (io, sys.modules["builtins"], tempfile._io):  # type: ignore[attr-defined]
            module.open = watched_open  # type: ignore[attr-defined]

    def _closing(self, kind: Any) -> Any:
        watch = self

        class Closing(kind):  # type: ignore[misc]
            """A buffered file with windows when it is closed: torn, if it was not synced before, and after."""

            window_name: str
            begin: int

            def close(self) -> None:
                if not self.closed:
                    self.flush()
                    if watch._unsynced.pop(self.fileno(), None) is not None:
                        watch.window("write", self.window_name, "torn", self.tear)
                    super().close()
                    watch.window("close", self.window_name, "after")

            def tear(self) -> None:
                end = os.fstat(self.fileno()).st_size
                os.ftruncate(self.fileno(), self.begin + (end - self.begin) // 2)

        return Closing

    def _watch_writers(self) -> None:
        import pyarrow
        import safetensors.torch
        import torch

        safetensors.torch.serialize_file = self._watched_writer("safetensors", safetensors.torch.serialize_file, 1)
        torch.save = self._watched_writer("torch.save", torch.save, 1)
        watch, arrow_file = self, pyarrow.OSFile

        class OSFile(arrow_file):  # type: ignore[misc]
            def __init__(self, path: str, mode: str = "r", *_: Any, **__: Any) -> None:
                self.window_name = watch.name_of(path) if "w" in mode else None
                self.path = path

            def close(self) -> None:
                is_open = not self.closed
                super().close()
                if is_open and self.window_name is not None:
                    watch.window("pyarrow", self.window_name, "torn", lambda: _halve(self.path))
                    watch.window("pyarrow", self.window_name, "after")

        pyarrow.OSFile = OSFile

    def _watched_writer(self, call: str, original: Callable[..., Any], place: int) -> Callable[..., Any]:
        """A writer of a whole file, whose path is its argument at ``place``."""

        def watched(*args: Any, **options: Any) -> Any:
            path = args[place] if len(args) > place else None
            name = self.name_of(path) if isinstance(path, str | os.PathLike) else None
            if name is None or path is None:
                return original(*args, **options)
            self.window(call, name, "before")
            found = original(*args, **options)
            self.window(call, name, "torn", lambda: _halve(path))
            self.window(call, name, "after")
            return found

        return watched


def new_page() -> mmap.mmap:
    """Shared memory for ``Watch.page``, made before the process is forked."""
    return mmap.mmap(-1, PAGE)


def count_step(page: mmap.mmap) -> None:
    page[_STEPS] = (steps_of(page) + 1).to_bytes(8, "little")


def steps_of(page: mmap.mmap) -> int:
    """How many optimiser steps the process has made."""
    return int.from_bytes(page[_STEPS], "little")


def write_page(page: mmap.mmap, is_struck: bool, window: Window) -> None:
    content = "\n".join(["struck" if is_struck else "passed", window.stage, window.call, window.name, window.phase])
    encoded = content.encode()[: _STEPS.start - 1]
    page[: len(encoded) + 1] = encoded + b"\0"


def read_page(page: mmap.mmap) -> tuple[bool, Window | None]:
    """Whether the process was struck at a window, and the last window that it passed; None if it passed none."""
    content = bytes(page[:]).partition(b"\0")[0].decode(errors="replace")
    if not content:
        return False, None
    state, *parts = content.split("\n")
    return state == "struck", Window(*parts)


def _path_of(descriptor: int) -> str:
    return str(Path(f"/proc/self/fd/{descriptor}").readlink())


def _halve(path: Any) -> None:
    os.truncate(path, Path(path).stat().st_size // 2)


def _stage() -> str:
    """The stage of the run that the main thread is in, read off its stack."""
    frame = sys._current_frames().get(threading.main_thread().ident or 0)
    found = "start"
    while frame is not None:  # from the innermost call outwards
        folder, _, module = frame.f_code.co_filename.removesuffix(".py").rpartition("/")
        if folder.endswith("/run"):
            if module in _STAGES:
                found = module
            elif "finish" in frame.f_code.co_name and found == "start":
                found = "finish"
        frame = frame.f_back
    return found
