import copy
import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml
from tiny_run import make_recipe, make_task, make_teacher
from transformers import AutoModelForCausalLM

from selkd import distill
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
    assert "| Perplexity | 98.9 | 36.0 | 33.8 to 38.1 | 18.0 |" in card
    assert "| KL to the teacher, nats | 1.78 | 0.89 | 0.85 to 0.92 | 0 |" in card
    assert "# SmolLM2-135M-Instruct, 20 of 30 layers, distilled\n" in card
    assert (matter["license"], matter["model_name"]) == (
        "apache-2.0",
        "SmolLM2-135M-Instruct, 20 of 30 layers, distilled",
    )
    recipe = re.search(r"```yaml\n(.*?)\n```", card, flags=re.DOTALL)
    assert recipe is not None
    assert yaml.safe_load(recipe.group(1)) == record["recipe"]


def test_a_student_of_its_own_is_its_own_base_and_hub_data_is_named(record: dict[str, Any]) -> None:
    record["student"] = {"model": "Qwen/Qwen3-1.7B", "pruned_from_teacher": None, "parameters": 1_720_574_976}
    record["recipe"]["data"] = {"path": "HuggingFaceFW/fineweb-edu"}
    matter = front_matter(model_card(record))
    assert matter["base_model"] == "Qwen/Qwen3-1.7B"
    assert matter["license"] == "other"
    assert matter["license_link"] == "https://huggingface.co/Qwen/Qwen3-1.7B"
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


def test_no_key_shows_a_path_of_this_machine(record: dict[str, Any]) -> None:
    """A path in every key of a recipe that may hold one, in the spellings of several systems."""
    secrets = [
        "/home/alice/secret/x",
        "~/secret/x",
        "../secret/x",
        r"C:\\Users\\secret\\x",
        "s3://secret/x",
        "secret/deep/x/",
    ]
    for secret in secrets:
        recipe = copy.deepcopy(record["recipe"])
        recipe["teacher"]["model"] = recipe["data"]["path"] = secret
        recipe["student"] = {
            "model": secret,
            "prune_from_teacher": None,
            "lora": {"rank": 1, "alpha": 2, "target_modules": [secret]},
        }
        recipe["samples"] = {"metric": "student_entropy", "fraction": 0.2, "path": secret}
        recipe["cache"] = {"path": secret}
        recipe["evaluation"] = {"suite": ["paper"], "data": [secret, secret], "keep_best": None}
        nested = {"fsdp_config": {"a": [secret], "b": {"c": secret}}, "accelerator_config": secret}
        recipe["training"] = {"logging_dir": secret, "lr_scheduler_kwargs": nested, **nested, "report_to": [secret]}
        record |= {"recipe": recipe, "teacher": {"model": secret}, "student": {"model": secret}}
        record["data"]["path"] = secret
        card = model_card(record)
        assert "secret" not in card, card
        shown = yaml.safe_load(card.split("```yaml\n")[1].split("\n```")[0])
        assert shown["teacher"]["model"] == shown["training"]["fsdp_config"]["b"]["c"] == "x"
        assert shown["data"]["path"] == "local files"
        assert shown["evaluation"]["data"] == ["local files", "local files"]
        assert "of local files." in card


def test_what_is_no_path_is_shown_as_it_is(record: dict[str, Any]) -> None:
    record["recipe"]["hub"] = {"repo": "me/student", "private": True}
    record["recipe"]["data"] |= {"path": "openai/gsm8k", "template": "a/b {prompt}\\n/c {completion}"}
    record["recipe"]["teacher"]["model"] = "Qwen/Qwen3-8B"
    shown = yaml.safe_load(model_card(record).split("```yaml\n")[1].split("\n```")[0])
    assert shown == record["recipe"]


@pytest.mark.parametrize("is_pruned", [True, False])
def test_the_folder_that_is_pushed_names_no_place(is_pruned: bool, tmp_path: Path) -> None:
    """Also where the models' files have one, as older versions of Transformers wrote it."""
    recipe = make_recipe(tmp_path, cache=None, classes={"sampler": "all"}, samples=None)
    own = make_teacher(tmp_path / "own", seed=4)
    if not is_pruned:
        recipe["student"] = {"model": str(own)}
    for folder in (tmp_path / "teacher", own):
        for name, key in (("config.json", "_name_or_path"), ("tokenizer_config.json", "name_or_path")):
            content = json.loads((folder / name).read_text())
            (folder / name).write_text(json.dumps({**content, key: str(folder)}))
    recipe["training"]["max_steps"] = 1
    student = distill(recipe, tmp_path / "run").student
    files = [path for path in student.rglob("*") if path.is_file()]
    assert {"config.json", "tokenizer_config.json", "README.md", "model.safetensors"} <= {path.name for path in files}
    assert not [path.name for path in files if str(tmp_path).encode() in path.read_bytes()]


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


def test_what_is_not_known_leaves_no_blanks(record: dict[str, Any]) -> None:
    card = model_card({"name": "x", "recipe": {}})
    assert "Closeness to the teacher on held-out text was not measured." in card
    for blank in ("None", "–", "| |", "How it was made", "The figures measure"):
        assert blank not in card, blank
    record["fidelity"] = None
    unmeasured = model_card(record)
    assert "was not measured" in unmeasured
    assert "Perplexity" not in unmeasured
    assert "- Data: text of the Python manual." in unmeasured


def test_a_figure_that_was_not_taken_before_is_no_column(record: dict[str, Any]) -> None:
    record["fidelity"]["before"] = None
    card = model_card(record)
    assert (
        "| | after | 95% interval | teacher |\n|---|---:|---:|---:|\n| Perplexity | 36.0 | 33.8 to 38.1 | 18.0 |"
        in card
    )
    record["fidelity"] |= {"standard_errors": None, "positions": 36}  # of a run of an earlier version
    card = model_card(record)
    assert "| | after | teacher |\n|---|---:|---:|\n| Perplexity | 36.0 | 18.0 |" in card
    assert "on 36 held-out positions, text" in card
    assert "These are few positions" in card
    record["fidelity"]["teacher"] = None
    assert "| Perplexity | 36.0 | not measured |\n| KL to the teacher, nats | 0.89 | 0 |" in model_card(record)


def test_cross_entropy_is_told_where_it_is_mixed_in(record: dict[str, Any]) -> None:
    assert "- Criterion: forward KL divergence, temperature 1.0.\n" in model_card(record)
    record["recipe"]["criterion"]["kd_weight"] = 0.9
    assert "temperature 1.0, weight 0.9 against cross-entropy on the true token." in model_card(record)


def test_a_quantised_teacher_is_told(record: dict[str, Any]) -> None:
    assert "quantised" not in model_card(record)
    for name, words in (
        ("torchao_int8", "int8 weights by torchao"),
        ("bitsandbytes_4bit", "4 bits (NF4) by bitsandbytes"),
    ):
        record["recipe"]["teacher"]["quantization"] = name
        assert f"- Teacher: its layers quantised, {words}; the head is not." in model_card(record)


def test_a_run_with_adapters_at_its_own_answers_says_so(tmp_path: Path) -> None:
    """A real run, measured and not: adapters, rollouts, and completions that are no rollouts."""
    pytest.importorskip("peft")
    recipe = make_recipe(
        tmp_path, data=make_task(tmp_path, packing=False), cache=None, classes={"sampler": "all"}, samples=None,
        on_policy={"max_new_tokens": 6, "fraction": 0.5}, evaluation={"suite": []},
    )  # fmt: skip
    recipe["student"] = {
        "prune_from_teacher": {"layers": 2},
        "lora": {"rank": 4, "alpha": 8, "target_modules": ["q_proj", "v_proj"]},
    }
    run = distill(recipe, tmp_path / "run")
    card, told = (run.student / "README.md").read_text(), run.record["on_policy"]
    trained = 2 * (4 * (32 + 32) + 4 * (32 + 16))  # rank x (in + out), of two layers
    assert run.record["student"]["trained_parameters"] == trained
    saved = AutoModelForCausalLM.from_pretrained(run.student)
    assert run.record["student"]["parameters"] == saved.num_parameters()
    assert "adapters (LoRA) of rank 4, alpha 8, on q\\_proj, v\\_proj, 896 parameters; they are merged" in card
    assert (
        "- Data: prompts of local files, 50% answered by the student itself, the others with the data’s own answers."
        in card
    )
    assert (
        f"- Rollouts, the student's own answers: {told['rollouts']} answers of {told['tokens']} tokens in all, "
        f"{told['mean_tokens']:.1f} on average; {100 * told['ended_share']:.1f}% came to an end by themselves." in card
    )
    assert "was not measured" in card
    assert "–" not in card.split("## Recipe")[0]


def test_cards_and_tables_load_no_plotting_and_no_torch() -> None:
    script = (
        "import sys, selkd.reporting.card, selkd.reporting.tables; "
        "print([name for name in ('torch', 'transformers', 'matplotlib') if name in sys.modules])"
    )
    told = subprocess.run([sys.executable, "-c", script], capture_output=True, check=True, text=True)
    assert told.stdout.strip() == "[]"
