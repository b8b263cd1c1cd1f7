"""How the command line's process ends: at once on a signal, or together with the others of its process group."""

import os
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any

import typer


@contextmanager
def leaving_on_signals() -> Iterator[None]:
    """End at once on SIGTERM and SIGUSR1, but where a run looks after them itself: nothing is half written."""
    before = {number: signal.signal(number, leave_at_once) for number in (signal.SIGTERM, signal.SIGUSR1)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, signal.SIG_DFL if handler is None else handler)


def leave_at_once(*_: Any) -> None:
    with suppress(OSError):  # nobody may be left to read it
        os.write(2, b"selkd: interrupted. The same command continues a run, a sweep or a cache; others begin again.\n")
    os._exit(os.EX_TEMPFAIL)


def say(words: str) -> None:
    """Write a line to standard error; the exit code says the same where nobody is left to read it."""
    try:
        typer.echo(f"selkd: {words}", err=True)
    except OSError:  # as after a Ctrl-C, which ended `tee`, too; what is buffered would fail again at the exit
        os.dup2(os.open(os.devnull, os.O_WRONLY), 2)


def leave_process_group() -> None:
    """Leave torchrun's process group: one left open can abort the interpreter at its exit."""
    if "torch" in sys.modules:
        from torch import distributed

        if distributed.is_available() and distributed.is_initialized():
            distributed.barrier()  # no rank leaves while another still reads what it sent
            distributed.destroy_process_group()
