"""Imports run one way, as ``.importlinter`` says."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PACKAGES = (ROOT / "src" / "selkd", ROOT / "packages" / "selkd-cache" / "src" / "selkd_cache")
MODULES = [path for package in PACKAGES for path in sorted(package.rglob("*.py"))]


def test_the_import_contracts_hold() -> None:
    linter = Path(sys.executable).with_name("lint-imports")
    done = subprocess.run(
        [linter, "--no-cache", "--config", ROOT / ".importlinter"],
        capture_output=True,
        text=True,
        cwd=ROOT,
        check=False,
    )
    assert done.returncode == 0, done.stdout


@pytest.mark.parametrize("path", MODULES, ids=lambda path: path.name)
def test_modules_stay_small(path: Path) -> None:
    assert len(path.read_text().splitlines()) <= 500


# Signatures that others dictate: what a command's options are, the public contract of specification and engine,
# autograd's own.
WIDE = {"cli/main.py", "cli/cache.py", "cli/tokens.py", "reference.py", "training/loss.py"}


@pytest.mark.parametrize("path", MODULES, ids=lambda path: path.name)
def test_no_function_takes_seven_parameters(path: Path) -> None:
    """What belongs together travels as one object: a ``ModelPair``, a part of the recipe."""
    if path.is_relative_to(PACKAGES[0]) and path.relative_to(PACKAGES[0]).as_posix() in WIDE:
        return
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.FunctionDef):
            arguments = [*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs]
            names = [each.arg for each in arguments if each.arg not in ("self", "cls")]
            assert len(names) < 7 or names[0] == "ctx", f"{node.name} takes {names}"


def test_nothing_loose_stands_at_the_root() -> None:
    at_root = {path.stem for path in (ROOT / "src" / "selkd").glob("*.py")}
    names = {"errors", "extras", "files", "interrupts", "own_code", "plugins", "reference", "sealed"}
    assert at_root == {"__init__", "__main__"} | names


def test_a_command_is_told_of_itself_without_torch() -> None:
    """Reading the package, a command's help and the recipe's models need no torch; it takes a second to import."""
    modules = """cli.main recipe.files recipe.pruning sweep.sweep tokens.text tokens.policy bench.names
        evaluation.options run.directory reporting.page reporting.comparison_page"""
    names = ", ".join(["selkd_cache.reader", *(f"selkd.{name}" for name in modules.split())])
    code = f"import sys, {names}; sys.exit('torch' in sys.modules or 'transformers' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
