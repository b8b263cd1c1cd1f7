"""A disk that is full at every write: the file is named, nothing finished is lost, and the same command continues."""

import os
import resource
import shutil
import signal
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from test_pipeline import metrics_of
from tiny_run import make_recipe

from selkd import distill
from selkd.errors import RunError
from selkd.files import LOCK, is_temporary
from selkd.training.callbacks import StepLines


def toy(folder: Path) -> dict[str, Any]:
    """A short run that writes every kind of file: scores, a cache, checkpoints, adapters, a best student, a student."""
    recipe = make_recipe(folder, student={"prune_from_teacher": {"layers": 2}, "lora": {"rank": 2}})
    recipe["training"] |= {"num_train_epochs": 1, "save_steps": 5}
    recipe["evaluation"] = {"suite": ["fidelity"], "every_steps": 6, "keep_best": "kl_nats"}
    return recipe


def attempt(recipe: dict[str, Any], out: Path, before: Callable[[], object] = lambda: None) -> str:
    """What came of a run in a process of its own: its error, or "" when it is done."""
    reading, writing = os.pipe()
    if (child := os.fork()) == 0:
        before()
        try:
            distill(recipe, out)
            said = ""
        except BaseException as error:  # noqa: BLE001
            said = f"{type(error).__name__}: {error}"
        os.write(writing, said.encode())
        os._exit(0)
    os.close(writing)
    with os.fdopen(reading) as answer:
        said = answer.read()
    assert os.waitpid(child, 0)[1] == 0
    return said


def limit_files(size: int) -> None:
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, size))


def files_below(*folders: Path) -> dict[Path, int]:
    return {path: path.stat().st_size for folder in folders for path in folder.rglob("*") if path.is_file()}


def require_equal(run: Path, straight: Path) -> None:
    ours, theirs = (load_file(folder / "student" / "model.safetensors") for folder in (run, straight))
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)
    plain = [[{**line, "seconds": 0} for line in metrics_of(folder)] for folder in (run, straight)]
    assert plain[0] == plain[1]
    assert not [path for path in run.rglob("*") if is_temporary(path.name) or path.name == LOCK]


@pytest.mark.slow
def test_at_every_limit_of_a_files_size_the_file_is_named_and_the_run_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The limit rises through the sizes of the run's own files, so that each is the first that does not fit."""
    recipe, cache = toy(tmp_path), tmp_path / "cache"
    monkeypatch.setenv("SELKD_CACHE", str(cache))
    straight = distill(recipe, tmp_path / "straight").path
    sizes = {path.name: size for path, size in files_below(straight).items()}
    kinds = ("recipe.yaml", "samples.parquet", "record.json", "adapter_model.safetensors", "optimizer.pt",
             "model.safetensors", "report.html")  # fmt: skip
    named, done = set(), False
    for limit in sorted([10, sizes["recipe.yaml"] + 20, *(sizes[name] - 1 for name in kinds)]):
        said = attempt(recipe, tmp_path / "run", lambda limit=limit: limit_files(limit))
        done = not said
        if said:
            assert said.startswith("RunError: "), said
            assert "can't be written" in said or "could not be finished" in said
            assert str(tmp_path / "run") in said
            named.add(said.removeprefix("RunError: ").split()[0].rpartition("/")[2])
    assert named >= {LOCK, "recipe.yaml", "record.json", "samples.parquet", "model.safetensors", "optimizer.pt"}, named
    if not done:
        assert attempt(recipe, tmp_path / "run") == ""
    require_equal(tmp_path / "run", straight)
    # The cache folder's own files, the first time that anything is written there.
    monkeypatch.setenv("SELKD_CACHE", str(tmp_path / "new cache"))
    cached = files_below(cache)
    for kind, name in (("fingerprints", ".json"), ("tokenised", "train.arrow"), ("students", "model.safetensors")):
        size = max(size for path, size in cached.items() if kind in path.parts and path.name.endswith(name))
        shutil.rmtree(tmp_path / "new cache", ignore_errors=True)
        if kind == "students":
            shutil.copytree(cache / "tokenised", tmp_path / "new cache" / "tokenised")
        said = attempt(recipe, tmp_path / "other", lambda size=size: limit_files(size - 1))
        assert said.startswith("RunError: "), said
        assert kind in said
        assert name in said
        assert not (tmp_path / "other").exists()


def test_a_line_of_metrics_that_does_not_fit_names_its_file() -> None:
    with pytest.raises(RunError, match=r"^/dev/full can't be written .*No space left on device"):
        StepLines(Path("/dev/full")).append([{"step": 1, "loss": 0.5}])


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A disk in memory of 64 KiB."""
    disk = tmp_path / "disk"
    disk.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", disk], capture_output=True, check=False
    )
    if mounted.returncode:
        pytest.skip("no disk can be mounted here")
    yield disk
    subprocess.run(["umount", "--lazy", disk], check=True)


@pytest.mark.slow
def test_a_disk_that_grows_takes_the_run_a_little_further_each_time(small_disk: Path, tmp_path: Path) -> None:
    recipe = toy(tmp_path)
    straight = distill(recipe, tmp_path / "straight").path
    attempts, size = [attempt(recipe, small_disk / "run")], 64
    while attempts[-1] and size < 20_000:
        size *= 2
        subprocess.run(["mount", "-o", f"remount,size={size}k", small_disk], check=True)
        attempts.append(attempt(recipe, small_disk / "run"))
    assert len(attempts) > 3
    for said in attempts[:-1]:
        assert said.startswith("RunError: "), said
        assert "can't be written" in said or "could not be finished" in said
        assert str(small_disk) in said
    assert attempts[-1] == ""
    require_equal(small_disk / "run", straight)
    subprocess.run(["mount", "-o", "remount,ro", small_disk], check=True)
    before = files_below(small_disk)
    assert attempt(recipe, small_disk / "run") == ""  # finished: it needs no lock and writes nothing
    assert "expected a folder that can be made and written" in attempt(recipe, small_disk / "new")
    assert files_below(small_disk) == before
