"""A user's own code runs where a recipe is run, is named before, and never runs where a run is only looked at."""

import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import yaml
from tiny_run import make_recipe

from selkd.cli.main import main
from selkd.errors import InputError
from selkd.recipe.files import load_recipe, stored_recipe
from selkd.recipe.part import parse_part
from selkd.recipe.recipe import Recipe
from selkd.run.directory import RunDirectory
from selkd.sweep.study import Study, expand
from selkd.sweep.sweep import sweep

Command = Callable[..., tuple[int, str]]


@pytest.fixture
def selkd(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Command:
    """Runs a command in this process; returns its exit code and standard error."""

    def run(*arguments: object) -> tuple[int, str]:
        monkeypatch.setattr(sys, "argv", ["selkd", *map(str, arguments)])
        capsys.readouterr()  # what the making of models said
        with pytest.raises(SystemExit) as stop:
            main()
        return int(stop.value.code or 0), capsys.readouterr().err

    return run


@pytest.fixture
def trap(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[str, Path]:
    """The name of a module in the current folder, and the file that it leaves when it is imported."""
    name, left = f"trap_of_{tmp_path.name}".replace("-", "_"), tmp_path / "was imported"
    function = "def part(student_logits):\n    return student_logits[:, 0]\n"
    (tmp_path / f"{name}.py").write_text(f"from pathlib import Path\n\nPath({str(left)!r}).touch()\n\n\n{function}")
    monkeypatch.chdir(tmp_path)
    return name, left


def own_recipe(folder: Path, module: str, **changes: object) -> Path:
    path = folder / "own.yaml"
    own = {"positions": {"metric": f"{module}:part"}, "samples": None, "cache": None, "classes": {"sampler": "all"}}
    path.write_text(yaml.safe_dump(make_recipe(folder, **{**own, **changes})))
    return path


def test_looking_at_a_foreign_run_imports_nothing(selkd: Command, trap: tuple[str, Path], tmp_path: Path) -> None:
    module, left = trap
    foreign, other = tmp_path / "runs" / "toy" / "seed-3", tmp_path / "other.yaml"
    foreign.mkdir(parents=True)
    plain = make_recipe(tmp_path)
    own = {"policy": f"{module}:part", "metric": None, "scoring": None}
    content = parse_part(Recipe, plain).resolved()
    content["positions"] = {**content["positions"], **own}
    (foreign / "recipe.yaml").write_text(yaml.safe_dump(content))
    (foreign / "record.json").write_text("{}")
    (tmp_path / "study.json").write_text('{"study": "s", "runs": {}}')
    other.write_text(yaml.safe_dump(plain))
    for arguments, expected in (
        (("report", foreign), 0),
        (("report", foreign, "--out", tmp_path / "beside"), 0),
        (("eval", foreign, "--out", tmp_path / "evals"), 2),  # it has no student
        (("cache", "inspect", foreign), 2),
        (("distill", other, "--out", foreign), 2),
        (("cache", "build", other, "--out", foreign), 2),
    ):
        code, err = selkd(*arguments)
        assert code == expected, (arguments, err)
        assert not left.exists(), arguments
    assert "the run of another recipe (positions.metric:" in err
    with pytest.raises(InputError, match="the run of another recipe of that name"):
        sweep("s", Study.model_validate({"base": plain, "seeds": [3]}), tmp_path, tmp_path)
    assert stored_recipe(foreign / "recipe.yaml").positions.policy == f"{module}:part"
    assert not left.exists()


def test_a_run_of_the_same_own_part_is_still_known_as_the_same(trap: tuple[str, Path], tmp_path: Path) -> None:
    module, left = trap
    recipe = load_recipe(own_recipe(tmp_path, module))
    assert left.exists()
    run = RunDirectory.claim(tmp_path / "run", recipe, is_writer=True)
    run.save()
    assert stored_recipe(run.path / "recipe.yaml") == recipe
    RunDirectory.claim(tmp_path / "run", recipe, is_writer=True)


def commands(folder: Path, module: str) -> list[tuple[object, ...]]:
    """Every command that runs a recipe, with a recipe that names the module."""
    recipe, study = own_recipe(folder, module), folder / "study.yaml"
    study.write_text(yaml.safe_dump({"base": "own.yaml", "seeds": [1, 2]}))
    (folder / "cache").mkdir()
    return [
        ("distill", recipe),
        ("score", recipe),
        ("cache", "build", recipe),
        ("cache", "import", recipe, folder),
        ("cache", "verify", folder / "cache", "--rescore", "1", "--recipe", recipe),
        ("sweep", study),
        ("bench", recipe),
        ("estimate", recipe),
        ("tokens", "demo", "text", "--metric", f"{module}:part"),
        ("tokens", "demo", "text", "--policy", f"{module}:part"),
    ]


def test_own_code_is_named_before_it_is_imported(selkd: Command, trap: tuple[str, Path], tmp_path: Path) -> None:
    module, left = trap
    source = tmp_path / f"{module}.py"
    source.write_text(f"raise RuntimeError('stop here')\n{source.read_text()}")
    for arguments in commands(tmp_path, module):
        code, err = selkd(*arguments)
        assert code == 2, (arguments, err)
        first, second, *_ = err.splitlines()
        key = "positions.policy" if "--policy" in arguments else "positions.metric"
        assert first == f"selkd: {key} runs your own code, {module}:part", arguments
        assert "can't be imported (RuntimeError: stop here)" in second
        assert not left.exists()


def test_no_plugins_refuses_own_code_in_every_command_that_runs_a_recipe(
    selkd: Command, trap: tuple[str, Path], tmp_path: Path
) -> None:
    module, left = trap
    for arguments in commands(tmp_path, module):
        code, err = selkd(*arguments, "--no-plugins")
        assert code == 2, (arguments, err)
        assert f"'{module}:part' is code to run, and --no-plugins refuses it" in err, arguments
        assert "runs your own code" not in err
        assert not left.exists(), arguments


def test_from_python_own_code_is_imported_without_a_line(
    trap: tuple[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    module, left = trap
    base = yaml.safe_load(own_recipe(tmp_path, module).read_text())
    expand(Study.model_validate({"base": base, "seeds": [1]}), tmp_path)
    assert left.exists()
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize("address", ["https://example.org/recipe.yaml", "http://example.org/r.yaml", "hf://o/r/r.yaml"])
def test_recipes_are_not_fetched_from_addresses(selkd: Command, address: str) -> None:
    for command in (("distill",), ("cache", "build"), ("sweep",)):
        code, err = selkd(*command, address)
        assert code == 2
        assert "is not fetched from an address" in err
