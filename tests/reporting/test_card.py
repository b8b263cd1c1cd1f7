import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from selkd.reporting.card import model_card


def front_matter(card: str) -> dict[str, Any]:
    parts = card.split("---\n", 2)
    assert parts[0] == ""
    matter = yaml.safe_load(parts[1])
    assert isinstance(matter, dict)
    return matter


def test_the_card_names_its_base_model_figures_and_recipe(record: dict[str, Any]) -> None:
    card = model_card(record)
    matter = front_matter(card)
    assert matter["library_name"] == "transformers"
    assert matter["base_model"] == "HuggingFaceTB/SmolLM2-135M-Instruct"
    assert "datasets" not in matter
    assert "| Perplexity | 98.9 | 36.0 | 18.0 |" in card
    assert "| KL to the teacher, nats | 1.78 | 0.89 | 0 |" in card
    recipe = re.search(r"```yaml\n(.*?)\n```", card, flags=re.DOTALL)
    assert recipe is not None
    assert yaml.safe_load(recipe.group(1)) == record["recipe"]


def test_a_student_of_its_own_is_its_own_base_and_hub_data_is_named(record: dict[str, Any]) -> None:
    record["student"] = {"model": "Qwen/Qwen3-1.7B", "pruned_from_teacher": None, "parameters": 1_720_574_976}
    record["recipe"]["data"] = {"path": "HuggingFaceFW/fineweb-edu"}
    matter = front_matter(model_card(record))
    assert matter["base_model"] == "Qwen/Qwen3-1.7B"
    assert matter["datasets"] == ["HuggingFaceFW/fineweb-edu"]


def test_a_local_folder_is_no_base_model_and_its_path_stays_here(
    record: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "models" / "mine").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    for name in ("models/mine", str(tmp_path / "models" / "mine")):
        record["teacher"]["model"] = name
        card = model_card(record)
        assert "base_model" not in front_matter(card)
        assert "distilled from `mine`" in card
        assert name not in card.split("## Recipe")[0]


def test_hostile_names_stay_text(record: dict[str, Any]) -> None:
    record["name"] = "x\n---\n<script>alert(1)</script> [a](javascript:b)"
    record["teacher"]["model"] = "a`b\n# heading"
    record["recipe"]["note"] = "```\n# out of the fence\n"
    card = model_card(record)
    before_recipe = card.split("## Recipe")[0]
    assert "<script>" not in before_recipe
    assert "[a](" not in before_recipe
    assert "\n# heading" not in card
    assert card.count("\n---\n") == 1
    fence = re.search(r"\n(`{4,})yaml\n(.*)\n\1\n$", card, flags=re.DOTALL)
    assert fence is not None
    assert yaml.safe_load(fence.group(2)) == record["recipe"]


def test_a_run_that_has_only_begun_shows_dashes() -> None:
    card = model_card({"name": "x", "recipe": {}})
    assert "| Perplexity | – | – | – |" in card
    assert "None" not in card


def test_cards_and_tables_load_no_plotting_and_no_torch() -> None:
    script = (
        "import sys, selkd.reporting.card, selkd.reporting.tables; "
        "print([name for name in ('torch', 'transformers', 'matplotlib') if name in sys.modules])"
    )
    told = subprocess.run([sys.executable, "-c", script], capture_output=True, check=True, text=True)
    assert told.stdout.strip() == "[]"
