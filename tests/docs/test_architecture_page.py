"""docs/architecture.md is about the code as it is: its tree, its layers, and every name in its walks."""

import ast
import configparser
import re
from pathlib import Path

import pytest
from test_site import DOCS, ROOT, script

SOURCE = ROOT / "src" / "selkd"
CACHE_PACKAGE = ROOT / "packages" / "selkd-cache" / "src" / "selkd_cache"
PAGE = (DOCS / "architecture.md").read_text(encoding="utf-8")
# `room/module`, `room/module:name` or `module:Class.method`, without src/selkd and without .py; `selkd_cache/module`.
NAME = re.compile(r"`([a-z_]+/[a-z_]+|[a-z_]+(?=:[A-Za-z_]))(?::([A-Za-z_][\w.]*))?`")
WALKS = re.findall(r"^## (A .*?)\n(.*?)(?=^## )", PAGE, re.DOTALL | re.MULTILINE)


def names(text: str) -> list[tuple[str, str]]:
    return NAME.findall(text)


def source(module: str) -> Path:
    package = CACHE_PACKAGE.parent if module.startswith(f"{CACHE_PACKAGE.name}/") else SOURCE
    return package / f"{module}.py"


def defines(module: Path, name: str) -> bool:
    """Whether a module's own source defines ``name``, or a class in it its part after the dot."""
    body: list[ast.stmt] = ast.parse(module.read_text(encoding="utf-8")).body
    for part in name.split("."):
        for statement in body:
            if isinstance(statement, ast.ClassDef | ast.FunctionDef) and statement.name == part:
                body = statement.body
                break
            targets = statement.targets if isinstance(statement, ast.Assign) else [getattr(statement, "target", None)]
            if any(isinstance(target, ast.Name) and target.id == part for target in targets):
                body = []
                break
        else:
            return False
    return True


def test_there_are_three_walks() -> None:
    assert len(WALKS) == 3
    for title, text in WALKS:
        assert len(names(text)) >= 8, title


@pytest.mark.parametrize("title", [title for title, _ in WALKS])
def test_every_name_in_a_walk_exists(title: str) -> None:
    missing = [
        f"{module}:{name}" if name else module
        for module, name in names(dict(WALKS)[title])
        if not source(module).is_file() or (name and not defines(source(module), name))
    ]
    assert missing == []


def test_a_name_that_does_not_exist_is_found() -> None:
    assert defines(SOURCE / "recipe" / "files.py", "load_recipe")
    assert defines(CACHE_PACKAGE / "reader.py", "TeacherCache.open")
    assert not defines(SOURCE / "recipe" / "files.py", "load_receipt")
    assert not defines(CACHE_PACKAGE / "reader.py", "TeacherCache.close")


def test_the_tree_has_every_module_with_a_sentence() -> None:
    tree = script("generate").tree()
    assert tree in PAGE, "run python docs/generate.py"
    for module in (*SOURCE.rglob("*.py"), *CACHE_PACKAGE.rglob("*.py")):
        if module.name != "__init__.py":
            lines = [line for line in tree.splitlines() if re.match(rf" +{module.name} +\S", line)]
            assert lines, f"{module.relative_to(ROOT)}: a module's docstring says what it is for"


def test_the_layers_are_those_of_the_contract() -> None:
    contract = configparser.ConfigParser()
    contract.read(ROOT / ".importlinter")
    layers = contract["importlinter:contract:layers"]["layers"].replace("selkd.", "").strip().splitlines()
    (section,) = re.findall(r"^## Rooms and layers\n(.*?)^## ", PAGE, re.DOTALL | re.MULTILINE)
    shown = re.findall(r"^\| (`.*?) \|", section, re.MULTILINE)
    assert [row.replace("`", "").split(", ") for row in shown] == [layer.split(" | ") for layer in layers]
    rooms = {path.parent.name for path in SOURCE.glob("*/__init__.py")} - {"recipes", "studies"}
    assert rooms <= {name for row in shown for name in re.findall(r"\w+", row)}
