"""YAML of recipes: what is read as what, and what is written is read back. Refusals: tests/cli/bad_input.py."""

import math
from typing import Any

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from selkd.recipe.files import load_recipe, to_yaml
from selkd.recipe.part import parse_part
from selkd.recipe.recipe import Recipe
from selkd.recipe.yaml_text import dump_yaml, parse_yaml

READ: dict[str, Any] = {
    "80_000_000": 80_000_000,
    "-3": -3,
    "0x1f": 31,
    "1e-5": 1e-5,
    "1.0e-5": 1e-5,
    ".5": 0.5,
    "1.": 1.0,
    ".inf": math.inf,
    "010": "010",
    "1:30": "1:30",
    "1:30.5": "1:30.5",
    "2026-11-29": "2026-11-29",
    "2026-99-99": "2026-99-99",
    "1.2.3": "1.2.3",
    "=": "=",
    "~": None,
    "''": "",
    "true": True,
    "False": False,
    "no": "no",
    "on": "on",
    "{a: [1, {b: c}]}": {"a": [1, {"b": "c"}]},
    "[&x [1], *x]": [[1], [1]],
}


@pytest.mark.parametrize("text", READ)
def test_a_value_is_read_as_people_mean_it(text: str) -> None:
    value = parse_yaml(text)
    assert value == READ[text]
    assert type(value) is type(READ[text])


VALUES = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(2**63), 2**63)
    | st.floats(allow_nan=False)
    | st.text(st.characters(codec="utf-8", exclude_categories=["Cc", "Cs"]))
    | st.sampled_from(["1e-5", "010", "1:30", "2026-11-29", "no", "~", "0x1f", ".inf", "<<", "1_000", "-", "!x", "&x"]),
    lambda values: st.lists(values, max_size=3) | st.dictionaries(st.text("abc_<1.e-", min_size=1), values, max_size=3),
    max_leaves=10,
)


def test_yes_and_no_are_truths_where_one_is_expected_and_texts_where_one_is() -> None:
    recipe = load_recipe("se_kd", ["data.packing=no", "training.bf16=yes", "training.save_strategy=no", "name=no"])
    assert (recipe.data.packing, recipe.name) == (False, "no")
    assert recipe.training["bf16"] is True
    assert recipe.training["save_strategy"] == "no"
    assert parse_part(Recipe, parse_yaml(to_yaml(recipe))) == recipe


@given(VALUES)
def test_what_is_written_is_read_back_here_and_by_other_readers(value: Any) -> None:
    text = dump_yaml(value)
    assert parse_yaml(text) == value
    assert yaml.safe_load(text) == value
