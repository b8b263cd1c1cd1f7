"""The errors that the page explains are errors that selkd gives."""

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs" / "troubleshooting.md").read_text(encoding="utf-8")
SOURCES = [*(ROOT / "src").rglob("*.py"), *(ROOT / "packages").glob("*/src/**/*.py")]
ERRORS = [heading for heading in re.findall(r"^### `(.+)`$", PAGE, re.MULTILINE) if not heading.startswith("torch.")]


def texts(node: ast.AST) -> Iterator[str]:
    """The texts that a module has, with "…" in place of what is filled in."""
    for inner in ast.walk(node):
        if isinstance(inner, ast.Constant) and isinstance(inner.value, str):
            yield inner.value
        elif isinstance(inner, ast.JoinedStr):
            yield "".join(str(part.value) if isinstance(part, ast.Constant) else "…" for part in inner.values)


SAID = [text for path in SOURCES for text in texts(ast.parse(path.read_text(encoding="utf-8")))]


def test_there_are_twenty() -> None:
    assert len(ERRORS) >= 20


@pytest.mark.parametrize("error", ERRORS)
def test_an_error_is_one_that_is_given(error: str) -> None:
    """Its words in their order, whatever stands in place of each "…"."""
    pattern = re.compile(".*".join(map(re.escape, re.sub(r"\.\s*$", "", error).split("…"))), re.DOTALL)
    assert any(pattern.search(text) for text in SAID)
