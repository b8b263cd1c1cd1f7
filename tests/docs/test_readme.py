"""What the README shows is what runs."""

import re
import sys
from pathlib import Path

import pytest
import yaml
from tiny_run import make_recipe

from selkd.cli.main import main
from selkd.plugins import Criterion, Metric, Policy, Sampler
from selkd.recipe.files import named_recipes

README = (Path(__file__).parents[2] / "README.md").read_text()
FRAMEWORK = (Path(__file__).parents[2] / "docs" / "framework.md").read_text(encoding="utf-8")


def blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", README, re.DOTALL)


def test_the_python_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With the toy teacher in place of the hub's models, and as short a run."""
    make_recipe(tmp_path)
    monkeypatch.chdir(tmp_path)
    (code,) = blocks("python")
    code = re.sub(r"Qwen/Qwen3-[\w.]+", "teacher", code).replace(
        '"out"', '"out", max_steps=1, data={"max_length": 64}, use_cpu=True, report_to="none"'
    )
    exec(compile(code, "README.md", "exec"), {})


def test_the_recipe_is_the_named_one() -> None:
    (shown,) = blocks("yaml")
    assert yaml.safe_load(shown) == yaml.safe_load(named_recipes()["se_kd_3x"])


@pytest.mark.parametrize(
    ("key", "names"),
    [
        ("criterion.name", [*Criterion.builtin()]),
        ("positions.metric", [*Metric.builtin()]),
        ("positions.policy", [*Policy.builtin()]),
        ("classes.sampler", [*Sampler.builtin()]),
        ("samples.metric", [*Metric.of_samples(), "all"]),
    ],
)
def test_the_table_of_choices_names_each(key: str, names: list[str]) -> None:
    (row,) = re.findall(rf"^\| `{key}` \|(.*)\|$", FRAMEWORK, re.MULTILINE)
    assert set(names) <= set(re.findall(r"`(\w+)`", row))


def test_every_command_that_is_named_exists(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    commands = {tuple(match.split()) for match in re.findall(r"^    selkd ((?:cache )?[a-z-]+)", README, re.MULTILINE)}
    assert len(commands) >= 8
    for command in commands:
        monkeypatch.setattr(sys, "argv", ["selkd", *command, "--help"])
        with pytest.raises(SystemExit) as exit_info:
            main()
        assert exit_info.value.code == 0, command
    capsys.readouterr()
