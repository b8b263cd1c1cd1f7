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

from selkd import interrupts
from selkd.errors import Interrupted, RunError
from selkd.recipe.recipe import Recipe


def run_apart(recipe: Recipe, out: Path, log: Path) -> str | None:
    """Run ``recipe`` into ``out``; the process prints into the file ``log``.

    Returns:
        None if the run is done, else the reason of its failure, in one line.

    Raises:
        RunError: ``log`` can't be written.
        Interrupted: the study or the run was asked to end; the run has saved what it had.
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
        is_told = False
        while not study_end.poll(0.2):
            if interrupts.asked() is not None and not is_told:
                study_end.send(interrupts.asked())
                is_told = True
        why, is_interrupted = study_end.recv()
    except (EOFError, BrokenPipeError):
        process.join()
        why, is_interrupted = _how_it_ended(process.exitcode), interrupts.asked() is not None
    finally:
        study_end.close()
        process.join()
    if is_interrupted:
        raise Interrupted(f"{out}: {why}")
    return why


def _how_it_ended(code: int | None) -> str:
    if code is not None and code < 0:
        name = signal.Signals(-code).name
        memory = "; the system may have run out of memory" if name == "SIGKILL" else ""
        return f"its process was ended by {name}{memory}"
    return f"its process ended with exit code {code}"


def _work(content: dict[str, Any], out: str, log: str, environment: Mapping[str, str], answer: Connection) -> None:
    """Run the recipe in the new process; send None or the reason of its failure, and whether it was interrupted."""
    os.environ.clear()  # the server may have been started in another environment
    os.environ.update(environment)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C goes to all processes of a terminal; the study passes it on
    threading.Thread(target=_obey, args=(answer,), daemon=True).start()
    file = os.open(log, os.O_WRONLY | os.O_APPEND | os.O_CREAT)
    sys.stdout.flush()
    sys.stderr.flush()
    os.dup2(file, 1)
    os.dup2(file, 2)
    from transformers.utils import logging

    from selkd.run.pipeline import distill

    logging.disable_progress_bar()
    why: str | None = None
    is_interrupted = False
    try:
        distill(content, out)
    except Interrupted as error:
        why, is_interrupted = str(error), True
    except BaseException as error:  # noqa: BLE001  the study goes on with the next run
        traceback.print_exc()
        why = " ".join(f"{type(error).__name__}: {error}".split()) or type(error).__name__
    answer.send((why, is_interrupted))


def _obey(study: Connection) -> None:
    """Ask the run to end when the study says so, and end this process once the study's has ended: nobody waits."""
    with contextlib.suppress(EOFError, OSError):
        while True:
            interrupts.ask(study.recv())
    os._exit(1)
