"""Figures stand in one file: pages are written from it or held against it, so no two of them disagree."""

import re
from datetime import date
from pathlib import Path
from typing import Any

import pytest
from test_site import DOCS, ROOT, script

generate = script("generate")
MEASUREMENTS: dict[str, dict[str, Any]] = generate.measurements()
QUOTES = [(name, quote) for name, m in MEASUREMENTS.items() for quote in m.get("quoted", ())]
FRONT_PAGES = [ROOT / "README.md", DOCS / "index.md", DOCS / "choosing.md"]
DURATION = re.compile(r"\b\d+ min \d+ s\b")
MEASURED = re.compile(r"\b\d[\d.,]*\s?(?:nats|GB|MB|kB|ms|seconds?|minutes?|min|s|bytes|times|x floor)\b|\d → \d")


def by_hand(page: Path) -> str:
    """The text of a page without what is generated, code, and the paper's own figures."""
    text = generate.MARKED.sub("", page.read_text(encoding="utf-8"))
    text = re.sub(r"^```.*?^```|^    .*?$|`[^`\n]+`", "", text, flags=re.DOTALL | re.MULTILINE)
    return re.sub(r"^## What the paper found\n.*?(?=^## )", "", text, flags=re.DOTALL | re.MULTILINE)


def flat(text: str) -> str:
    return re.sub(r"\s+", " ", text)


@pytest.mark.parametrize("name", MEASUREMENTS)
def test_each_measurement_says_how_it_was_made(name: str) -> None:
    measurement = MEASUREMENTS[name]
    assert measurement["commands"]
    assert measurement["machine"]
    if "what" in measurement or "date" in measurement:  # a further machine's run may lack its date, and then says so
        assert isinstance(measurement["date"], date)
    for figure_name, figure in measurement["figures"].items():
        assert re.fullmatch(r"\d[\d,]*(\.\d+)?", figure.value), figure_name
    assert measurement["page"]


@pytest.mark.parametrize("name", MEASUREMENTS)
def test_each_command_is_on_its_page(name: str) -> None:
    """The whole command, with every argument that its figures need: as a line of code, or between backticks."""
    page = DOCS / "results" / MEASUREMENTS[name]["page"].partition("#")[0]
    text = generate.MARKED.sub("", page.read_text(encoding="utf-8"))
    shown = re.findall(r"^    (\S.*)$|`([^`\n]+)`", text, flags=re.MULTILINE)
    for command in MEASUREMENTS[name]["commands"]:
        assert command in {line or inline for line, inline in shown}, f"{page.name} lacks {command}"


@pytest.mark.parametrize(
    ("name", "quote"), QUOTES, ids=lambda value: value if isinstance(value, str) else value["page"]
)
def test_each_quoted_sentence_is_on_its_page(name: str, quote: dict[str, str]) -> None:
    sentence = flat(generate.with_figures(MEASUREMENTS[name], quote["text"]))
    assert sentence in flat((DOCS / "results" / quote["page"]).read_text(encoding="utf-8"))


@pytest.mark.parametrize("page", FRONT_PAGES, ids=lambda page: page.name)
def test_no_measured_figure_is_written_by_hand_on_a_front_page(page: Path) -> None:
    assert MEASURED.findall(by_hand(page)) == []


def test_the_demos_time_is_written_nowhere_by_hand() -> None:
    for page in [ROOT / "README.md", *DOCS.rglob("*.md")]:
        assert DURATION.findall(by_hand(page)) == [], page


def test_the_front_pages_show_the_demo_as_it_was_measured() -> None:
    """What the pages say today is what the file says, read by another hand than the generator's."""
    total = int(MEASUREMENTS["demo"]["figures"]["total"].value)
    for page in (ROOT / "README.md", DOCS / "index.md", DOCS / "choosing.md", DOCS / "results" / "demo.md"):
        assert f"{total // 60} min {total % 60} s" in page.read_text(encoding="utf-8"), page


def test_a_figure_that_is_changed_by_hand_is_stale(tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    page.write_text(
        "# A page\n\n<!-- generated: demo-printed -->\nperplexity 1 → 2\n\n<!-- end -->\n", encoding="utf-8"
    )
    filled = generate.filled(page)
    assert "1 → 2" not in filled
    assert MEASUREMENTS["demo"]["figures"]["perplexity_after"].value in filled


@pytest.mark.parametrize(
    "text", ["in 4 min 27 s", "0.86 nats", "1.21 times", "takes 3.8 ms", "104.8 → 40.5", "31 bytes"]
)
def test_a_measured_figure_is_recognised(text: str) -> None:
    assert MEASURED.findall(text)
