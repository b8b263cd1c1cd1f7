"""A run that is asked to end, or whose processes die: what it leaves, what it says, and how it goes on."""

import json
import os
import signal
import socket
import threading
import time
from pathlib import Path
from typing import Any

import pytest
import yaml
from interruptions import Act, begin, run
from safetensors.torch import load_file
from tiny_run import make_recipe

from selkd import distill, interrupts
from selkd.errors import Interrupted
from selkd.training.trainer import DistillTrainer

INTERRUPTED = os.EX_TEMPFAIL


def write_recipe(folder: Path, **changes: Any) -> Path:
    """A recipe whose checkpoints are those of interruptions alone, with a line of the log every third step."""
    recipe = make_recipe(folder, **{"evaluation": {"every_steps": 4}} | changes)
    recipe["training"] |= {"save_steps": 1000, "logging_steps": 3, "num_train_epochs": 1}
    path = folder / "toy.yaml"
    path.write_text(yaml.safe_dump(recipe))
    return path


def distilling(recipe: Path, out: Path, *more: str) -> list[str]:
    return ["distill", str(recipe), "--out", str(out), "--json", *more]


def result_of(path: Path) -> dict[str, Any]:
    """All that must be the same, however often the run was interrupted."""
    record = json.loads((path / "record.json").read_text())
    lines = [json.loads(line) for line in (path / "metrics.jsonl").read_text().splitlines()]
    return {
        "student": {name: tensor.tolist() for name, tensor in load_file(path / "student/model.safetensors").items()},
        "metrics": [{name: value for name, value in line.items() if name != "seconds"} for line in lines],
        "cache": (path / "teacher_cache/shard-00000.selkd").read_bytes(),
        "examples": (path / "selection/examples.json").read_text(),
        "fidelity": record["fidelity"],
        "counts": record["counts"] | {"teacher_tokens": sum_of_tokens(record)},
        "train": record["train"],
    }


def sum_of_tokens(record: dict[str, Any]) -> int:
    """The teacher's tokens, less those that cut the student: the first run on a machine does that."""
    return int(record["counts"]["teacher_tokens"] - record["teacher_tokens"].get("prune", 0))


def said(log: Path) -> list[str]:
    return [line for line in log.read_text().splitlines() if line.startswith("selkd: ")]


def test_a_run_that_is_interrupted_in_every_stage_ends_as_if_it_had_not_been(tmp_path: Path) -> None:
    recipe, out = write_recipe(tmp_path), tmp_path / "run"
    assert run(distilling(recipe, tmp_path / "whole"), tmp_path / "whole.log") == 0
    arguments, log = distilling(recipe, out), tmp_path / "log"
    elsewhere = {"SELKD_CACHE": str(tmp_path / "cache")}  # where nothing is tokenised yet
    assert run(arguments, log, Act("tokenising", 1, "SIGTERM"), elsewhere) == INTERRUPTED, log.read_text()
    for act, saved in (
        (Act("scoring", 1, "SIGUSR1"), None),
        (Act("evaluating", 1, "SIGTERM"), None),
        (Act("caching", 1, "SIGINT"), None),
        (Act("training", 2, "SIGTERM"), 2),
        (Act("evaluating", 1, "SIGUSR1"), 4),  # after step 4, whose measurement is still to come
        (Act("training", 4, "SIGINT"), 8),  # so is that of step 8
        (Act("training", 5, "SIGTERM"), 13),  # the last step
        (Act("evaluating", 1, "SIGTERM"), 13),  # after training
    ):
        log.unlink(missing_ok=True)
        assert run(arguments, log, act) == INTERRUPTED, log.read_text()
        *_, last = said(log)
        assert f"interrupted by {act.does[0].replace('SIGINT', 'Ctrl-C')}" in last
        assert last.endswith("The same command continues from there")
        steps = [int(path.name.split("-")[1]) for path in (out / "checkpoints").glob("checkpoint-*")]
        assert max(steps, default=None) == saved
    assert run(arguments, log) == 0, log.read_text()
    assert result_of(out) == result_of(tmp_path / "whole")


def test_ctrl_c_twice_ends_at_once_and_the_grace_time_is_kept(tmp_path: Path) -> None:
    recipe, log = write_recipe(tmp_path), tmp_path / "log"
    arguments = distilling(recipe, tmp_path / "run")
    assert run(arguments, log, Act("training", 2, "SIGINT", "SIGINT", hangs=True)) == 130
    assert said(log)[-1] == "selkd: ended at once. The same command continues from what was finished."
    arguments = [*arguments, "--set", "run.grace_seconds=0.5"]  # the same run, whatever its grace time
    assert run(arguments, log, Act("training", 2, "SIGTERM", hangs=True)) == INTERRUPTED
    assert "no safe point came within 0.5 s (run.grace_seconds)" in said(log)[-1]
    assert run([*arguments, "--max-hours", "1e-9"], log) == INTERRUPTED
    assert "interrupted by its time limit of 1e-09 hours" in said(log)[-1]


def test_a_study_passes_its_end_on_to_the_run_under_way(tmp_path: Path) -> None:
    recipe = yaml.safe_load(write_recipe(tmp_path).read_text())
    recipe["training"]["num_train_epochs"] = 500
    study, out, log = tmp_path / "study.yaml", tmp_path / "study", tmp_path / "log"
    study.write_text(yaml.safe_dump({"base": recipe, "seeds": [1, 2]}))
    process = begin(["sweep", str(study), "--out", str(out)], log)
    try:
        while not list(out.glob("runs/*/*/metrics.jsonl")):
            assert process.is_alive(), log.read_text()
            time.sleep(0.1)
        os.kill(process.pid, signal.SIGTERM)
    finally:
        process.join()
    assert process.exitcode == INTERRUPTED, log.read_text()
    assert "interrupted by SIGTERM at optimiser step" in said(log)[-1]
    assert len(list(out.glob("runs/*/*/checkpoints/checkpoint-*/digests.json"))) == 1
    assert json.loads((out / "study.json").read_text())["runs"] == {}


def test_distill_raises_interrupted_and_gives_signals_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    original = DistillTrainer.training_step

    def training_step(trainer: DistillTrainer, *args: Any, **kwargs: Any) -> Any:
        if trainer.state.global_step == 3:
            os.kill(os.getpid(), signal.SIGTERM)
            while interrupts.asked() is None:
                pass
        return original(trainer, *args, **kwargs)

    handlers = [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)]
    monkeypatch.setattr(DistillTrainer, "training_step", training_step)
    recipe = make_recipe(tmp_path)
    recipe["training"] |= {"enable_jit_checkpoint": True, "num_train_epochs": 1}  # a run does this in any case
    with pytest.raises(Interrupted, match="interrupted by SIGTERM at optimiser step 4 of 13, which is saved"):
        distill(recipe, tmp_path / "run")
    assert [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)] == handlers
    assert interrupts.asked() is None
    assert "selkd-watch" not in [thread.name for thread in threading.enumerate()]
    assert not (tmp_path / "run" / "student").exists()
    monkeypatch.undo()
    record = distill(recipe, tmp_path / "run").record
    assert record["train"]["steps"] == record["train"]["max_steps"] == 13


def test_an_interrupted_training_that_a_record_calls_done_goes_on(tmp_path: Path) -> None:
    """As a former version left it: a student, and a record of fewer steps than there are."""
    recipe = make_recipe(tmp_path)
    recipe["training"] |= {"num_train_epochs": 1}
    first = distill(recipe, tmp_path / "run")
    record = {key: value for key, value in first.record.items() if key not in ("digest", "inputs", "files")}
    record |= {"train": first.record["train"] | {"steps": 7}}
    (first.path / "record.json").write_text(json.dumps(record))
    assert distill(recipe, tmp_path / "run").record["train"]["steps"] == 13


def two(arguments: list[str], folder: Path, *acts: Act | None) -> tuple[list[int], list[list[str]]]:
    """The exit codes of two processes of one run, and what each says."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    logs = [folder / f"rank-{rank}.log" for rank in range(2)]
    processes = []
    for rank, (log, act) in enumerate(zip(logs, acts, strict=True)):
        log.unlink(missing_ok=True)
        environment = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": "2"}
        environment |= {"RANK": str(rank), "LOCAL_RANK": str(rank)}
        processes.append(begin(arguments, log, act, environment))
    for process in processes:
        process.join()
    return [process.exitcode for process in processes], [said(log) for log in logs]


def test_two_processes_end_together_and_say_which_one_died_of_what(tmp_path: Path) -> None:
    recipe, out = write_recipe(tmp_path, evaluation={}), tmp_path / "run"
    arguments = distilling(recipe, out)
    codes, words = two(arguments, tmp_path, None, Act("scoring", 1, "raise"))
    assert codes == [1, 1], words
    assert "rank 1 ended the run: ValueError: the memory is full of mice" in words[0][-1]
    assert "ValueError: the memory is full of mice" in words[1][-1]
    codes, words = two(arguments, tmp_path, None, Act("scoring", 1, "SIGTERM"))
    assert codes == [INTERRUPTED] * 2, words
    codes, words = two(arguments, tmp_path, None, Act("training", 2, "raise"))
    assert codes == [1, 1], words
    assert "rank 1 ended the run: ValueError: the memory is full of mice" in words[0][-1]
    codes, words = two(arguments, tmp_path, None, Act("training", 2, "SIGKILL", hangs=True))
    assert codes == [1, -signal.SIGKILL], words
    assert words[0][-1].startswith("selkd: rank 1 ended the run: it ended without a word")
    codes, words = two(arguments, tmp_path, None, Act("training", 3, "SIGUSR1"))
    assert codes == [INTERRUPTED] * 2, words
    assert "at optimiser step 3 of" in words[0][-1]
    assert "at optimiser step 3 of" in words[1][-1]
    codes, words = two(arguments, tmp_path, None, None)
    assert codes == [0, 0], words
