"""Whether this process was asked to end. A run's signals and time limit ask; loops look where ending loses least."""

import ctypes
import os
import signal
import sys

from selkd.errors import InputError, Interrupted, RunError

_PR_SET_PDEATHSIG = 1  # of Linux's prctl(2)


class _Asked:
    why: str | None = None
    is_left_to_parent = False


def ask(why: str) -> None:
    """Ask this process to end at the next safe point. ``why`` completes "interrupted by"; the first reason stays."""
    _Asked.why = _Asked.why or why


def asked() -> str | None:
    """Why this process was asked to end, such as "SIGTERM"; None: it was not."""
    return _Asked.why


def forget() -> None:
    """Take back what was asked, as before another run in the same process."""
    _Asked.why = None


def interrupted(where: str = "") -> Interrupted:
    """The error that ends what was asked to end. ``where`` says what was reached, such as "at step 3 of 9"."""
    place = f" {where}" if where else ""
    return Interrupted(f"interrupted by {asked() or 'another process'}{place}. The same command continues from there")


def stop_if_asked() -> None:
    """Raises Interrupted if this process was asked to end. Of several processes each looks for itself alone."""
    if asked() is not None:
        raise interrupted()


def raise_together(error: InputError | RunError | Interrupted | None) -> None:
    """Raises the first error of any process, once every process has come here with its own, or with None."""
    from accelerate import PartialState
    from accelerate.utils import gather_object

    errors = gather_object([error]) if PartialState().num_processes > 1 else [error]
    for first in filter(None, errors):
        raise first


def stop_together() -> None:
    """Raises Interrupted on every process if any was asked to end, once every process has come here."""
    raise_together(None if asked() is None else interrupted())


def leave_to_parent(is_left: bool) -> None:
    """Say whether processes that this one forks, such as a data loader's, leave signals to it, as within a run."""
    _Asked.is_left_to_parent = is_left


def ignore_in_worker() -> None:
    """In a data loader's process: a signal to all processes at once must not take the data from a step under way."""
    if _Asked.is_left_to_parent:
        for number in (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT):
            signal.signal(number, signal.SIG_IGN)


def end_with_launcher(number: signal.Signals) -> None:
    """Have the system send this process the signal ``number`` when torchrun, which started it, ends; on Linux alone.

    Else a worker goes on by itself when its launcher is killed, and the workers of the next launch may join it.
    """
    if "TORCHELASTIC_RUN_ID" in os.environ and sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, int(number))
