"""One run in a process of its own, so that whatever kills it leaves the others alone."""

import contextlib
import multiprocessing
import os
import signal
import sys
import threading
import traceback
from collections.abc import Mapping
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from selkd.errors import RunError
from selkd.recipe.recipe import Recipe


def run_apart(recipe: Recipe, out: Path, log: Path) -> str | None:
    """Run ``recipe`` into ``out``; all that it prints goes to the file ``log``.

    Returns:
        None once it is done, else why it failed, in one line.

    Raises:
        RunError: ``log`` can't be written.
    """
    try:
        log.parent.mkdir(parents=True, exist_ok=True)
        log.touch()
    except OSError as error:
        raise RunError(f"{log}: can't be written ({error}). Give another --out.") from None
    context: Any = multiprocessing.get_context("spawn")
    if "forkserver" in multiprocessing.get_all_start_methods():
        # A server that has imported everything once and forks a clean process for each run.
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(["selkd.run.pipeline"])
    ours, theirs = context.Pipe()
    arguments = (recipe.resolved(), str(out), str(log), dict(os.environ), theirs)
    process = context.Process(target=_work, args=arguments, name=f"selkd-{out.name}")
    process.start()
    theirs.close()  # so that the end of the process is the end of the pipe
    try:
        return ours.recv()
    except EOFError:
        process.join()
        return _how_it_ended(process.exitcode)
    finally:
        ours.close()
        process.join()


def _how_it_ended(code: int | None) -> str:
    if code is not None and code < 0:
        name = signal.Signals(-code).name
        memory = "; the system may have run out of memory" if name == "SIGKILL" else ""
        return f"its process was ended by {name}{memory}"
    return f"its process ended with exit code {code}"


def _work(content: dict[str, Any], out: str, log: str, environment: Mapping[str, str], answer: Connection) -> None:
    """In the new process."""
    os.environ.clear()  # the server that this was forked from may have been started in another
    os.environ.update(environment)
    threading.Thread(target=_end_with, args=(answer,), daemon=True).start()
    file = os.open(log, os.O_WRONLY | os.O_APPEND | os.O_CREAT)
    sys.stdout.flush()
    sys.stderr.flush()
    os.dup2(file, 1)
    os.dup2(file, 2)
    from transformers.utils import logging

    from selkd.run.pipeline import distill

    logging.disable_progress_bar()
    why: str | None = None
    try:
        distill(content, out)
    except BaseException as error:  # noqa: BLE001  told to the study, which goes on
        traceback.print_exc()
        why = " ".join(f"{type(error).__name__}: {error}".split()) or type(error).__name__
    answer.send(why)


def _end_with(study: Connection) -> None:
    """End this process when the study's ends, however that came: nobody would wait for the run any more."""
    with contextlib.suppress(EOFError, OSError):
        study.recv()  # the study never sends
    os._exit(1)
