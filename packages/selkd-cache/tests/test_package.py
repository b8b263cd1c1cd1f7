"""The package stands alone: what it imports, and that selkd's errors and files are its own."""

import ast
import subprocess
import sys
import tomllib
from pathlib import Path

import selkd.errors
import selkd.files
import selkd_cache
from selkd_cache import errors, files

ROOT = Path(__file__).parents[1]


def test_it_imports_its_four_dependencies_alone() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    allowed = {name.partition(">")[0] for name in project["dependencies"]}
    assert allowed == {"constriction", "numpy", "xxhash", "zstandard"}
    imported = set()
    for module in (ROOT / "src" / "selkd_cache").glob("*.py"):
        for node in ast.walk(ast.parse(module.read_text(encoding="utf-8"))):
            if isinstance(node, ast.ImportFrom):
                imported.add(str(node.module).partition(".")[0])
            elif isinstance(node, ast.Import):
                imported |= {name.name.partition(".")[0] for name in node.names}
    # pyarrow is an extra, which the next test does not see imported.
    assert imported - set(sys.stdlib_module_names) - {"selkd_cache", "pyarrow"} == allowed


def test_reading_a_cache_needs_neither_selkd_nor_torch() -> None:
    code = """
import sys, selkd_cache
assert "numpy" not in sys.modules
[getattr(selkd_cache, name) for name in selkd_cache.__all__]
print(*sorted({"selkd", "torch", "transformers", "fsspec", "pyarrow"} & sys.modules.keys()))
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout.strip()) == (0, ""), done.stderr


def test_one_class_means_one_thing() -> None:
    assert selkd.errors.InputError is errors.InputError is selkd_cache.InputError
    assert selkd.errors.RunError is errors.RunError is selkd_cache.RunError
    assert selkd.files.replacing is files.replacing
