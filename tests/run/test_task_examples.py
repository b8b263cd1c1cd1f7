"""The task's example recipes: read by every run of the tests, and run with the real models where those are run."""

import json
from pathlib import Path

import pytest
from transformers import AutoModelForCausalLM

from selkd import distill
from selkd.recipe.files import load_recipe

EXAMPLES = Path(__file__).parents[2] / "examples" / "task"


def test_the_two_examples_differ_in_who_answers() -> None:
    off, on = (load_recipe(EXAMPLES / f"{name}.yaml") for name in ("off_policy", "on_policy"))
    assert (off.on_policy, off.criterion.name) == (None, "forward_kl")
    assert on.on_policy is not None
    assert on.criterion.name == "reverse_kl"
    assert off.data.template == on.data.template
    assert on.student.model == "runs/off_policy/student"


@pytest.mark.slow
@pytest.mark.real_teacher
def test_the_examples_run_with_the_real_models(tmp_path: Path) -> None:
    rows = [{"question": f"Ann has {i} eggs and buys {i % 7}. How many?", "answer": f"{i}+{i % 7}. #### {i + i % 7}"}
            for i in range(40)]  # fmt: skip
    data = tmp_path / "rows.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    changes = [f"data.path={data}", "data.tokens=null", "data.max_length=64", "data.held_out_fraction=0.2"]
    longer = [*changes, "training.num_train_epochs=8"]
    off = distill(load_recipe(EXAMPLES / "off_policy.yaml", longer), tmp_path / "off")
    assert off.record["fidelity"]["after"]["kl_nats"] < off.record["fidelity"]["before"]["kl_nats"]
    changes += [f"student.model={off.student}", "training.max_steps=2"]
    changes += ["on_policy.max_new_tokens=8", "on_policy.fraction=1.0"]
    on = distill(load_recipe(EXAMPLES / "on_policy.yaml", changes), tmp_path / "on")
    assert on.record["on_policy"]["rollouts"] == 8
    lines = [json.loads(line) for line in (on.path / "rollouts.jsonl").read_text().splitlines()]
    assert all(line["prompt"].startswith("Question: Ann") and line["answer"] for line in lines)
    assert AutoModelForCausalLM.from_pretrained(on.student).config.num_hidden_layers == 24
