"""A run's folder in use: one command at a time, whatever ends the one before; and folders that no run can be in."""

import errno
import fcntl
import json
import os
import signal
import socket
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import pytest
from tiny_run import make_recipe

from selkd import distill
from selkd.errors import InputError
from selkd.files import LOCK, is_temporary
from selkd.interrupts import end_with_launcher
from selkd.run import lock
from selkd.run.lock import FolderLock, working_in
from selkd_cache.verify import verify_cache

FORK = get_context("fork")


@contextmanager
def process(work: Callable[..., None], *arguments: Any) -> Iterator[Any]:
    """A process of its own that does ``work``; killed, if it still runs, when the block ends."""
    started = FORK.Process(target=work, args=arguments)
    started.start()
    try:
        yield started
    finally:
        started.kill()
        started.join()


def until(holds: Callable[[], bool]) -> None:
    for _ in range(20_000):
        if holds():
            return
        time.sleep(0.01)
    raise AssertionError("what was waited for did not come")


def is_beating(folder: Path) -> bool:
    """Whether somebody who said who he is holds the folder's lock."""
    with suppress(OSError, ValueError):
        return "token" in json.loads((folder / LOCK).read_text())
    return False


def hold(folder: Path) -> None:
    with working_in(folder):
        signal.pause()


def refused(folder: Path) -> str:
    with pytest.raises(InputError) as error, working_in(folder):
        pass
    return str(error.value)


def test_a_second_command_is_refused_in_words_until_the_first_ends_however_it_ends(tmp_path: Path) -> None:
    folder = tmp_path / "runs" / "one"
    with process(hold, folder) as first:
        until(lambda: is_beating(folder))
        written = (folder / LOCK).read_bytes()
        owner = json.loads(written)
        assert refused(folder) == (
            f"{folder}: process {first.pid} on {socket.gethostname()} works in this folder since {owner['since']}. "
            "Wait until it ends, or give another --out; nothing was changed."
        )
        assert (folder / LOCK).read_bytes() == written
        first.kill()
        first.join()
        assert (folder / LOCK).read_bytes() == written  # it could not remove it
        with working_in(folder):
            assert json.loads((folder / LOCK).read_text())["process"] == os.getpid()
    assert list(folder.iterdir()) == []


def test_a_process_of_the_data_loader_does_not_keep_the_folder_locked(tmp_path: Path) -> None:
    def work() -> None:
        with working_in(tmp_path):
            if (child := os.fork()) == 0:
                signal.pause()
            (tmp_path / "child").write_text(str(child))
            signal.pause()

    with process(work) as first:
        until(lambda: (tmp_path / "child").exists() and (tmp_path / "child").read_text() != "")
        first.kill()
        first.join()
        try:
            with working_in(tmp_path):
                pass
        finally:
            os.kill(int((tmp_path / "child").read_text()), signal.SIGKILL)


def test_a_worker_that_outlives_its_main_process_keeps_the_folder_locked(tmp_path: Path) -> None:
    def main() -> None:
        FolderLock(tmp_path).acquire(shared=True)
        signal.pause()

    def worker() -> None:
        joined = FolderLock(tmp_path)
        joined.token = json.loads((tmp_path / LOCK).read_text())["token"]
        joined.join()
        (tmp_path / "joined").touch()
        signal.pause()

    with process(main) as first:
        until(lambda: is_beating(tmp_path))
        with process(worker) as second:
            until((tmp_path / "joined").exists)
            assert "Wait until it ends" in refused(tmp_path)
            first.kill()
            first.join()
            assert "That process has ended and a worker of it still runs: end it" in refused(tmp_path)
            second.kill()
            second.join()
            with working_in(tmp_path):
                pass


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux tells a process that its parent ended")
def test_a_worker_ends_when_its_launcher_is_killed(monkeypatch: pytest.MonkeyPatch) -> None:
    """Else the workers of the next launch may find it and train with it."""
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "none")
    reading, writing = os.pipe()

    def launcher() -> None:
        os.close(reading)
        if os.fork() == 0:
            end_with_launcher(signal.SIGKILL)
            os.write(writing, b"here")
        signal.pause()

    with process(launcher) as launched:
        os.close(writing)
        assert os.read(reading, 4) == b"here"
        launched.kill()
        assert os.read(reading, 4) == b""  # nobody holds the pipe's other end any more
    os.close(reading)


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """Heartbeats that need no patience; the watch is still many of them long."""
    for name, seconds in {"BEAT_SECONDS": 0.05, "WATCH_SECONDS": 2.0, "_SETTLE_SECONDS": 0.2}.items():
        monkeypatch.setattr(lock, name, seconds)


@pytest.fixture
def without_locks(monkeypatch: pytest.MonkeyPatch) -> None:
    """A file system without locks, for this process and those that it forks."""

    def no_locks(*_: object) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "flock", no_locks)


@pytest.mark.usefixtures("quick", "without_locks")
def test_without_locks_a_heartbeat_tells_and_no_clock_locks_for_ever(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    with process(hold, folder) as first:
        until(lambda: is_beating(folder))
        assert f"process {first.pid} on" in refused(folder)
        os.kill(first.pid, signal.SIGSTOP)  # a machine that sleeps
        os.waitid(os.P_PID, first.pid, os.WSTOPPED)  # kill returns before its heartbeat has stopped
        os.utime(folder / LOCK, (time.time() + 10**8,) * 2)  # as if written before a clock was set back
        with working_in(folder):
            os.kill(first.pid, signal.SIGCONT)
            first.join()
            assert first.exitcode == 1  # it found that it was taken for dead, and left the folder to this one
            assert json.loads((folder / LOCK).read_text())["process"] == os.getpid()
    assert not folder.exists() or list(folder.iterdir()) == []


@pytest.mark.usefixtures("quick")
def test_a_lock_of_another_machine_is_watched_even_where_this_ones_locks_work(tmp_path: Path) -> None:
    """A network's file system may lock for its own machine alone."""
    left = '{"beat": "%016x", "process": 7, "host": "elsewhere", "since": "2026-01-01", "token": "theirs"}\n'

    def beat() -> None:
        for number in range(10**6):
            (tmp_path / "beat").write_text(left % number)
            (tmp_path / "beat").replace(tmp_path / LOCK)
            time.sleep(0.05)

    with process(beat):
        until(lambda: is_beating(tmp_path))
        assert "process 7 on elsewhere works in this folder since 2026-01-01" in refused(tmp_path)
    (tmp_path / "beat").unlink(missing_ok=True)
    with working_in(tmp_path):
        assert json.loads((tmp_path / LOCK).read_text())["host"] == socket.gethostname()
    assert list(tmp_path.iterdir()) == []


def test_what_a_refused_command_made_goes_and_nothing_else(tmp_path: Path) -> None:
    folder = tmp_path / "a" / "b" / "c"

    def refuse(made: Path) -> None:
        assert (folder / LOCK).exists()
        made.touch()
        raise InputError("mine")

    with pytest.raises(InputError, match="mine"), working_in(folder):
        refuse(folder / LOCK)
    assert list(tmp_path.iterdir()) == []
    (tmp_path / "a").mkdir()
    with pytest.raises(InputError, match="mine"), working_in(folder):
        refuse(tmp_path / "a" / "b" / "theirs")
    assert [path.name for path in (tmp_path / "a").rglob("*")] == ["b", "theirs"]


def test_folders_that_no_run_can_be_in_are_refused_before_anything(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("mine")
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    deep = tmp_path.joinpath(*["d" * 200] * 18, "d" * (4000 - 18 * 201 - len(str(tmp_path))))
    recipe = make_recipe(tmp_path) | {"teacher": {"model": str(tmp_path / "no such teacher")}}
    before = sorted(tmp_path.rglob("*"))
    for out in (
        tmp_path / "file", tmp_path / "file" / "run", tmp_path / "loop", tmp_path / "loop" / "run",
        tmp_path / ("n" * 256), deep, tmp_path / "new" / "a\0b", Path("/proc/run"),
    ):  # fmt: skip
        with pytest.raises(InputError, match="Give another --out"):
            distill(recipe, out)
    assert sorted(tmp_path.rglob("*")) == before
    with pytest.raises(InputError, match="no such teacher"):
        distill(recipe, tmp_path / "possible")


def test_two_runs_at_once_are_one_run_and_one_refusal(tmp_path: Path) -> None:
    recipe = make_recipe(tmp_path, evaluation={"suite": []}, samples=None)
    recipe["training"] |= {"num_train_epochs": 500}
    with process(distill, recipe, tmp_path / "run"):
        until(lambda: is_beating(tmp_path / "run"))
        for _ in range(2):
            with pytest.raises(InputError, match="works in this folder since"):
                distill(recipe, tmp_path / "run")
            until((tmp_path / "run" / "metrics.jsonl").exists)
        steps = [json.loads(line)["step"] for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
        assert steps == list(range(1, len(steps) + 1))


def test_two_runs_that_make_the_same_shared_files_at_once_are_both_right(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """They tokenise one text, prune one student, write one file of scores and build one cache."""
    shared = {"samples": {"metric": "student_entropy", "fraction": 0.3, "path": str(tmp_path / "scores.parquet")}}
    recipe = make_recipe(tmp_path, cache={"path": str(tmp_path / "cache")}, evaluation={"suite": []}, **shared)
    monkeypatch.setenv("SELKD_CACHE", str(tmp_path / "selkd"))
    start = FORK.Barrier(2)

    def work(out: Path) -> None:
        start.wait()
        distill(recipe, out)

    with process(work, tmp_path / "a") as first, process(work, tmp_path / "b") as second:
        for each in (first, second):
            each.join()
            assert each.exitcode == 0
    students = [(tmp_path / name / "student" / "model.safetensors").read_bytes() for name in "ab"]
    assert students[0] == students[1]
    assert verify_cache(tmp_path / "cache") == []
    made = [path for path in tmp_path.rglob("*") if path.parent.name in ("tokenised", "students")]
    assert len(made) == 2
    assert not [path for path in tmp_path.rglob("*") if is_temporary(path.name) or path.name == LOCK]
    alone = distill(recipe | {"cache": {"path": None}, "samples": shared["samples"] | {"path": None}}, tmp_path / "c")
    assert (alone.student / "model.safetensors").read_bytes() == students[0]
