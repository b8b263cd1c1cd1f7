"""The command line as a user meets it: exit codes, messages, JSON, and a quick ``--help``."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pyarrow.parquet as pq
import pytest
import yaml
from tiny_run import make_recipe

from selkd.cli.main import main


def selkd(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], *arguments: object
) -> tuple[int, str, str]:
    """Exit code, standard output and standard error of a command, in this process."""
    monkeypatch.setattr(sys, "argv", ["selkd", *map(str, arguments)])
    with pytest.raises(SystemExit) as exit_info:
        main()
    captured = capsys.readouterr()
    return int(exit_info.value.code or 0), captured.out, captured.err


@pytest.fixture
def run_selkd(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]):
    return lambda *arguments: selkd(monkeypatch, capsys, *arguments)


def test_help_needs_no_torch() -> None:
    code = "import sys; from selkd.cli.main import main; sys.argv = ['selkd', '--help']\n"
    code += "try: main()\nexcept SystemExit: pass\n"
    code += (
        "print([name for name in ('torch', 'transformers', 'numpy', 'pydantic', 'datasets') if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "[]"
    for command in (
        "demo",
        "distill",
        "score",
        "cache",
        "recipes",
        "tokens",
        "prune-student",
        "report",
        "estimate",
        "sweep",
    ):
        assert command in done.stdout


def test_a_shell_completes_commands_and_recipes_without_torch() -> None:
    code = "import sys; sys.argv = ['selkd']\nfrom selkd.cli.main import main\ntry: main()\nfinally: "
    code += "print('torch' in sys.modules, file=sys.stderr)\n"
    for line, expected in (
        ("selkd di", ["distill"]),
        ("selkd distill se_kd_3", ["se_kd_3x", "se_kd_3x_systematic"]),
        ("selkd recipes dem", ["demo"]),
    ):
        words = {"_SELKD_COMPLETE": "complete_bash", "COMP_WORDS": line, "COMP_CWORD": str(len(line.split()) - 1)}
        done = subprocess.run(
            [sys.executable, "-c", code], capture_output=True, text=True, check=False, env=os.environ | words
        )
        assert done.stdout.split() == expected, done.stderr
        assert done.stderr.split() == ["False"]


def test_the_exit_code_is_right_where_nobody_reads_standard_error() -> None:
    reader, writer = os.pipe()
    os.close(reader)
    done = subprocess.run([sys.executable, "-m", "selkd", "distill", "none such"], stderr=writer, check=False)
    os.close(writer)
    assert done.returncode == 2


def test_recipes_lists_and_prints(run_selkd) -> None:
    code, out, _ = run_selkd("recipes")
    assert code == 0
    assert "se_kd_3x" in out
    code, out, _ = run_selkd("recipes", "se_kd")
    assert yaml.safe_load(out)["positions"]["fraction"] == 0.2
    code, out, _ = run_selkd("recipes", "--json")
    assert "full_kd" in json.loads(out)
    code, _, err = run_selkd("recipes", "se_k")
    assert code == 2
    assert "Did you mean 'se_kd'" in err


def test_bad_input_exits_with_2_and_one_message(run_selkd, tmp_path: Path) -> None:
    recipe = tmp_path / "toy.yaml"
    recipe.write_text(yaml.safe_dump(make_recipe(tmp_path)))
    (tmp_path / "empty.txt").write_text(" \n")
    cases = {
        ("distill", "no_such_recipe"): "neither a named recipe nor a file",
        ("distill", recipe, "--set", "positions.fraction=2"): "positions.fraction",
        ("distill", recipe, "--set", f"teacher.model={tmp_path}/none/here/x"): "there is no such folder",
        ("distill", recipe, "--set", f"data.path={tmp_path}/none.jsonl"): "data.path",
        ("distill", recipe, "--set", f"data.path={tmp_path}/empty.txt"): "holds no text",
        ("distill", recipe, "--set", "data.text_field=body"): "data.text_field",
        ("distill", recipe, "--set", "data.streaming=true"): "data.streaming: only hub data sets are streamed",
        ("distill", recipe, "--set", "data.path=demo", "--set", "data.text_field=x"): "data.text_field: the demo text",
        ("distill", recipe, "--set", "data.max_length=128"): "has positions for 64",
        ("distill", recipe, "--set", "data.tokens=8"): "fewer than one sample",
        ("distill", recipe, "--set", "student.prune_from_teacher.layers=4"): "1 to 3 can be kept",
        ("distill", recipe, "--set", "training.report_to=wandb"): "needs the package wandb: pip install",
        ("distill", recipe, "--set", "training.optim=adamw_bnb_8bit"): "needs the package bitsandbytes: pip install",
        ("cache", "inspect", tmp_path): "not a teacher cache",
        ("cache", "build", recipe, "--set", "cache=null"): "keeps the teacher live",
    }
    for number, (arguments, message) in enumerate(cases.items()):
        out_option = ("--out", tmp_path / f"run{number}") if arguments[1] != "inspect" else ()
        code, out, err = run_selkd(*arguments, *out_option)
        assert code == 2, (arguments, err)
        assert out == ""
        assert message in err
        assert "Traceback" not in err


def test_debug_shows_where(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["selkd", "distill", "no_such_recipe", "--debug"])
    with pytest.raises(ValueError, match="neither a named recipe"):
        main()


def test_the_stages_by_themselves_and_then_the_rest(run_selkd, tmp_path: Path) -> None:
    recipe, run = tmp_path / "toy.yaml", tmp_path / "run"
    recipe.write_text(yaml.safe_dump(make_recipe(tmp_path)))
    code, out, err = run_selkd("score", recipe, "--out", run, "--json")
    assert code == 0, err
    scored = json.loads(out)
    assert scored["samples_kept"] < scored["samples"]
    code, out, _ = run_selkd("cache", "build", recipe, "--out", run, "--json")
    built = json.loads(out)
    assert built["samples"] == scored["samples_kept"]
    shard = run / "teacher_cache" / "shard-00000.selkd"
    stamp = shard.stat().st_mtime_ns
    code, out, _ = run_selkd("distill", recipe, "--out", run, "--json")
    record = json.loads(out)
    assert record["teacher_cache"] == built
    assert shard.stat().st_mtime_ns == stamp
    code, out, _ = run_selkd("cache", "inspect", run / "teacher_cache", "--json")
    assert built.items() <= json.loads(out).items()
    assert json.loads(run_selkd("cache", "inspect", run, "--json")[1]) == json.loads(out)
    for folder in (run / "teacher_cache", run):
        code, out, _ = run_selkd("cache", "verify", folder)
        assert (code, re.fullmatch(r"whole: 1 shard, [\d.]+ kB", out.strip()) is not None) == (0, True), out
    code, out, _ = run_selkd("cache", "export", run, tmp_path / "cache.parquet")
    assert (code, f"{built['samples']} samples" in out) == (0, True)
    assert pq.read_metadata(tmp_path / "cache.parquet").num_rows == built["samples"]
    code, _, err = run_selkd("cache", "export", run, tmp_path / "cache.parquet")
    assert (code, "already there" in err) == (2, True)
    assert run_selkd("cache", "export", run, tmp_path / "cache.parquet", "--force")[0] == 0
    damaged = bytearray(shard.read_bytes())
    damaged[len(damaged) // 2] ^= 1
    shard.write_bytes(damaged)
    code, out, _ = run_selkd("cache", "verify", run / "teacher_cache")
    assert code == 1
    assert "shard-00000.selkd" in out


def test_the_table_is_for_people(run_selkd, tmp_path: Path) -> None:
    recipe = tmp_path / "toy.yaml"
    recipe.write_text(yaml.safe_dump(make_recipe(tmp_path)))
    code, out, _ = run_selkd("distill", recipe, "--out", tmp_path / "run")
    assert code == 0
    assert "perplexity" in out
    assert str(tmp_path / "run" / "report.html") in out.replace("\n", "")


def test_prune_student_makes_an_ordinary_model(run_selkd, tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    make_recipe(tmp_path)
    arguments = ("prune-student", "--teacher", tmp_path / "teacher", "--data", tmp_path / "text.jsonl", "--layers", 3)
    code, out, err = run_selkd(*arguments, "--out", tmp_path / "student", "--json")
    assert code == 0, err
    answer = json.loads(out)
    assert len(answer["kept_layers"]) == 3
    assert len(answer["influence"]) == 4
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "student").config.num_hidden_layers == 3
    code, _, err = run_selkd(*arguments, "--out", tmp_path / "student")
    assert code == 2
    assert "exists" in err
