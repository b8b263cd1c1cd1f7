"""The tutorial's commands, one after the other, on a toy teacher in place of the demo's."""

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml
from test_pages import arguments, blocks, commands, run
from tiny import V
from tiny_run import make_teacher

ROOT = Path(__file__).parents[2]
TUTORIAL = ROOT / "docs" / "tutorial.md"
EXAMPLE = ROOT / "examples" / "tutorial"


def as_toy_words(value: Any) -> Any:
    """Every word of the texts in a row is one that the toy tokenizer knows."""
    match value:
        case str():
            return " ".join(f"w{2 + sum(map(ord, word)) % (V - 2)}" for word in value.split())
        case list():
            return [as_toy_words(item) for item in value]
        case dict():
            return {key: as_toy_words(item) for key, item in value.items()}
    return value


def test_the_recipe_is_the_examples() -> None:
    (shown,) = blocks(TUTORIAL, "yaml")
    assert yaml.safe_load(shown) == yaml.safe_load((EXAMPLE / "recipe.yaml").read_text(encoding="utf-8"))


def test_the_tutorial_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    here = tmp_path / "examples" / "tutorial"
    shutil.copytree(EXAMPLE, here, ignore=shutil.ignore_patterns("*.jsonl", "runs"))
    (tmp_path / "docs").mkdir()
    for page in ("index", "python", "recipe", "scaling", "evaluation", "troubleshooting"):
        shutil.copy(ROOT / "docs" / f"{page}.md", tmp_path / "docs")
    monkeypatch.chdir(here)
    (line,) = re.findall(r"^python (.*)$", "\n".join(blocks(TUTORIAL, "sh")), re.MULTILINE)
    subprocess.run([sys.executable, *line.split()], check=True, capture_output=True)
    make_teacher(here / "toy")
    recipe = yaml.safe_load((here / "recipe.yaml").read_text(encoding="utf-8"))
    recipe["student"]["prune_from_teacher"]["layers"] = 2
    recipe["data"] |= {"max_length": 32, "held_out_fraction": 0.3}  # few documents, of which chance may choose none
    recipe["training"] |= {"use_cpu": True, "bf16": False, "max_steps": 2}
    (here / "recipe.yaml").write_text(yaml.safe_dump(recipe | {"teacher": {"model": "toy", "dtype": "float32"}}))
    for path in (here / "pages.jsonl", here / "next_sentence" / "questions.jsonl"):
        rows = [as_toy_words(json.loads(row)) for row in path.read_text(encoding="utf-8").splitlines()]
        path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    for command in commands(TUTORIAL):
        words = [re.sub(r"^(teacher=)?demo$", r"\1toy", word) for word in arguments(command)]
        assert run(monkeypatch, words) == 0, f"{command}\n{capsys.readouterr().err}"
    for left in ("tokens.html", "runs/selected/report.html", "comparison/report.html"):
        assert (here / left).is_file(), left
    (code,) = blocks(TUTORIAL, "python")
    exec(compile(code, "tutorial.md", "exec"), {})
    capsys.readouterr()
