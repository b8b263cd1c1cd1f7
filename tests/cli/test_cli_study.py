"""The commands report, estimate and sweep as a user meets them: answers, JSON, exit codes."""

import json
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import yaml
from tiny_run import make_recipe

from selkd.cli.main import main

Command = Callable[..., tuple[int, str, str]]


@pytest.fixture
def selkd(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Command:
    """Exit code, standard output and standard error of a command, in this process."""

    def run(*arguments: object) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["selkd", *map(str, arguments)])
        with pytest.raises(SystemExit) as exit_info:
            main()
        captured = capsys.readouterr()
        return int(exit_info.value.code or 0), captured.out, captured.err

    return run


def make_run(folder: Path, name: str, perplexity: float) -> Path:
    folder.mkdir()
    recipe = {"seed": 1, "positions": {"policy": name}}
    record = {"name": name, "recipe": recipe, "fidelity": {"after": {"perplexity": perplexity, "kl_nats": 1.0}}}
    (folder / "record.json").write_text(json.dumps(record))
    (folder / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    return folder


def test_report_of_one_run_writes_its_page(selkd: Command, tmp_path: Path) -> None:
    run = make_run(tmp_path / "a", "all", 30.0)
    code, out, _ = selkd("report", run, "--json")
    assert (code, json.loads(out)) == (0, {"report": str(run / "report.html")})
    assert "30.0" in (run / "report.html").read_text()
    code, out, _ = selkd("report", run, "--out", tmp_path / "elsewhere")
    assert code == 0
    assert (tmp_path / "elsewhere" / "report.html").exists()
    code, _, err = selkd("report", run, "--baseline", "all")
    assert (code, "one run has nothing to differ from" in err) == (2, True)


def test_report_of_several_runs(selkd: Command, tmp_path: Path) -> None:
    runs = [make_run(tmp_path / name, name, perplexity) for name, perplexity in (("all", 30.0), ("top_k", 31.5))]
    out_dir = tmp_path / "both"
    code, out, _ = selkd("report", *runs, "--out", out_dir, "--baseline", "top_k", "--json")
    answer = json.loads(out)
    assert (code, answer["report"], answer["baseline"]) == (0, str(out_dir / "report.html"), "top_k")
    assert answer["recipes"][0]["figures"]["perplexity"]["difference"]["mean"] == -1.5
    code, out, _ = selkd("report", *runs, "--out", out_dir)
    assert (code, "|" in out, "31.5" in out, "+1.50" in out) == (0, False, True, True)
    code, out, _ = selkd("report", *runs, "--out", out_dir, "--markdown")
    assert code == 0
    assert "| top_k | 1 | 31.5 (+1.50) |" in out
    (tmp_path / "all" / "record.json").write_text("{")
    code, out, err = selkd("report", *runs, "--out", out_dir)
    assert (code, f"Failed: {tmp_path / 'all'}" in out, "1 damaged run left out" in err) == (1, True, True)
    code, _, err = selkd("report", tmp_path, runs[0], "--out", out_dir)
    assert (code, "is not a run directory" in err) == (2, True)


def test_estimate_answers_people_and_machines(selkd: Command, tmp_path: Path) -> None:
    recipe = tmp_path / "toy.yaml"
    recipe.write_text(yaml.safe_dump(make_recipe(tmp_path)))
    code, out, err = selkd("estimate", recipe, "--gpus", 2, "--tokens", 3200, "--json")
    assert code == 0, err
    answer = json.loads(out)
    assert (answer["device"], answer["devices"], answer["data"]["samples"]) == ("accelerator", 2, 100)
    code, out, _ = selkd("estimate", recipe, "--set", "training.optim=sgd")
    assert code == 0
    for told in ("33.7k parameters", "52 of 172", "peak to train", "student, gradients", "note: time: not known"):
        assert told in out
    assert "optimiser  " not in out.replace("optimiser steps", "")  # plain SGD keeps nothing
    code, _, err = selkd("estimate", recipe, "--set", "positions.fraction=2")
    assert (code, "positions.fraction" in err) == (2, True)


def test_sweep_refuses_bad_studies_and_tells_of_failed_runs(
    selkd: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    study, base = tmp_path / "mine.yaml", make_recipe(tmp_path, student={"prune_from_teacher": {"layers": 9}})
    study.write_text(yaml.safe_dump({"base": base, "grid": {"positions.fraktion": [0.1]}}))
    code, out, err = selkd("sweep", study, "--out", tmp_path / "study")
    assert (code, out) == (2, "")
    assert "Did you mean 'fraction'?" in err
    assert not (tmp_path / "study").exists()

    study.write_text(yaml.safe_dump({"base": base, "grid": {"positions.fraction": [0.1]}, "seeds": [1]}))
    code, out, err = selkd("sweep", study, "--out", tmp_path / "study", "--set", "seed=4")
    assert (code, "overrides.seed" in err) == (2, True)
    code, out, err = selkd("sweep", study, "--out", tmp_path / "study", "--json")
    assert code == 1
    answer = json.loads(out)
    assert answer["table"] is None
    assert "1 to 3 can be kept" in answer["failed"]["fraction-0.1/seed-1"]
    assert "1 run failed; the same command tries again" in err
    assert "InputError" in (tmp_path / "study" / "logs" / "fraction-0.1" / "seed-1.log").read_text()
