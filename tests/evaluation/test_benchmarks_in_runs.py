"""Benchmarks before, during and after a run at toy size; the best student; what a recipe refuses."""

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from datasets import Dataset, DatasetDict
from safetensors.torch import load_file
from tiny import make_model
from tiny_benchmarks import make_byte_tokenizer, save_model, write_rows
from tiny_run import make_recipe
from transformers import AutoModelForCausalLM

from selkd import distill
from selkd.errors import InputError
from selkd.evaluation.benchmarks import ACC, KNOWN
from selkd.evaluation.harness import load_tasks
from selkd.recipe.evaluation import BENCHMARKS, EvaluationOptions, check_suite
from selkd.recipe.files import load_recipe
from selkd.recipe.part import parse_part
from selkd.recipe.recipe import Recipe
from selkd.run.benchmarks import keep_if_best, read_best


def recipe(folder: Path, **evaluation: Any) -> dict[str, Any]:
    """A run of 5 steps on a teacher of bytes, with local rows."""
    if not (folder / "teacher").exists():
        save_model(folder / "teacher", layers=4)
        write_rows(folder / "data")
        # Of bytes: two texts with a phrase in common would be copies of each other.
        letters = np.random.default_rng(0).choice(list("abcdefgh     "), (24, 105))
        texts = ["".join(line) for line in letters]
        (folder / "bytes.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    made = make_recipe(folder)
    return made | {
        "data": {"path": str(folder / "bytes.jsonl"), "max_length": 64, "held_out_fraction": 0.2},
        "samples": None,
        "training": made["training"] | {"max_steps": 5, "num_train_epochs": 1, "learning_rate": 0.003},
        "evaluation": evaluation,
    }


@pytest.mark.usefixtures("short_answers")
def test_before_during_and_after(tmp_path: Path) -> None:
    """And training goes the way that it goes when nothing is measured."""
    evaluation = {"suite": ["validation", "lambada", "fidelity"], "limit": 3, "data": str(tmp_path / "data")}
    watched = recipe(tmp_path, **evaluation, every_steps=2, keep_best="validation")
    run = distill(watched, tmp_path / "run")
    benchmarks = run.record["benchmarks"]
    assert json.loads((run.path / "record.json").read_text())["benchmarks"] == benchmarks
    tasks = {"arc_easy_validation", "gsm8k_train", "hellaswag_train", "piqa_train", "lambada"}
    for when in ("before", "after"):
        assert benchmarks[when]["tasks"].keys() == tasks
        assert len(list((run.path / "benchmarks" / when).glob("*/examples.jsonl"))) == 5
    perplexities = [benchmarks[w]["tasks"]["lambada"]["metrics"]["perplexity"]["value"] for w in ("before", "after")]
    assert perplexities[0] != perplexities[1]
    assert run.record["fidelity"]["by_entropy"].keys() == {"before", "after"}

    steps = benchmarks["steps"]
    assert [step["step"] for step in steps] == [2, 4, 5]  # the last one, too, where the best is kept
    assert steps[0].keys() == {"step", "benchmark_validation"} | {f"benchmark_{name}" for name in tasks}
    logged = [json.loads(line) for line in (run.path / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in logged if "benchmark_lambada" in line] == [2, 4, 5]
    best = max(steps, key=lambda step: step["benchmark_validation"])
    assert benchmarks["best"] == {
        "metric": "validation",
        "value": best["benchmark_validation"],
        "step": best["step"],
    }
    assert AutoModelForCausalLM.from_pretrained(run.path / "best_student").config.num_hidden_layers == 2

    weights = run.student / "model.safetensors"
    stamp = weights.stat().st_mtime_ns
    assert distill(watched, run.path).record["benchmarks"] == benchmarks
    assert weights.stat().st_mtime_ns == stamp

    plain = distill(recipe(tmp_path, suite=[]), tmp_path / "plain")
    ours, theirs = load_file(weights), load_file(plain.student / "model.safetensors")
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)
    assert plain.record["benchmarks"] is None
    assert plain.record["fidelity"] is None
    assert not (plain.path / "best_student").exists()


@pytest.mark.usefixtures("short_answers")
def test_a_runs_prompts_are_put_into_the_chat_template(tmp_path: Path) -> None:
    """``evaluation.chat_template`` alone makes the difference; what is to be answered stays the same."""
    given = recipe(tmp_path)
    tokenizer = make_byte_tokenizer()
    tokenizer.chat_template = (
        "{% for m in messages %}<{{ m.role }}>{{ m.content }}</>{% endfor %}"
        "{% if add_generation_prompt %}<assistant>{% endif %}"
    )
    tokenizer.save_pretrained(tmp_path / "teacher")
    options = {"suite": ["piqa", "gsm8k"], "limit": 2, "data": str(tmp_path / "data")}
    shown: dict[tuple[bool, str], list[dict[str, Any]]] = {}
    for is_chat in (False, True):
        evaluation = options | {"chat_template": is_chat}
        run = distill(given | {"evaluation": evaluation}, tmp_path / f"run-{is_chat}")
        for name in ("piqa", "gsm8k"):
            (file,) = (run.path / "benchmarks" / "after").glob(f"{name}*/examples.jsonl")
            shown[is_chat, name] = [json.loads(line) for line in file.read_text().splitlines()]
    for name in ("piqa", "gsm8k"):
        for plain, chat in zip(shown[False, name], shown[True, name], strict=True):
            assert "<user>" not in plain["prompt"]
            assert chat["prompt"] == f"<user>{plain['prompt']}</><assistant>"
            assert chat["row"] == plain["row"]
    assert shown[False, "piqa"][0]["prompt"] == "Question: How do I ready cage 0?\nAnswer:"


def test_a_chat_template_that_is_not_there_is_refused(tmp_path: Path) -> None:
    given = recipe(tmp_path, suite=["piqa"], data=str(tmp_path / "data"), chat_template=True)
    with pytest.raises(InputError, match="the tokenizer has none"):
        distill(given, tmp_path / "run")


@pytest.mark.parametrize(("metric", "is_better"), [("perplexity", min), ("top1_agreement", max), ("validation", max)])
def test_the_best_student_is_kept(metric: str, is_better: Any, tmp_path: Path) -> None:
    """The first of two equal ones stays; the weights are those of its step."""
    options = recipe(tmp_path, suite=["fidelity", "validation"], every_steps=2, keep_best=metric)
    work: Any = SimpleNamespace(
        recipe=parse_part(Recipe, options),
        run_path=tmp_path / "run",
        tokenizer=make_byte_tokenizer(),
        state=SimpleNamespace(is_main_process=True),
    )
    told = [0.4, 0.2, 0.6, 0.2, 0.6, float("nan")]
    assert read_best(work.run_path) is None
    for step, value in enumerate(told):
        name = "benchmark_validation" if metric == "validation" else metric
        keep_if_best(work, make_model(step, layers=1), step, {name: value})
    value = is_better(told[:-1])
    assert read_best(work.run_path) == {"metric": metric, "value": value, "step": told.index(value)}
    saved = AutoModelForCausalLM.from_pretrained(work.run_path / "best_student").state_dict()
    expected = make_model(told.index(value), layers=1).state_dict()
    assert all(torch.equal(saved[name], expected[name]) for name in saved)
    assert [path.name for path in work.run_path.iterdir()] == ["best_student"]


REFUSED = {
    "evaluation.suite=[fidelty]": "'fidelty' is not known. Allowed: fidelity, paper.*Did you mean 'fidelity'",
    "evaluation.suite=[arc_esy]": "Did you mean 'arc_easy'",
    "evaluation.limit=5": r"evaluation.limit: only benchmarks have limit, and evaluation.suite is \['fidelity'\]",
    "evaluation.data=x": "evaluation.data: only benchmarks have data",
    "evaluation.shots=2": "evaluation.shots: only benchmarks have shots",
    "evaluation={suite: [paper], limit: 0}": "evaluation.limit: input should be greater than or equal to 1",
    "evaluation={suite: [fidelity], keep_best: kl_nats}": "evaluation.keep_best compares .*give evaluation.every_steps",
    "evaluation={suite: [fidelity], every_steps: 5, keep_best: validation}": "measured by the suite validation; add it",
    "evaluation={suite: [validation], every_steps: 5, keep_best: kl_nats}": "measured by the suite fidelity; add it",
    "evaluation={suite: [paper], every_steps: 5, keep_best: acc}": "'acc' is not known. Allowed: perplexity",
}


@pytest.mark.parametrize("override", REFUSED)
def test_a_recipe_refuses_by_name(override: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("selkd.recipe.evaluation.harness_tasks", lambda: ["boolq", "copa"])
    with pytest.raises(InputError, match=f"(?s){REFUSED[override]}"):
        load_recipe("se_kd", [override])


def test_benchmarks_need_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("selkd.recipe.evaluation.has_harness", lambda: False)
    with pytest.raises(
        InputError, match=r"hellaswag is measured by lm-evaluation-harness: pip install 'selkd\[eval\]'"
    ):
        check_suite(["paper"])
    with pytest.raises(InputError, match=r"'boolq' is not known.*after `pip install"):
        check_suite(["boolq"])
    assert check_suite(["fidelity", "fidelity"]) == ["fidelity"]


def test_missing_rows_stop_a_run_before_it_begins(tmp_path: Path) -> None:
    given = recipe(tmp_path, suite=["paper"], data=str(tmp_path))
    with pytest.raises(InputError, match=r"paper: none of hellaswag_val.jsonl"):
        distill(given, tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_names_agree() -> None:
    assert set(KNOWN) == set(BENCHMARKS)
    assert set(ACC) <= set(KNOWN)
    given = {"suite": ["paper"], "data": "a", "limit": 3}
    assert parse_part(EvaluationOptions, given).data == ["a"]
    assert Recipe.model_fields["evaluation"].annotation is EvaluationOptions


def test_any_task_of_the_harness_by_name(monkeypatch: pytest.MonkeyPatch) -> None:
    """From the harness's own index; the hub is made up."""
    rows = [{"passage": "Ice is cold.", "question": "is ice cold", "label": 1}] * 2

    def load_dataset(path: str, **_: Any) -> DatasetDict:
        assert path == "aps/super_glue"
        return DatasetDict({split: Dataset.from_list(rows) for split in ("train", "validation")})

    monkeypatch.setattr("datasets.load_dataset", load_dataset)
    assert check_suite(["boolq"]) == ["boolq"]
    tasks = load_tasks("boolq", None, 0)
    assert tasks.keys() == {"boolq"}
    assert tasks["boolq"].get_config("num_fewshot") == 0
    with pytest.raises(InputError, match=r"'boolqq' is not known.*harness\. Did you mean 'boolq'"):
        check_suite(["boolqq"])
