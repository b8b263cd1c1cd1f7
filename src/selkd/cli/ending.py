"""How the command line's process ends: at once on a signal, or together with the others of its process group."""

import os
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any


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
    os.write(2, b"selkd: interrupted. The same command continues from what was finished.\n")
    os._exit(os.EX_TEMPFAIL)


def leave_process_group() -> None:
    """Leave torchrun's process group: one left open can abort the interpreter at its exit."""
    if "torch" in sys.modules:
        from torch import distributed

        if distributed.is_available() and distributed.is_initialized():
            distributed.barrier()  # no rank leaves while another still reads what it sent
            distributed.destroy_process_group()
