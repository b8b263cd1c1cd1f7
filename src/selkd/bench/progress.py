"""Tells each measurement of a bench as it is made, with the time left, and lets a bench be stopped."""

import signal
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from threading import current_thread, main_thread
from typing import Any, TextIO


class Progress:
    """One line on standard error for each of ``total`` measurements.

    Attributes:
        stopped: whether the bench was stopped before all were made.
    """

    def __init__(self, total: int, stream: TextIO | None = None) -> None:
        self.total, self.done, self.stopped = total, 0, False
        self._stream = stream or sys.stderr
        self._started = time.monotonic()

    def told(self, name: str, figure: str) -> None:
        """Tell one measurement, and about how long the others will take."""
        self.done += 1
        left = (time.monotonic() - self._started) / self.done * (self.total - self.done)
        rest = f"about {left / 60:.0f} min" if left >= 90 else f"about {left:.0f} s"
        print(f"{self.done}/{self.total}  {name}  {figure}  {rest} left", file=self._stream, flush=True)

    @contextmanager
    def until_stopped(self) -> Iterator[None]:
        """Within the block, Ctrl-C and SIGTERM end the block, and no more."""

        def stop(*_: Any) -> None:
            raise KeyboardInterrupt

        before = signal.signal(signal.SIGTERM, stop) if current_thread() is main_thread() else None
        try:
            yield
        except KeyboardInterrupt:
            self.stopped = True
        finally:
            if before is not None:
                signal.signal(signal.SIGTERM, before)
