"""The pages in a real browser: nothing fetched, no error, readable at two widths, light and dark."""

import json
import struct
from pathlib import Path
from typing import Any

from browser import DESKTOP, PHONE, Look, views
from made_run import BENCHMARKS, OVERLAP, demo_metrics
from test_comparison import make_runs
from test_page import HOSTILE

from selkd.recipe.choices import PositionOptions
from selkd.reporting.comparison import compare
from selkd.reporting.comparison_page import write_comparison
from selkd.reporting.page import write_page
from selkd.tokens.views import describe
from selkd.tokens.views import write_page as write_tokens

# What a page must not do, should any of it get in: it would show in the title, or as a request.
INJECTED = """<base href="https://example.org/"><script>document.title = "ran"</script>
<img src="https://example.org/x.png" onerror="document.title = 'ran'"><iframe src="https://example.org/"></iframe>
<link rel="stylesheet" href="https://example.org/x.css"><style>@import "https://example.org/y.css";</style>
<style>body { background-image: url(https://example.org/z.png) }</style>
<form action="https://example.org/"><input name="a"></form><script>document.forms[0].submit()</script>"""


def check(page: Path) -> None:
    """What every page of ours must be."""
    injected = page.with_name("injected.html")
    injected.write_text(page.read_text().replace("<main>", f"<main>{INJECTED}", 1))
    plain, phone, without, attacked = views(
        Look(page, DESKTOP, "light"),
        Look(page, PHONE, "dark"),
        Look(page, DESKTOP, "light", scripts=False),
        Look(injected, DESKTOP, "light"),
    )
    for view in (plain, phone):
        assert view.console == []
        assert view.requests == [page.as_uri()]
        assert view.overflow <= 0, f"the page is {view.overflow} px wider than {view.width} px"
        assert view.smallest_text >= 7.5
        width, height = struct.unpack(">II", view.png[16:24])
        assert (width, height > 1500) == (view.width, True)
    assert plain.background != phone.background
    assert (plain.text, plain.png) == (without.text, without.png)  # no script is needed
    assert sorted(attacked.requests) == sorted([injected.as_uri(), *attacked.refused])
    assert len(attacked.refused) >= 4
    assert attacked.title != "ran"


def test_a_full_page_of_one_run(run_dir: Path, record: dict[str, Any]) -> None:
    record["benchmarks"] = BENCHMARKS
    (run_dir / "record.json").write_text(json.dumps(record))
    (run_dir / "selection" / "overlap.json").write_text(json.dumps(OVERLAP))
    lines = [line | {"scoring_agreement": 0.97, "held_out_kl_nats": 1.0} for line in demo_metrics()]
    (run_dir / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    check(write_page(run_dir))


def test_hostile_text_does_nothing_in_a_browser(run_dir: Path, record: dict[str, Any]) -> None:
    path = run_dir / "selection" / "examples.json"
    examples = json.loads(path.read_text())
    examples["samples"][0]["tokens"][:3] = [HOSTILE, "</div></main><h1 style=width:9999px>", "x" * 400]
    path.write_text(json.dumps(examples))
    overlap = {"metrics": [HOSTILE, "$x_2"], "overlap": [[1, 0.5], [0.5, 1]]}
    (run_dir / "selection" / "overlap.json").write_text(json.dumps({"positions": overlap, "samples": overlap}))
    record["name"] = HOSTILE * 3
    record["benchmarks"] = {"after": {"tasks": {HOSTILE: {"counts": "x", "metrics": {HOSTILE: {"value": 1.0}}}}}}
    (run_dir / "record.json").write_text(json.dumps(record))
    check(write_page(run_dir))


def test_the_page_of_several_runs(tmp_path: Path) -> None:
    runs = make_runs(tmp_path / "runs")
    write_comparison(compare(runs, failed={HOSTILE: HOSTILE}), tmp_path / "out", HOSTILE)
    check(tmp_path / "out" / "report.html")


def test_the_page_of_a_text(tmp_path: Path) -> None:
    tokens = [HOSTILE, *(f" word{number}" for number in range(300))]
    sample = {
        "tokens": tokens,
        "valid": [*[True] * 300, False],
        "scores": [*(number % 7 / 2 for number in range(300)), None],
        "coefficients": [[float(number % 5 == 0) for number in range(301)]],
    }
    options = PositionOptions(policy="top_k", fraction=0.2).model_dump(mode="json")
    looked_at = {
        "model": HOSTILE,
        "teacher": None,
        "metric": "student_entropy",
        "seed": 1,
        "options": [{"label": f"top_k {HOSTILE}", **options, "progress": 0.0}],
        "samples": [sample] * 6,
    }
    page = tmp_path / "tokens.html"
    write_tokens(page, describe(looked_at))
    check(page)
