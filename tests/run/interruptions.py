"""Processes that run a command and are interrupted at a place of it, for the tests of interruptions.

They are forked off a server that has imported selkd, so that each begins at once.
"""

import multiprocessing
import os
import signal
import sys
import time
import traceback
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

PLACES = {  # name -> the module, the function in it that is wrapped
    "tokenising": ("selkd.data.splits", "record_batch"),
    "scoring": ("selkd.evaluation.sample_scores", "score_samples"),
    "evaluating": ("selkd.evaluation.fidelity", "fidelity"),
    "caching": ("selkd.teacher.build_cache", "draw_rows"),
    "training": ("selkd.training.trainer", "DistillTrainer.training_step"),
}
_CONTEXT: Any = multiprocessing.get_context("forkserver")
_CONTEXT.set_forkserver_preload(["selkd.run.pipeline", "selkd.cli.main", "tiny_run"])


def begin(arguments: list[str], log: Path, act: "Act | None" = None, environment: Mapping[str, str] = {}) -> Any:
    """A process that runs ``selkd`` with these arguments, prints into ``log``, and does ``act`` on the way."""
    process = _CONTEXT.Process(target=_work, args=(arguments, str(log), act, dict(environment)))
    process.start()
    return process


def run(arguments: list[str], log: Path, act: "Act | None" = None, environment: Mapping[str, str] = {}) -> int:
    """The exit code of such a process."""
    process = begin(arguments, log, act, environment)
    process.join()
    code: int = process.exitcode
    return code


class Act:
    """What happens to a process at the ``n``-th call of a place.

    Args:
        does: "SIGTERM", …: it gets these signals, one after another; "raise": an error is raised.
        hangs: whether the call does not return afterwards.
    """

    def __init__(self, place: str, n: int, *does: str, hangs: bool = False) -> None:
        self.place, self.n, self.does, self.hangs = place, n, does, hangs

    def install(self) -> None:
        module_name, name = PLACES[self.place]
        module = __import__(module_name, fromlist=["_"])
        *owner, name = name.split(".")
        target = getattr(module, owner[0]) if owner else module
        original, calls = getattr(target, name), [0]

        def wrapped(*args: Any, **kwargs: Any) -> Any:
            calls[0] += 1
            if calls[0] == self.n:
                self._happen()
            return original(*args, **kwargs)

        setattr(target, name, wrapped)
        for other in [module for key, module in sys.modules.items() if key.startswith("selkd.")]:
            if not owner and vars(other).get(name) is original:  # where it was imported by its name
                setattr(other, name, wrapped)

    def _happen(self) -> None:
        from selkd import interrupts

        for what in self.does:
            if what == "raise":
                raise ValueError("the memory is full of mice")
            os.kill(os.getpid(), getattr(signal, what))
            _wait(lambda: interrupts.asked() is not None)
        _wait(lambda: not self.hangs)


def _wait(until: Callable[[], bool]) -> None:
    while not until():
        time.sleep(0.01)


def _work(arguments: list[str], log: str, act: Act | None, environment: dict[str, str]) -> None:
    file = os.open(log, os.O_WRONLY | os.O_APPEND | os.O_CREAT)
    os.dup2(file, 1)
    os.dup2(file, 2)
    os.environ.update(environment)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    import torch

    from selkd.cli.main import main

    torch.set_num_threads(1)
    if act is not None:
        act.install()
    sys.argv = ["selkd", *arguments]
    try:
        main()
    except SystemExit as stop:
        sys.stdout.flush()
        os._exit(stop.code if isinstance(stop.code, int) else 0)
    except BaseException:  # noqa: BLE001  told to the test by a code of its own
        traceback.print_exc()
        os._exit(99)
    os._exit(0)
