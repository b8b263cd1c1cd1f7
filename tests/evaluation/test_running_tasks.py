"""How a task is run: batch sizes, memory that runs out, chat templates, and what needs no harness at all."""

import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from tiny_benchmarks import BYTES, make_byte_tokenizer, save_model, write_rows
from transformers import AutoModelForCausalLM

from selkd.errors import RunError
from selkd.evaluation import batch_size, harness
from selkd.evaluation.harness import build_requests, load_tasks, run_task


def prepared(name: str, folder: Path) -> Any:
    task = load_tasks(name, [write_rows(folder / "data")], 0)[name]
    build_requests(task, list(range(len(task.eval_docs))))
    return task


def run(name: str, folder: Path, **options: Any) -> harness.Output:
    model = AutoModelForCausalLM.from_pretrained(save_model(folder / "model")).eval()
    task = prepared(name, folder)
    return run_task(name, task, list(range(6)), model, make_byte_tokenizer(), model.dtype, **options)


def test_the_batch_size_follows_memory_and_prompts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = AutoModelForCausalLM.from_pretrained(save_model(tmp_path / "model"))
    tokenizer, task, writing = make_byte_tokenizer(), prepared("piqa", tmp_path), prepared("gsm8k", tmp_path)
    longest = len("Question: How do I ready cage 0?\nAnswer: Add paper scraps.")
    one_prompt = longest * (BYTES * 12 + 2 * 2 * 2 * 8 * 4)  # logits, and keys and values of 2 layers x 2 heads x 8
    for free, expected in ((0, 1), (4 * 5 * one_prompt, 5), (10**12, 16)):
        monkeypatch.setattr(batch_size, "_free_bytes", lambda _, free=free: free)
        assert batch_size.rows_at_once(task, model, tokenizer) == expected
    assert batch_size.rows_at_once(writing, model, tokenizer) == 128


def test_the_batch_is_halved_until_it_fits(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    expected = run("piqa", tmp_path)
    language_model, tried = harness._language_model, []

    def watched(model: Any, tokenizer: Any, dtype: torch.dtype, size: int) -> Any:
        tried.append(size)
        found = language_model(model, tokenizer, dtype, size)
        monkeypatch.setattr(found, "_model_call", limited(found._model_call))
        return found

    def limited(call: Any) -> Any:
        def run_out(tokens: torch.Tensor, *arguments: Any, **options: Any) -> Any:
            if len(tokens) > most:
                raise torch.OutOfMemoryError("CUDA out of memory")
            return call(tokens, *arguments, **options)

        return run_out

    monkeypatch.setattr(harness, "_language_model", watched)
    most = 3
    found = run("piqa", tmp_path, batch_size=11)
    assert tried == [11, 5, 2]
    assert found.kinds == expected.kinds
    assert [e["measures"]["acc"] for e in found.examples] == [e["measures"]["acc"] for e in expected.examples]
    most = 0
    with pytest.raises(RunError, match="piqa: one example at a time is too much"):
        run("piqa", tmp_path)


def test_a_chat_template_is_put_around_the_prompts(tmp_path: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(save_model(tmp_path / "model")).eval()
    tokenizer = make_byte_tokenizer()
    tokenizer.chat_template = (
        "{% for m in messages %}<{{ m.role }}>{{ m.content }}</>{% endfor %}"
        "{% if add_generation_prompt %}<assistant>{% endif %}"
    )
    output = run_task("piqa", prepared("piqa", tmp_path), [0, 3], model, tokenizer, model.dtype, chat_template=True)
    assert [example["row"] for example in output.examples] == [0, 3]
    assert output.examples[1]["prompt"] == "<user>Question: How do I ready cage 3?\nAnswer:</><assistant>"


def test_the_figures_are_the_harnesss(tmp_path: Path) -> None:
    """What the resampled measures give over all examples is what the harness itself reports."""
    from selkd.evaluation.results import TaskResult

    for name in ("piqa", "lambada"):
        output = run(name, tmp_path)
        details: dict[str, Any] = {}
        parts = (output.examples, output.kinds, output.figures, output.higher_is_better)
        found = TaskResult(name, {}, *parts, details, 0.0)
        assert output.figures.keys() <= found.estimates.keys()
        for metric, figure in output.figures.items():
            assert found.estimates[metric].value == pytest.approx(figure)
    assert output.higher_is_better == {"perplexity": False, "acc": True}


def test_aggregations_that_are_no_mean_keep_the_harnesss_figure() -> None:
    def f1(items: list[Any]) -> float:
        return float(len(items))

    def weighted_perplexity(items: list[Any]) -> float:
        return float(len(items))

    assert harness._numbers(f1, (1, 0)) is None
    assert harness._numbers(weighted_perplexity, (-6.0, 3)) == ("exp_ratio", [6.0, 3.0])
    sample = {"doc_id": 4, "filter": "none", "metrics": ["f1"], "f1": (1, 1), "target": 1}
    sample |= {"arguments": [("prompt", " yes")], "resps": [[(-1.0, True)]], "filtered_resps": [(-1.0, True)]}
    task = SimpleNamespace(OUTPUT_TYPE="multiple_choice", aggregation=lambda: {"f1": f1}, higher_is_better=lambda: {})
    results = {"samples": {"x": [sample]}, "results": {"x": {"f1,none": 0.5, "f1_stderr,none": "N/A", "alias": "x"}}}
    output = harness._output("x", task, results)
    assert (output.figures, output.kinds) == ({"f1": 0.5}, {})
    assert output.examples == [{"row": 4, "prompt": "prompt", "target": 1, "responses": [(-1.0, True)], "measures": {}}]


def test_a_run_without_benchmarks_needs_no_harness() -> None:
    code = "import sys, selkd.pipeline, selkd.recipe_files as r; r.load_recipe('demo'); print('lm_eval' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"
