"""A finished run: nothing writes to it, what it lost is made again or told, and ``selkd verify`` checks it."""

import ctypes
import json
import os
import shutil
import sys
from collections.abc import Callable, Iterator
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path
from typing import Any

import pytest
import xxhash
from test_inputs import contents, killed_at, short_recipe

from selkd import distill
from selkd.cli.main import main
from selkd.errors import InputError
from selkd.recipe.part import parse_part
from selkd.recipe.recipe import Recipe
from selkd.run.pipeline import cache_only, score_only
from selkd.run.verify import verify_run
from selkd.sealed import unsealed
from selkd.selection.samples import SampleScores

Command = Callable[..., tuple[int, str, str]]


@pytest.fixture
def selkd(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Command:
    """Runs a command in this process: its exit code, standard output and standard error."""

    def run(*arguments: object) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["selkd", *map(str, arguments)])
        with pytest.raises(SystemExit) as exit_info:
            main()
        return int(exit_info.value.code or 0), *capsys.readouterr()

    return run


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Path, dict[str, Any]]]:
    """A finished run with selected samples, a cache and fidelity, and its recipe."""
    folder = tmp_path_factory.mktemp("finished")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("SELKD_CACHE", str(folder / "selkd"))
        recipe = short_recipe(folder) | {"evaluation": {"suite": ["fidelity"]}}
        yield distill(recipe, folder / "run").path, recipe


@pytest.fixture
def recipe(made: tuple[Path, dict[str, Any]]) -> dict[str, Any]:
    return made[1]


@pytest.fixture
def run(made: tuple[Path, dict[str, Any]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("SELKD_CACHE", str(made[0].parent / "selkd"))
    return Path(shutil.copytree(made[0], tmp_path / "run"))


def test_no_command_changes_a_finished_run(run: Path, recipe: dict[str, Any], selkd: Command) -> None:
    before, record = contents(run), unsealed(run / "record.json")
    for stage in (distill, score_only, cache_only):
        assert stage(parse_part(Recipe, recipe), run).record == record
    assert selkd("report", run)[0] == selkd("verify", run)[0] == 0
    looks: list[tuple[object, ...]] = [
        ("distill", run / "recipe.yaml", "--out", run),
        ("score", run / "recipe.yaml", "--out", run),
        ("cache", "build", run / "recipe.yaml", "--out", run),
        ("cache", "verify", run / "teacher_cache", "--rescore", 2),
        ("cache", "verify", run),
        ("cache", "inspect", run, "--json"),
        ("eval", run, "--text", recipe["data"]["path"], "--limit", 1, "--out", run.parent / "evals"),
        ("tokens", run / "student", "w2 w3 w4 w5 w6 w7", "--json"),
    ]
    for command in looks:
        code, _, said = selkd(*command)
        assert code == 0, (command, said)
        assert contents(run) == before, command


def test_a_record_says_what_it_is_a_digest_of(run: Path) -> None:
    """As the page tells a reader to check it."""
    text = (run / "record.json").read_text()
    digest = json.loads(text)["digest"]
    assert xxhash.xxh3_128_hexdigest(text.replace(digest, "0" * 32).encode()) == digest
    files = json.loads(text)["files"]
    apart = ("teacher_cache/", "checkpoints/", "record.json")
    assert files.keys() - {"teacher_cache/cost.json"} == {name for name in contents(run) if not name.startswith(apart)}
    assert all(xxhash.xxh3_128_hexdigest((run / name).read_bytes()) == digest for name, digest in files.items())


def damage(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


SELECTION = ["selection/examples.json", "selection/overlap.json", "fidelity.json", "held_out.json"]
TOKENIZER = ["student/tokenizer.json", "student/tokenizer_config.json"]


def test_what_can_be_made_again_is_made_again(run: Path, recipe: dict[str, Any]) -> None:
    before = contents(run)
    for name in [*SELECTION, *TOKENIZER, "report.html", "student/README.md", "recipe.yaml"]:
        (run / name).unlink()
    assert len(verify_run(run).problems) == 9
    distill(recipe, run)
    assert contents(run) == before
    for name in [*SELECTION, "report.html"]:
        damage(run / name)
    (run / "recipe.yaml").write_text((run / "recipe.yaml").read_text() + "# another line\n")
    distill(recipe, run)
    assert contents(run) == before
    scores = SampleScores.read(run / "selection" / "samples.parquet")
    damage(run / "selection" / "samples.parquet")
    distill(recipe, run)
    again = SampleScores.read(run / "selection" / "samples.parquet")  # but for the seconds that it took
    assert (again.sample_ids, again.fingerprint) == (scores.sample_ids, scores.fingerprint)
    assert (again.scores == scores.scores).all()
    assert (again.kept == scores.kept).all()
    assert verify_run(run).problems == []
    (run / "student" / "README.md").write_text("my own words")
    distill(recipe, run)
    assert (run / "student" / "README.md").read_text() == "my own words"
    assert verify_run(run).problems == []
    assert "student/README.md" in verify_run(run).notes[0]


@pytest.mark.parametrize("name", ["metrics.jsonl", "student/tokenizer.json", "student/generation_config.json"])
def test_what_can_not_is_told_with_a_remedy_that_works(run: Path, recipe: dict[str, Any], name: str) -> None:
    before = contents(run)
    if name.endswith("generation_config.json"):
        (run / name).unlink()
    else:
        damage(run / name)
    with pytest.raises(InputError, match=f"the run is finished, but {name} is") as told:
        distill(recipe, run)
    remedies = {
        "metrics.jsonl": ("move student and checkpoints away and run again to train anew", ["student", "checkpoints"]),
        "student/tokenizer.json": ("move it away and run again", ["student/tokenizer.json"]),
        "student/generation_config.json": ("move the folder student away", ["student"]),
    }
    words, moved = remedies[name]
    assert words in str(told.value)
    for place in moved:
        shutil.move(run / place, run.parent / Path(place).name)
    distill(recipe, run)
    assert verify_run(run).problems == []
    after = contents(run)
    timed = ("record", "metrics", "checkpoints", "report", "student/README")  # have seconds in them
    same = {file for file in before if not file.startswith(timed)}
    assert {file for file in same if after[file] != before[file]} == set()


def obey_modes() -> None:
    """Give up the privileges by which root writes where the modes say that nobody may."""
    version, nothing = (ctypes.c_uint32 * 2)(0x20080522, 0), (ctypes.c_uint32 * 6)()
    assert ctypes.CDLL(None).capset(version, nothing) == 0


def test_a_finished_run_on_a_disk_that_can_not_be_written(run: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """The modes of folder and files stand in for the disk."""
    before = contents(run)
    for path in (run, *run.rglob("*")):
        path.chmod(0o555 if path.is_dir() else 0o444)
    answers = run.parent / "answers"

    def as_reader(*arguments: object) -> int:
        child = os.fork()
        if child == 0:
            code = 70
            try:
                if os.geteuid() == 0:
                    obey_modes()
                sys.argv = ["selkd", *map(str, arguments)]
                main()
            except SystemExit as stop:
                code = int(stop.code or 0)
            finally:
                sys.stdout.flush()
                sys.stderr.flush()
                os._exit(code)
        return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])

    assert as_reader("distill", run / "recipe.yaml", "--out", run) == 0
    assert "student" in capfd.readouterr().out
    assert as_reader("verify", run) == 0
    assert as_reader("report", run) == 0
    (run / "report.html").chmod(0o644)
    (run / "report.html").write_text("another page")
    (run / "report.html").chmod(0o444)
    capfd.readouterr()
    assert as_reader("report", run) == 2
    assert f"{run}: the page can't be written there" in (said := capfd.readouterr().err)
    assert "--out" in said
    assert as_reader("report", run, "--out", answers) == 0
    assert (answers / "report.html").read_bytes() == before["report.html"]
    assert contents(run) | {"report.html": b""} == before | {"report.html": b""}


def test_every_flipped_bit_is_found(run: Path) -> None:
    spec = spec_from_file_location("damage", Path(__file__).parents[2] / "benchmarks" / "damage.py")
    assert spec is not None
    assert spec.loader is not None
    script = module_from_spec(spec)
    spec.loader.exec_module(script)
    before = contents(run)
    assert [file for file, verdict in script.flips(run, 40, 1) if verdict == script.MISSED] == []
    assert contents(run) == before


def test_verify_names_what_is_wrong(run: Path, recipe: dict[str, Any], selkd: Command) -> None:
    code, out, _ = selkd("verify", run, "--json")
    whole = json.loads(out)
    assert code == 0
    assert whole["finished"]
    assert whole["problems"] == []
    assert {"record.json", "student/model.safetensors", "teacher_cache", "checkpoints/checkpoint-4"} <= {
        *whole["whole"]
    }
    damage(run / "student" / "model.safetensors")
    damage(run / "checkpoints" / "checkpoint-4" / "optimizer.pt")
    damage(run / "teacher_cache" / "shard-00000.selkd")
    (run / "selection" / "examples.json").unlink()
    code, out, _ = selkd("verify", run, "--json")
    assert code == 1
    named = ["selection/examples.json is missing", "student/model.safetensors is changed"]
    named += ["teacher_cache: shard-00000.selkd", "checkpoints/checkpoint-4: optimizer.pt"]
    problems = json.loads(out)["problems"]
    assert all(any(problem.startswith(name) for problem in problems) for name in named), problems
    assert len(problems) == len(named)
    code, _, err = selkd("verify", run.parent)
    assert code == 2
    assert "no run: neither record.json nor recipe.yaml is there" in err
    with pytest.raises(InputError, match="changed since it was saved"):
        distill(recipe, run)


def test_a_finished_run_does_without_its_cache(run: Path, recipe: dict[str, Any]) -> None:
    shutil.rmtree(run / "teacher_cache")
    before = contents(run)
    distill(recipe, run)
    assert contents(run) == before
    assert (verify_run(run).problems, verify_run(run).notes) == (
        [],
        ["teacher_cache: it is gone; the finished run does without"],
    )


def test_verify_of_a_run_that_is_under_way(tmp_path: Path) -> None:
    """A line that was cut off in writing is no damage: the training that goes on drops it. One in the middle is."""
    recipe = short_recipe(tmp_path)
    with killed_at(3):
        distill(recipe, tmp_path / "run")
    metrics = tmp_path / "run" / "metrics.jsonl"
    with metrics.open("a") as file:
        file.write('{"step": 3, "lo')
    checked = verify_run(tmp_path / "run")
    assert checked.problems == []
    assert not checked.finished
    assert "no digests, as it is not finished" in checked.notes[0]
    text = metrics.read_text()
    metrics.write_text(text.replace("step", "st\x00ep", 1))
    assert "metrics.jsonl, line 1: expected JSON" in verify_run(tmp_path / "run").problems[0]
    metrics.write_text(text)
    assert distill(recipe, tmp_path / "run").record["train"]["steps"] == 5
    assert [json.loads(line)["step"] for line in metrics.read_text().splitlines()] == [1, 2, 3, 4, 5]
