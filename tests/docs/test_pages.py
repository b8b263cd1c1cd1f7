"""Every command and snippet of README and docs: commands parse, recipes are valid, and what a toy can run is run."""

import re
import shlex
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml
from test_site import DOCS, ROOT, script
from tiny import make_model, make_tokenizer
from tiny_run import make_recipe

from selkd.cli.main import main
from selkd.recipe.part import parse_part
from selkd.recipe.recipe import Recipe
from selkd.sweep.study import expand, load_study

PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", ROOT / "CHANGELOG.md", *sorted(DOCS.rglob("*.md"))]
WRITTEN = [page for page in PAGES if page.name != "commands.md"]  # that one is generated from the commands themselves
TUTORIAL = DOCS / "tutorial.md"  # test_tutorial runs it
HUB = {"Qwen/Qwen3-8B": "teacher", "Qwen/Qwen3-1.7B": "student"}
# Not run here: real models and data, several processes, hundreds of runs; each has tests of its own.
ELSEWHERE = re.compile(r"demo|se_kd_3x --set|sweep|--suite|torchrun|accelerate|runs/qwen|runs/se\b|prune-student")


def blocks(page: Path, language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", page.read_text(encoding="utf-8"), re.DOTALL | re.MULTILINE)


def commands(page: Path) -> list[str]:
    """The selkd commands of a page, those behind a launcher too; comments, descriptions and redirections cut off."""
    text = page.read_text(encoding="utf-8")
    lines = [line for block in blocks(page, "sh") for line in block.splitlines()]
    lines += [line[4:] for line in re.findall(r"^    \S.*$", re.sub(r"^```.*?^```", "", text, flags=re.S | re.M), re.M)]
    lines = [re.split(r"\s{2,}|\s#|\s>\s", line)[0].split(" && ")[-1].strip() for line in lines]
    return [line for line in lines if re.match(r"selkd |torchrun .*-m selkd |accelerate .*-m selkd ", line)]


def arguments(command: str) -> list[str]:
    """What follows ``selkd``; of a synopsis, optional parts as if given and N as a number."""
    shown = re.sub(r"\[(--[^\]]*|[A-Z]+)\]", r"\1", command.partition("selkd ")[2])
    return ["2" if word == "N" else word.removesuffix("...") for word in shlex.split(shown)]


@pytest.mark.parametrize("page", WRITTEN, ids=lambda page: page.name)
def test_every_command_parses(page: Path) -> None:
    known = script("generate").commands()
    for command in commands(page):
        words = arguments(command)
        name = " ".join(words[:2]) if " ".join(words[:2]) in known else words[0]
        assert name in known, command
        known[name].make_context(name, words[len(name.split()) :])  # raises for an unknown option or a missing argument


def test_every_command_is_shown() -> None:
    shown = {" ".join(arguments(command)) + " " for page in WRITTEN for command in commands(page)}
    for name in script("generate").commands():
        assert any(words.startswith(f"{name} ") for words in shown), f"no page shows selkd {name}"


def test_help_of_every_command(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    for name in script("generate").commands():
        assert run(monkeypatch, [*name.split(), "--help"]) == 0, name
    capsys.readouterr()


@pytest.mark.parametrize("page", WRITTEN, ids=lambda page: page.name)
def test_every_option_that_is_named_exists(page: Path) -> None:
    known = script("generate").commands()
    for inline in re.findall(r"`selkd ([^`]+)`", page.read_text(encoding="utf-8")):
        words = inline.split()
        name = next((n for n in (" ".join(words[:2]), words[0]) if n in known), None)
        assert name or words[0].isupper(), inline
        options = {option for parameter in known[name].params for option in parameter.opts} if name else set()
        assert {word.partition("=")[0] for word in words if word.startswith("--")} <= options | {"--help"}, inline


@pytest.mark.parametrize("page", WRITTEN, ids=lambda page: page.name)
def test_every_recipe_is_valid(page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for block in blocks(page, "python"):
        if "def margin" in block:
            (tmp_path / "parts.py").write_text(block)
    rest = {"teacher": {"model": "demo"}, "student": {"model": "x"}, "data": {"path": "demo"}}
    for block in blocks(page, "yaml"):
        content = yaml.safe_load(block)
        if "base" in content:
            (tmp_path / "my.yaml").write_text(yaml.safe_dump(rest))
            (tmp_path / "study.yaml").write_text(block)
            _, study, folder = load_study(tmp_path / "study.yaml")
            assert len(expand(study, folder)) == 9
            continue
        if "cache" in content and "classes" not in content:
            content["classes"] = {"sampler": "rs_kd"}
        parse_part(Recipe, rest | content)


@pytest.fixture
def workplace(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with a toy teacher, student, text and recipe by the names that the pages use."""
    monkeypatch.chdir(tmp_path)
    toy = make_recipe(tmp_path)
    make_model(1, layers=2).save_pretrained(tmp_path / "student")
    make_tokenizer().save_pretrained(tmp_path / "student")
    (tmp_path / "notes.txt").write_text(" ".join(f"w{2 + i * 7 % 80}" for i in range(40)))
    recipe: dict[str, Any] = toy | {"training": toy["training"] | {"max_steps": 2, "num_train_epochs": 1}}
    (tmp_path / "my.yaml").write_text(yaml.safe_dump(recipe))
    return tmp_path


def run(monkeypatch: pytest.MonkeyPatch, words: list[str]) -> int:
    monkeypatch.setattr(sys, "argv", ["selkd", *words])
    with pytest.raises(SystemExit) as stop:
        main()
    return int(stop.value.code or 0)


def at_toy_size(text: str) -> str:
    for name, folder in HUB.items():
        text = text.replace(name, folder)
    return text


def test_the_commands_run(workplace: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """One after the other, as a reader would, on a toy teacher."""
    pages = [DOCS / name for name in ("index.md", "choosing.md", "scaling.md", "coming-from.md")]
    asked = [command for page in pages for command in commands(page) if not ELSEWHERE.search(command)]
    assert len(asked) >= 12
    for command in asked:
        assert run(monkeypatch, arguments(at_toy_size(command))) == 0, f"{command}\n{capsys.readouterr().err}"
    for left in ("runs/my/report.html", "tokens.html", "comparison/report.html"):
        assert (workplace / left).is_file(), left
    capsys.readouterr()


@pytest.mark.parametrize(
    "page",
    [page for page in WRITTEN if page.is_relative_to(DOCS) and page != TUTORIAL and blocks(page, "python")],
    ids=lambda page: page.name,
)
def test_the_python_runs(workplace: Path, page: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The snippets of a page in one namespace, training for a step."""
    del workplace
    shared: dict[str, Any] = {}
    for block in blocks(page, "python"):
        code = at_toy_size(block)
        code = code.replace("data={", 'data={"max_length": 64, ')
        window = "" if "data={" in code else 'data={"max_length": 64}, '
        code = code.replace("output_dir=", f'{window}max_steps=1, use_cpu=True, report_to="none", output_dir=')
        exec(compile(code, page.name, "exec"), shared)
    capsys.readouterr()
