"""The documentation: built without a warning, fetching nothing from elsewhere, and no staler than the code."""

import importlib.util
import os
import re
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest

import selkd
from selkd.plugins import Criterion, Metric, Policy, Sampler

ROOT = Path(__file__).parents[2]
DOCS = ROOT / "docs"


def script(name: str) -> ModuleType:
    """A script in docs/, imported."""
    spec = importlib.util.spec_from_file_location(f"docs_{name}", DOCS / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("site")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(out)]
    environment = os.environ | {"NO_MKDOCS_2_WARNING": "1"}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert not re.search("warning|error", done.stdout + done.stderr, re.IGNORECASE), done.stderr
    return out


def test_every_page_is_built(site: Path) -> None:
    for page in DOCS.rglob("*.md"):
        parts = page.relative_to(DOCS).with_suffix("").parts
        folder = site.joinpath(*(parts[:-1] if parts[-1] == "index" else parts))
        assert (folder / "index.html").is_file(), page
    for page in ("contributing", "changelog"):  # of the repository's root
        assert (site / page / "index.html").is_file(), page
    assert (site / "framework.svg").is_file()
    assert not list(site.rglob("*.py"))


def test_pages_fetch_nothing_from_elsewhere(site: Path) -> None:
    """Links may lead elsewhere; what a browser loads by itself must not."""
    loads = re.compile(r"<(?:script|img|iframe|source|link)\b[^>]*?(?:src|href)=[\"']?((?:https?:)?//[^\"'\s>]+)")
    for page in site.rglob("*.html"):
        assert not loads.findall(page.read_text(encoding="utf-8")), page
    for sheet in site.rglob("*.css"):
        assert not re.search(r"url\([\"']?(https?:)?//|@import", sheet.read_text(encoding="utf-8")), sheet


@pytest.mark.parametrize("page", script("generate").pages(), ids=lambda page: page.name)
def test_what_is_generated_is_up_to_date(page: Path) -> None:
    assert page.read_text(encoding="utf-8") == script("generate").filled(page), "run python docs/generate.py"


def test_the_interface_is_of_the_public_names(site: Path) -> None:
    """Each has its place on the page, with the text of its docstring."""
    page = (site / "api" / "index.html").read_text(encoding="utf-8")
    for name in set(selkd.__all__) - {"__version__"}:
        assert re.search(rf'id="selkd\.(\w+\.)*{name}"', page), name
    assert "Run a recipe, or finish a run" in page  # selkd.distill


def test_the_picture_is_up_to_date() -> None:
    drawn = script("draw_framework").drawing()
    assert (DOCS / "framework.svg").read_text(encoding="utf-8") == drawn, "run python docs/draw_framework.py"


def test_the_tables_of_names_are_those_of_the_code() -> None:
    page = (DOCS / "recipe.md").read_text(encoding="utf-8")

    def rows(section: str, head: str) -> dict[str, list[str]]:
        (part,) = re.findall(rf"^## {section}\n(.*?)(?=^## )", page, re.DOTALL | re.MULTILINE)
        (body,) = re.findall(rf"^\| `{head}` \|.*?\n\|[-| ]+\n((?:\|.*\n)+)", part, re.MULTILINE)
        cells = [[cell.strip() for cell in re.split(r"(?<!\\)\|", line)[1:-1]] for line in body.splitlines()]
        return {name.strip("`"): rest for name, *rest in cells}

    metrics = rows("positions", "metric")
    assert list(metrics) == list(Metric.builtin())
    assert {name: teacher == "yes" for name, (_, teacher, _) in metrics.items()} == {
        name: metric.needs_teacher for name, metric in Metric.builtin().items()
    }
    assert list(rows("positions", "policy")) == list(Policy.builtin())
    assert list(rows("criterion", "name")) == list(Criterion.builtin())
    assert list(rows("classes", "sampler")) == list(Sampler.builtin())
    assert list(rows("samples", "metric")) == list(Metric.of_samples())
    for name, criterion in Criterion.builtin().items():
        told = rows("criterion", "name")[name][1]
        assert dict.fromkeys(re.findall("`(alpha|beta)`", told)).keys() == criterion.options.keys(), name
        assert all(f"`{key}` {value:g}" in told for key, value in criterion.options.items()), name


def test_each_result_says_how_it_was_made() -> None:
    index = (DOCS / "results" / "index.md").read_text(encoding="utf-8")
    for page in (DOCS / "results").glob("*.md"):
        assert page.name == "index.md" or f"({page.name}" in index, page
