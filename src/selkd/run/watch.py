"""Watching over a run: signals and a time limit ask it to end, and a process that ends early is told to the others.

A thread does it, so that it also works while the main thread waits for another process.
"""

import os
import select
import signal
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any

from selkd import interrupts
from selkd.errors import InputError, Interrupted, RunError
from selkd.recipe.recipe import RunOptions
from selkd.run.others import Ended, Others

SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)
_LOOKS_EVERY = 0.5  # seconds
_TIME_TO_FOLLOW = 3.0  # seconds in which a process ends by itself when it hears that another has ended
_ECHO = 2.0  # seconds in which torchrun passes on a Ctrl-C that the terminal has already given to all processes
_ENDED_AT_ONCE = 130  # what shells know as the end by Ctrl-C


class _Current:
    watch: "Watch | None" = None  # of this process
    number = 0  # of watches so far, the same in all processes of a run


@contextmanager
def watched(options: RunOptions) -> Iterator[None]:
    """Within the block, SIGTERM, SIGUSR1, Ctrl-C and ``run.max_hours`` ask for the end, which raises ``Interrupted``.

    A second Ctrl-C ends the process at once. In a block within another one the outer one goes on.

    Raises:
        RunError: another process of this run ended early; the message says which and why.
    """
    if _Current.watch is not None:
        yield
        return
    watch = _Current.watch = Watch(options)
    watch.start()
    try:
        yield
    except Exception as error:
        told = watch.explain(error)
        if told is error:
            raise
        raise told from error
    finally:
        watch.stop()
        _Current.watch = None
        interrupts.forget()


class Watch:
    """Looks after one run until it is stopped."""

    def __init__(self, options: RunOptions) -> None:
        self.options = options
        _Current.number += 1
        self._began = time.monotonic()
        self._has_launcher = int(os.environ.get("WORLD_SIZE", "1")) > 1
        self._ends_at: float | None = None  # when the grace time is over
        self._heard_at: float | None = None  # when it was first heard that another process has ended
        self._stopped = threading.Event()
        self._others: Others | None = None
        self._interrupted_at: float | None = None  # when Ctrl-C was first pressed
        self._reader, self._writer = socket.socketpair()
        self._reader.setblocking(False)
        self._writer.setblocking(False)
        self._thread = threading.Thread(target=self._run, name="selkd-watch", daemon=True)
        self._handlers: dict[int, Any] = {}
        self._wakeup = -1

    def start(self) -> None:
        if threading.current_thread() is threading.main_thread():  # Python lets no other thread handle signals
            self._wakeup = signal.set_wakeup_fd(self._writer.fileno(), warn_on_full_buffer=False)
            for number in SIGNALS:
                if signal.getsignal(number) != signal.SIG_IGN:  # as nohup and background jobs want it
                    self._handlers[number] = signal.signal(number, _noted)
            interrupts.leave_to_parent(True)
        self._thread.start()

    def stop(self) -> None:
        self._stopped.set()
        if self._handlers:
            interrupts.leave_to_parent(False)
        for number, handler in self._handlers.items():
            signal.signal(number, signal.SIG_DFL if handler is None else handler)
        if self._handlers:
            signal.set_wakeup_fd(self._wakeup)
        self._thread.join()
        self._reader.close()
        self._writer.close()

    def leave_child(self) -> None:
        """In a process that was forked off: signals are the parent's to handle; only its end ends the child."""
        signal.set_wakeup_fd(-1)
        for number in self._handlers:
            signal.signal(number, signal.SIG_IGN if number == signal.SIGINT else signal.SIG_DFL)

    def explain(self, error: Exception) -> Exception:
        """The error with which this process ends: ``error``, or the end of another process that it follows from."""
        others = self._known_others()
        if others is None:
            return error
        if isinstance(error, InputError | RunError | Interrupted):
            others.tell(Ended(others.rank, _code_of(error), str(error)))
            return error
        ended = others.told() or others.call_roll()
        if ended is None or ended.rank == others.rank:
            others.tell(Ended(others.rank, 1, f"{type(error).__name__}: {error}"))
            return error
        return Interrupted(ended.words) if ended.code == os.EX_TEMPFAIL else RunError(ended.message)

    def _run(self) -> None:
        while not self._stopped.is_set():
            if select.select([self._reader], [], [], _LOOKS_EVERY)[0]:
                for number in self._reader.recv(4096):
                    if number in SIGNALS:
                        self._hear(signal.Signals(number))
            now, hours = time.monotonic(), self.options.max_hours
            if hours is not None and now - self._began >= hours * 3600:
                self._ask(f"its time limit of {hours:g} hours", is_limited=True)
            if self._ends_at is not None and now >= self._ends_at:
                self._end_without()
            self._look_at_others(now)

    def _hear(self, number: signal.Signals) -> None:
        if number != signal.SIGINT:
            self._ask(number.name, is_limited=True)
            return
        now, first = time.monotonic(), self._interrupted_at
        if first is not None and not (self._has_launcher and now - first < _ECHO):
            _say("ended at once. The same command continues from what was finished.")
            os._exit(_ENDED_AT_ONCE)
        if first is None:
            self._interrupted_at = now
            self._ask("Ctrl-C", is_limited=False)

    def _ask(self, why: str, is_limited: bool) -> None:
        """Ask this process to end, within the grace time if ``is_limited``; a person at a terminal can wait."""
        if interrupts.asked() is None:
            interrupts.ask(why)
            others = self._known_others()
            if others is None or others.rank == 0:
                within = f" within {self.options.grace_seconds:g} s" if is_limited else "; Ctrl-C again ends at once"
                _say(f"{why}: saving and ending at the next safe point{within}.")
            if others is not None:
                others.ask(why)
        if is_limited and self._ends_at is None:
            self._ends_at = time.monotonic() + self.options.grace_seconds

    def _end_without(self) -> None:
        others = self._others
        ended = None if others is None else others.told() or others.call_roll()
        if ended is None:
            words = (
                f"interrupted by {interrupts.asked()}, and no safe point came within {self.options.grace_seconds:g} s "
                "(run.grace_seconds). The same command continues from what was finished"
            )
            ended = Ended(0 if others is None else others.rank, os.EX_TEMPFAIL, words)
            if others is not None:
                others.tell(ended)
        self._end_with(ended)

    def _end_with(self, ended: Ended) -> None:
        _say(ended.words if ended.code == os.EX_TEMPFAIL else ended.message)
        os._exit(ended.code)

    def _known_others(self) -> Others | None:
        if self._others is None:
            self._others = Others.find(_Current.number)
        return self._others

    def _look_at_others(self, now: float) -> None:
        others = self._known_others()
        if others is None:
            return
        why, ended = others.look()
        if why is not None:
            self._ask(why, is_limited=True)
        if ended is not None and ended.rank != others.rank:
            self._heard_at = self._heard_at or now
            if now - self._heard_at >= _TIME_TO_FOLLOW:  # the main thread waits for the one that is gone
                self._end_with(ended)


def _noted(*_: Any) -> None:
    """A signal's handler: the byte that Python has written to the watch's socket says which it was."""


def _code_of(error: Exception) -> int:
    return 2 if isinstance(error, InputError) else os.EX_TEMPFAIL if isinstance(error, Interrupted) else 1


def _say(words: str) -> None:
    with suppress(OSError):  # nobody may be left to read it: the watch goes on
        os.write(2, f"selkd: {words}\n".encode())


def _in_child() -> None:
    watch, _Current.watch = _Current.watch, None
    if watch is not None:
        watch.leave_child()


os.register_at_fork(after_in_child=_in_child)
