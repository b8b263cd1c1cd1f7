import copy
import io
from typing import Any

from rich.console import Console

from selkd.reporting.tables import fidelity_table


def printed(records: list[dict[str, Any]], width: int = 100) -> str:
    out = io.StringIO()
    Console(file=out, width=width, color_system=None).print(fidelity_table(records))
    return out.getvalue()


def row(text: str, name: str) -> list[str]:
    lines = [line for line in text.splitlines() if line.strip().startswith(name)]
    assert len(lines) == 1, text
    return [cell.strip() for cell in lines[0].strip()[len(name) :].split("   ") if cell.strip()]


def test_two_runs_stand_side_by_side(record: dict[str, Any]) -> None:
    full = copy.deepcopy(record)
    full["name"] = "full_kd"
    full["fidelity"]["after"] = {"perplexity": 33.21, "kl_nats": 0.81, "top1_agreement": 0.64}
    full["counts"]["positions_selected"] = full["counts"]["positions_valid"]
    full["teacher_cache"] = None
    text = printed([record, full])
    assert text.splitlines()[0].split() == ["demo", "full_kd"]
    assert row(text, "perplexity") == ["98.9 → 36.0", "98.9 → 33.2"]
    assert row(text, "KL to the teacher, nats") == ["1.78 → 0.89", "1.78 → 0.81"]
    assert row(text, "positions selected") == ["20.1%", "100.0%"]
    assert row(text, "cache, a position") == ["31.7 B", "–"]
    assert row(text, "total time") == ["5 min 17 s", "5 min 17 s"]
    assert row(text, "peak memory, process") == ["3.41 GB", "3.41 GB"]
    assert row(text, "peak memory, accelerator") == ["–", "–"]


def test_a_name_is_no_markup(record: dict[str, Any]) -> None:
    record["name"] = "[red]x[/red] [/]"
    assert "[red]x[/red] [/]" in printed([record])


def test_a_run_that_has_only_begun_is_all_dashes() -> None:
    text = printed([{"name": "begun", "recipe": {}}])
    assert row(text, "perplexity") == ["–"]
    assert row(text, "samples kept") == ["–"]
    assert "None" not in text


def test_it_fits_a_terminal_of_80_columns(record: dict[str, Any]) -> None:
    assert "…" not in printed([record, record], width=80)


def test_few_positions_carry_their_intervals(record: dict[str, Any]) -> None:
    assert "36.0 (" not in printed([record])
    record["fidelity"]["positions"] = 36
    text = printed([record])
    assert row(text, "top-1 agreement") == ["48.1% → 62.4% (61.4% to 63.4%)"]
    assert row(text, "held-out positions") == ["36, few: see the 95% intervals"]


def test_the_kl_that_is_shown_is_true(record: dict[str, Any]) -> None:
    text = printed([record])
    assert row(text, "KL there, nats") == ["1.91 → 0.94"]
    assert row(text, "loss as minimised") == ["2.51 → 1.30"]
    record["train"] |= {"kl_nats_first": None, "kl_nats_last": None}
    assert row(printed([record]), "KL there, nats") == ["–"]
