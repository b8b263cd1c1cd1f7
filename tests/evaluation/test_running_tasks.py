"""How a task is run: batch sizes, memory that runs out, chat templates, and what needs no harness at all."""

import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from tiny_benchmarks import BYTES, evaluated, make_byte_tokenizer, save_model, write_rows
from transformers import AutoModelForCausalLM, GPT2Config, GPT2LMHeadModel

from selkd.errors import RunError
from selkd.evaluation import batch_size, harness
from selkd.evaluation.harness import load_tasks, run_task
from selkd.evaluation.results import Measured, TaskResult


def prepared(name: str, folder: Path) -> Any:
    task = load_tasks(name, [write_rows(folder / "data")], 0)[name]
    task.build_all_requests()
    return task


def run(name: str, folder: Path, positions: int = 4096, **options: Any) -> Measured:
    saved = save_model(folder / "model", max_position_embeddings=positions)
    model = AutoModelForCausalLM.from_pretrained(saved).eval()
    task = prepared(name, folder)
    return run_task(name, task, range(len(task.eval_docs)), evaluated(model), **options)


def test_the_batch_size_follows_memory_and_prompts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = evaluated(AutoModelForCausalLM.from_pretrained(save_model(tmp_path / "model")))
    task, writing = prepared("piqa", tmp_path), prepared("gsm8k", tmp_path)
    longest = len("Question: How do I ready cage 0?\nAnswer: Add paper scraps.")
    one_prompt = longest * (BYTES * 12 + 2 * 2 * 2 * 8 * 4)  # logits, and keys and values of 2 layers x 2 heads x 8
    for free, expected in ((0, 1), (4 * 5 * one_prompt, 5), (10**12, 16)):
        monkeypatch.setattr(batch_size, "_free_bytes", lambda _, free=free: free)
        assert batch_size.rows_at_once(task, model) == expected
    assert batch_size.rows_at_once(writing, model) == 128


def test_the_batch_is_halved_until_it_fits(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    expected = run("piqa", tmp_path)
    language_model, tried = harness._language_model, []

    def watched(model: Any, size: int) -> Any:
        tried.append(size)
        found = language_model(model, size)
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
    output = run_task("piqa", prepared("piqa", tmp_path), [0, 3], evaluated(model, tokenizer), chat_template=True)
    assert [example["row"] for example in output.examples] == [0, 3]
    assert output.examples[1]["prompt"] == "<user>Question: How do I ready cage 3?\nAnswer:</><assistant>"


@pytest.mark.usefixtures("short_answers")
def test_prompts_that_are_cut_are_marked(tmp_path: Path) -> None:
    """A byte is a token: a prompt and its answer fit where all but the last token, which is not read, have a place."""
    longest: dict[tuple[str, int], int] = {}
    for name in ("piqa", "lambada"):
        for instance in prepared(name, tmp_path).instances:
            key = name, instance.doc_id
            longest[key] = max(longest.get(key, 0), len("".join(instance.args)))
    for name, positions in (("piqa", 57), ("piqa", 56), ("lambada", 62), ("lambada", 60)):
        output = run(name, tmp_path, positions)
        assert output.details["model_tokens"] == positions
        assert output.details["prompts_cut"] == sum(e["cut"] for e in output.examples)
        assert [e["cut"] for e in output.examples] == [longest[name, row] - 1 > positions for row in range(6)]
    (prompt, _), *_ = (instance.args for instance in prepared("gsm8k", tmp_path).instances)
    for positions, is_cut in ((len(prompt) + 4, False), (len(prompt) + 3, True)):
        assert [example["cut"] for example in run("gsm8k", tmp_path, positions).examples] == [is_cut] * 4


def test_learned_positions_are_not_exceeded(tmp_path: Path) -> None:
    """The last word's confidence looks at the same tokens as its accuracy; it used to run beyond the table."""
    torch.manual_seed(0)
    config = GPT2Config(vocab_size=BYTES, n_embd=32, n_layer=2, n_head=4, n_positions=32, eos_token_id=0)
    model = GPT2LMHeadModel(config).eval()
    output = run_task("lambada", prepared("lambada", tmp_path), range(6), evaluated(model))
    assert all(example["cut"] for example in output.examples)
    assert [e["measures"]["ece"][1] for e in output.examples] == [e["measures"]["acc"][0] for e in output.examples]


def test_the_figures_are_the_harnesss(tmp_path: Path) -> None:
    """What the resampled measures give over all examples is what the harness itself reports."""
    for name in ("piqa", "lambada"):
        output = run(name, tmp_path)
        found = TaskResult(**vars(output), name=name, fingerprint={}, seconds=0.0)
        assert output.figures.keys() <= found.estimates.keys()
        for metric, figure in output.figures.items():
            assert found.estimates[metric].value == pytest.approx(figure)
    assert output.higher_is_better == {"perplexity": False, "acc": True}


def test_scores_that_are_not_finite_are_an_error() -> None:
    """A mask in the head gives -inf, a metric of the harness nan; neither is JSON."""
    example = {"row": 4, "responses": [(-1.0, True)], "measures": {"acc": [1.0, 1.0]}}
    for examples, figures, message in (
        ([example | {"responses": [(float("-inf"), False)]}], {}, "x, row 4: expected a finite number, got -inf"),
        ([example | {"measures": {"acc": [1.0, 1.0], "ece": [float("nan"), 1.0]}}], {}, "x, row 4: .* got nan"),
        ([example], {"f1": float("nan")}, "x, f1: expected a finite number, got nan"),
    ):
        with pytest.raises(RunError, match=message):
            harness._require_finite("x", Measured(examples, {}, figures, {}, {}))
    harness._require_finite("x", Measured([example, example | {"responses": ["nan"]}], {}, {"f1": 0.5}, {}, {}))


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
    output = harness._read_results("x", task, results, {4}, 64)
    assert (output.figures, output.kinds) == ({"f1": 0.5}, {})
    expected = {"row": 4, "prompt": "prompt", "target": 1, "responses": [(-1.0, True)], "measures": {}, "cut": True}
    assert output.examples == [expected]
    assert output.details == {"prompts_cut": 1, "model_tokens": 64}


def test_a_run_without_benchmarks_needs_no_harness() -> None:
    code = "import sys, selkd.run.pipeline, selkd as s; s.load_recipe('demo'); print('lm_eval' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"
