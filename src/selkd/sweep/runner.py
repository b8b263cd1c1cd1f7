"""Runs one recipe in a process of its own, so that a crash leaves the other runs alone."""

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
    """Run ``recipe`` into ``out``; the process prints into the file ``log``.

    Returns:
        None if the run is done, else the reason of its failure, in one line.

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
        # The server imports everything once and forks a clean process for each run.
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(["selkd.run.pipeline"])
    study_end, run_end = context.Pipe()
    arguments = (recipe.resolved(), str(out), str(log), dict(os.environ), run_end)
    process = context.Process(target=_work, args=arguments, name=f"selkd-{out.name}")
    process.start()
    run_end.close()  # the end of the process is now the end of the pipe
    try:
        return study_end.recv()
    except EOFError:
        process.join()
        return _how_it_ended(process.exitcode)
    finally:
        study_end.close()
        process.join()


def _how_it_ended(code: int | None) -> str:
    if code is not None and code < 0:
        name = signal.Signals(-code).name
        memory = "; the system may have run out of memory" if name == "SIGKILL" else ""
        return f"its process was ended by {name}{memory}"
    return f"its process ended with exit code {code}"


def _work(content: dict[str, Any], out: str, log: str, environment: Mapping[str, str], answer: Connection) -> None:
    """Run the recipe in the new process, and send None or the reason of its failure."""
    os.environ.clear()  # the server may have been started in another environment
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
    except BaseException as error:  # noqa: BLE001  the study goes on with the next run
        traceback.print_exc()
        why = " ".join(f"{type(error).__name__}: {error}".split()) or type(error).__name__
    answer.send(why)


def _end_with(study: Connection) -> None:
    """End this process as soon as the study's process has ended: nobody waits for the run any more."""
    with contextlib.suppress(EOFError, OSError):
        study.recv()  # the study never sends
    os._exit(1)
