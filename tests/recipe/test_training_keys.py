"""The keys of ``training``, which are read from Transformers' source: they are those of the class, with its types."""

from dataclasses import fields
from enum import Enum
from typing import Any, get_args, get_type_hints

import pytest
from transformers import TrainingArguments

from selkd.errors import InputError
from selkd.recipe.files import load_recipe
from selkd.recipe.training import NESTED, OWNED, RANGES, REFUSED, check_training
from selkd.recipe.training_keys import training_keys


def test_the_keys_and_types_are_those_of_the_imported_class() -> None:
    hints, read = get_type_hints(TrainingArguments), training_keys()
    assert read.keys() == {field.name for field in fields(TrainingArguments) if field.init}
    for name, adapter in read.items():
        values = enumerated(hints[name])
        if values:
            assert {value for value in values if accepts(adapter, value)} == values
            assert not accepts(adapter, "no such value")
        elif name not in ("parallelism_config", "debug"):  # one is refused, the other takes a list, too
            assert adapter._type == hints[name], name


def enumerated(hint: Any) -> set[str]:
    return {
        member.value
        for choice in get_args(hint)
        if isinstance(choice, type) and issubclass(choice, Enum)
        for member in choice
    }


def accepts(adapter: Any, value: Any) -> bool:
    try:
        return adapter.validate_python(value) == value
    except ValueError:
        return False


def test_rules_are_about_keys_that_there_are() -> None:
    assert OWNED.keys() | REFUSED.keys() | RANGES.keys() | NESTED.keys() <= training_keys().keys()


@pytest.mark.parametrize("name", sorted(RANGES.keys() - OWNED.keys() - REFUSED.keys()))
def test_transformers_own_default_is_in_every_range(name: str) -> None:
    (default,) = (field.default for field in fields(TrainingArguments) if field.name == name)
    assert check_training({"dataloader_num_workers": 1, name: default})[name] == default


def test_all_faults_of_training_are_named_at_once() -> None:
    overrides = ["training.weight_decay=.nan", "training.adam_beta1=5", "training.optim=adam"]
    with pytest.raises(InputError) as caught:
        load_recipe("se_kd", overrides)
    lines = str(caught.value).splitlines()
    assert [line.partition(":")[0] for line in lines] == [
        "training.optim",
        "training.weight_decay",
        "training.adam_beta1",
    ] or len(lines) == 3
