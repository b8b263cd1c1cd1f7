"""Kills runs, continues them by the same command, and compares what they come to with a run that nothing disturbed.

    OMP_NUM_THREADS=1 python benchmarks/kills.py [--kills 200] [--processes 2] [--recipes cached live ...] [--seed 0]

The runs are whole runs at toy size, each in a process (or two, as torchrun starts them) that is forked from this one,
so that it begins in milliseconds. A kill is SIGKILL, SIGTERM, SIGINT or SIGUSR1, after a random time or at a numbered
window of a write (``benchmarks/strikes.py``); every kind of window is struck before one is struck again. The command is
repeated, and perhaps killed again, until it exits with 0. Then everything must be as in the undisturbed run: student,
selection, cache, metrics, examples, fidelity, counts, record (``benchmarks/run_content.py``), and nothing hidden may
remain.

A run is lost if the command, undisturbed, exits with anything but 0, or does not end. Exits with 1 if a run was lost,
differs, or left something behind; its folder is kept below ``--out``.
"""

import argparse
import gc
import json
import os
import random
import shutil
import signal
import socket
import sys
import tempfile
import time
import traceback
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO

os.environ |= {"OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false", "HF_HUB_OFFLINE": "1"}
sys.path += [str(Path(__file__).parent), str(Path(__file__).parent.parent / "tests")]

import torch
import yaml
from matplotlib.figure import Figure
from run_content import Content, content_of, differences, remains_of
from strikes import Watch, Window, new_page, read_page, steps_of
from tiny_run import make_recipe, make_task

import selkd.cli.main
import selkd.run.pipeline
import selkd.teacher.build_cache

SIGNALS = (signal.SIGKILL, signal.SIGKILL, signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)  # SIGKILL loses most
ALL = -1
LONGEST = 120.0  # seconds; a run of some three seconds that takes longer hangs
LAUNCHER_WAITS = 10.0  # seconds between SIGTERM and SIGKILL for the other processes (torchrun: 30)
AGAIN = 75
SHARD_TOKENS = 256  # so that a toy cache has several shards


def recipes(folder: Path) -> dict[str, dict[str, Any]]:
    """What is run: recipe name -> recipe. The models and texts are made in ``folder``."""
    training = {"num_train_epochs": 2, "save_steps": 5, "save_total_limit": 2}
    base = make_recipe(folder)
    base["training"] |= training
    live = {"samples": None, "cache": None}
    kept = {"every_steps": 4, "keep_best": "kl_nats"}
    data = make_task(folder, n_rows=30, packing=False)
    made = {
        "cached": {"evaluation": kept, "samples": base["samples"] | {"fraction": 0.12}},
        "live": live | {"data": base["data"] | {"tokens": 900}},
        "on_policy": live | {"data": data, "on_policy": {"max_new_tokens": 6}, "classes": {"sampler": "all"}},
        "queue": live | {"data": base["data"] | {"tokens": 900}, "positions": {"policy": "gls", "queue_size": 90}},
        "two_stage": {
            "positions": {"scoring": "two_stage", "frequent_classes": 20, "tail_classes": 20, "fraction": 0.2},
            "samples": {"metric": "kl", "fraction": 0.12},
        },
    }  # fmt: skip
    return {name: {**base, **changes, "name": name} for name, changes in made.items()}


@dataclass(frozen=True)
class Kill:
    """One signal: to one process at its window ``at``; or after ``seconds`` to one, or to ``ALL`` as schedulers do."""

    signal_number: signal.Signals
    rank: int
    at: int = 0
    seconds: float = 0.0


@dataclass(frozen=True)
class Attempt:
    """One call of the command.

    Attributes:
        codes: the exit code of each process; negative: the signal that ended it.
        struck: the kill and where it struck; None if the processes were left alone, or had ended before.
        seconds: how long it took.
        steps: how many optimiser steps it made.
        words: the last words of each process on standard error.
    """

    codes: list[int]
    struck: tuple[Kill, Window | None] | None
    seconds: float
    steps: int
    words: list[str]

    def __str__(self) -> str:
        if self.struck is None:
            return f"exit codes {self.codes}"
        kill, window = self.struck
        how = "at" if kill.at else f"{kill.seconds:.2f} s in, at or after"
        whom = "all ranks" if kill.rank == ALL else f"rank {kill.rank}"
        return f"{kill.signal_number.name} to {whom} {how} {window or 'the start'}: exit codes {self.codes}"


@dataclass
class Trial:
    """One run: what was done to it, and what came of it."""

    recipe: str
    steps: int
    attempts: list[Attempt] = field(default_factory=list)
    lost: str | None = None
    different: list[str] = field(default_factory=list)
    remains: list[str] = field(default_factory=list)

    @property
    def steps_again(self) -> int:
        """How many optimiser steps were made twice, or more often."""
        return sum(attempt.steps for attempt in self.attempts) - self.steps

    @property
    def is_good(self) -> bool:
        return not (self.lost or self.different or self.remains)


class Command:
    """``selkd distill`` of one recipe into one folder, by one process or several."""

    def __init__(self, recipe: dict[str, Any], folder: Path, processes: int) -> None:
        self.place, self.processes, self.logs = folder / "now", processes, folder / "logs"
        self.logs.mkdir(exist_ok=True)
        self.recipe_file = folder / f"{recipe['name']}.yaml"
        self.recipe_file.write_text(yaml.safe_dump(recipe))

    @property
    def run(self) -> Path:
        return self.place / "run"

    @property
    def shared(self) -> Path:
        """Selkd's cache folder, new for each trial, so that the student is cut and the text tokenised."""
        return self.place / "shared"

    def clear(self) -> None:
        shutil.rmtree(self.place, ignore_errors=True)
        (self.place / "tmp").mkdir(parents=True)

    def __call__(self, kill: Kill | None = None) -> Attempt:
        """Call the command once, and kill it."""
        pages = [new_page() for _ in range(self.processes)]
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        started = time.monotonic()
        children = {}
        for rank, page in enumerate(pages):
            mine = kill if kill is not None and kill.rank == rank else None
            watch = Watch(str(self.place), page, mine.at if mine else 0, mine.signal_number if mine else 0)
            if (child := os.fork()) == 0:
                self._be(rank, port, watch)
            children[child] = rank
        sent: list[Window | None] = []
        codes = self._wait(children, kill, started, lambda: sent.append(read_page(pages[max(0, kill.rank)])[1]))
        struck = (kill, sent[0]) if kill is not None and sent else None
        if kill is not None and kill.at:
            is_struck, window = read_page(pages[kill.rank])
            struck = (kill, window) if is_struck else None
        words = [(self.logs / f"{rank}.err").read_text(errors="replace")[-2000:] for rank in range(self.processes)]
        return Attempt(codes, struck, time.monotonic() - started, steps_of(pages[0]), words)

    def windows(self) -> list[list[Window]]:
        """The windows that each process passed in the last call, if it ended by itself."""
        files = [self.logs / f"{rank}.windows" for rank in range(self.processes)]
        return [[Window(*parts) for parts in json.loads(file.read_text())] for file in files]

    def _be(self, rank: int, port: int, watch: Watch) -> None:
        """Become the process of that rank, to its end."""
        os.environ |= {"SELKD_CACHE": str(self.shared), "TMPDIR": str(self.place / "tmp")}
        tempfile.tempdir = None
        if self.processes > 1:
            ranks = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": self.processes, "MASTER_PORT": port}
            ranks |= {"LOCAL_WORLD_SIZE": self.processes, "MASTER_ADDR": "127.0.0.1"}
            os.environ |= {name: str(value) for name, value in ranks.items()}
        for descriptor, name in ((1, "out"), (2, "err")):
            with (self.logs / f"{rank}.{name}").open("wb") as file:
                os.dup2(file.fileno(), descriptor)
        signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background jobs ignore it
        torch.set_num_threads(1)
        listing = (self.logs / f"{rank}.windows").open("w")
        watch.install()
        sys.argv = ["selkd", "distill", str(self.recipe_file), "--out", str(self.run), "--json"]
        code: Any = 0
        try:
            selkd.cli.main.main()
        except SystemExit as stop:
            code = stop.code
        except BaseException:  # noqa: BLE001  told, and by a code that no command of selkd may end with
            traceback.print_exc()
            code = 70
        json.dump([list(vars(window).values()) for window in watch.seen], listing)
        listing.close()
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code if isinstance(code, int) else int(code is not None))

    def _wait(
        self, children: dict[int, int], kill: Kill | None, started: float, on_kill: Callable[[], None]
    ) -> list[int]:
        """Exit codes by rank. As a launcher, end all if one fails; ``on_kill`` is called before the kill by time."""
        codes: dict[int, int] = {}
        was_sent, failed_at, is_ended = False, 0.0, False
        while len(codes) < len(children):
            time.sleep(0.002)
            now = time.monotonic()
            for child, rank in children.items():
                if rank not in codes and (ended := os.waitpid(child, os.WNOHANG))[0]:
                    codes[rank] = os.waitstatus_to_exitcode(ended[1])
            left = [child for child, rank in children.items() if rank not in codes]
            if kill is not None and kill.seconds and not was_sent and now - started >= kill.seconds:
                meant = [child for child in left if kill.rank in (children[child], ALL)]
                was_sent = True
                if meant:
                    on_kill()
                for child in meant:
                    os.kill(child, kill.signal_number)
            if any(codes.values()) and not failed_at:
                failed_at = now
            if left and failed_at and not is_ended and now - failed_at > 0.1:
                is_ended = True
                for child in left:
                    os.kill(child, signal.SIGTERM)
            if left and ((is_ended and now - failed_at > LAUNCHER_WAITS) or now - started > LONGEST):
                for child in left:
                    os.kill(child, signal.SIGKILL)
        return [codes[rank] for rank in range(len(codes))]


class Bench:
    """Runs of one recipe: the undisturbed one, and those that are killed."""

    def __init__(self, name: str, command: Command, seed: int) -> None:
        self.name, self.command, self.seed = name, command, seed
        command.clear()
        first = command()
        if any(first.codes):
            raise SystemExit(f"{name}, undisturbed: exit codes {first.codes}\n" + "\n".join(first.words))
        self.seconds, self.steps, self.windows = first.seconds, first.steps, command.windows()
        self.expected: Content = content_of(command.run, command.shared)
        self.remains = remains_of(command.run, command.shared)
        self.deck = list(_deck(self.windows, random.Random(seed)))

    def trial(self, number: int) -> Trial:
        """Kill a run, perhaps several times, and let it come to its end."""
        rng, trial = random.Random(f"{self.seed} {self.name} {number}"), Trial(self.name, self.steps)
        self.command.clear()
        kill: Kill | None = self._first_kill(number, rng)
        while trial.lost is None:
            attempt = self.command(kill)
            trial.attempts.append(attempt)
            if attempt.seconds > LONGEST:
                trial.lost = f"did not end within {LONGEST:.0f} s"
            elif not any(attempt.codes):
                break
            elif attempt.struck is None and (set(attempt.codes) != {AGAIN} or len(trial.attempts) > 8):
                trial.lost = "\n".join([f"undisturbed, exit codes {attempt.codes}", *attempt.words])
            kill = self._another_kill(rng) if rng.random() < 0.4 and len(trial.attempts) < 4 else None
        if trial.lost is None:
            trial.different = differences(content_of(self.command.run, self.command.shared), self.expected)
            left = remains_of(self.command.run, self.command.shared)
            trial.remains = [name for name in left if name not in self.remains]
        return trial

    def _first_kill(self, number: int, rng: random.Random) -> Kill:
        if number % 4 == 3:
            return self._by_time(rng, self.seconds)
        rank, place = self.deck[(number - number // 4) % len(self.deck)]
        # Torn files are what SIGKILL leaves; a process that goes on writes them to their end.
        is_torn = self.windows[rank][place].phase == "torn"
        return Kill(signal.SIGKILL if is_torn else rng.choice(SIGNALS), rank, at=place + 1)

    def _another_kill(self, rng: random.Random) -> Kill:
        if rng.random() < 0.3:
            return self._by_time(rng, self.seconds / 2)
        rank = rng.randrange(len(self.windows))
        return Kill(rng.choice(SIGNALS), rank, at=rng.randrange(len(self.windows[rank])) // 2 + 1)

    def _by_time(self, rng: random.Random, until: float) -> Kill:
        ranks = [*range(len(self.windows)), *([ALL] if len(self.windows) > 1 else [])]
        return Kill(rng.choice(SIGNALS), rng.choice(ranks), seconds=rng.uniform(0.001, until))


def _deck(windows: list[list[Window]], rng: random.Random) -> Iterator[tuple[int, int]]:
    """(rank, place) of one window of each kind, in an order in which each stage, and each way, comes early."""
    kinds: dict[Any, list[tuple[int, int]]] = {}
    for rank, seen in enumerate(windows):
        for place, window in enumerate(seen):
            name = "".join("#" if letter.isdigit() else letter for letter in window.name)
            kinds.setdefault((rank, window.stage, window.call, window.phase, name), []).append((rank, place))
    left = list(kinds)
    rng.shuffle(left)
    seen: Counter[str] = Counter()  # stages, phases and calls
    while left:
        kind = min(left, key=lambda kind: (seen[kind[1]], seen[kind[3]], seen[kind[2]]))
        left.remove(kind)
        seen.update(kind[1:4])
        yield rng.choice(kinds[kind])


def _empty_picture(_: Figure, buffer: BinaryIO, **__: Any) -> None:
    """In place of drawing, which takes as long as the rest of a run and writes nothing by itself."""
    buffer.write(b'<svg viewBox="0 0 1 1"></svg>')


def _steps_again(trials: list[Trial]) -> dict[str, list[int]]:
    """The steps that were made again in each trial, by the signal that struck it if it was one."""
    found: dict[str, list[int]] = {}
    for trial in trials:
        names = {attempt.struck[0].signal_number.name for attempt in trial.attempts if attempt.struck}
        if trial.lost is None and names:
            found.setdefault(names.pop() if len(names) == 1 else "several signals", []).append(trial.steps_again)
    return dict(sorted(found.items()))


def report_of(trials: list[Trial]) -> dict[str, Any]:
    """The figures of all trials, and every trial that is not good, as plain data."""
    struck = [(*attempt.struck, attempt) for trial in trials for attempt in trial.attempts if attempt.struck]
    places = Counter((window.stage if window else "start") for _, window, _ in struck)
    ways = Counter(f"{window.phase} {window.call}" for kill, window, _ in struck if kill.at and window)
    ends = Counter(f"{kill.signal_number.name}: {attempt.codes[max(0, kill.rank)]}" for kill, _, attempt in struck)
    return {
        "kills": len(struck),
        "runs": len(trials),
        "lost": sum(trial.lost is not None for trial in trials),
        "different": sum(bool(trial.different) for trial in trials),
        "with_remains": sum(bool(trial.remains) for trial in trials),
        "steps": sum(trial.steps for trial in trials),
        "steps_made_again": {name: sum(again) for name, again in _steps_again(trials).items()},
        "struck_by_stage": dict(places.most_common()),
        "struck_by_window": dict(ways.most_common()) | {"by time": sum(not kill.at for kill, _, _ in struck)},
        "exit_codes": dict(sorted(ends.items())),
        "struck": [f"{trial.recipe}: {attempt}" for trial in trials for attempt in trial.attempts if attempt.struck],
        "bad": [
            {
                "recipe": trial.recipe,
                "attempts": [str(attempt) for attempt in trial.attempts],
                "lost": trial.lost,
                "different": trial.different,
                "remains": trial.remains,
            }
            for trial in trials
            if not trial.is_good
        ],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=200, help="how many kills, at least")
    parser.add_argument("--runs", type=int, help="how many runs, whatever the number of kills")
    parser.add_argument("--processes", type=int, default=1, help="how many processes share a run")
    parser.add_argument("--recipes", nargs="+", metavar="NAME", help="which recipes; all if not given")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--first", type=int, default=0, help="the number of the first trial, to do one again")
    parser.add_argument("--out", type=Path, help="where runs are made, and bad ones kept")
    given = parser.parse_args()
    selkd.teacher.build_cache.SHARD_TOKENS = SHARD_TOKENS
    Figure.savefig = _empty_picture  # type: ignore[method-assign]
    gc.freeze()  # what the forked processes collect does not copy this one's memory
    with ExitStack() as stack:
        out = given.out or Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="selkd-kills-")))
        out.mkdir(parents=True, exist_ok=True)
        out = out.resolve()
        made = recipes(out)
        names = given.recipes or list(made)
        benches = [Bench(name, Command(made[name], out, given.processes), given.seed) for name in names]
        trials: list[Trial] = []
        number = given.first
        while report_of(trials)["kills"] < given.kills if given.runs is None else len(trials) < given.runs:
            bench = benches[number % len(benches)]
            trial = bench.trial(number // len(benches))
            trials.append(trial)
            word = "good" if trial.is_good else "BAD"
            told = [*map(str, trial.attempts), *trial.different[:3], *trial.remains[:3]]
            print(f"{number} {trial.recipe}: {word} {'; '.join(told)}", file=sys.stderr, flush=True)
            if not trial.is_good and given.out is not None:
                shutil.rmtree(out / f"bad-{number}", ignore_errors=True)
                bench.command.place.rename(out / f"bad-{number}")
            number += 1
    report = report_of(trials)
    print(json.dumps(report, indent=1))
    sys.exit(bool(report["bad"]))


if __name__ == "__main__":
    main()
