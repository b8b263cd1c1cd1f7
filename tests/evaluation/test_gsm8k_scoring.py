"""GSM8K: the final number after ####, and the last number as the flexible form; greedy; shots as they were asked."""

from pathlib import Path
from typing import Any

import pytest
import torch
from lm_eval.api.model import LM
from tiny_benchmarks import make_byte_tokenizer, save_model, write_rows

from selkd.evaluation import harness
from selkd.evaluation.benchmark_tasks import load_benchmarks, measure_benchmarks
from selkd.evaluation.evaluated_model import find_model
from selkd.evaluation.fidelity_task import measure_fidelity
from selkd.evaluation.harness import load_tasks, run_task
from selkd.evaluation.options import BenchmarkOptions, FidelityOptions

# Of 0 + 2, 1 + 2, 2 + 2, 3 + 2.
ANSWERS = ["She has 0+2.\n#### 2", "So there are 3.", "#### 4.", "5 eggs\n#### 7"]


class Scripted(LM):
    """Says what it was told to, and keeps what it was asked."""

    max_length, max_gen_toks = 4096, 256

    def __init__(self) -> None:
        super().__init__()
        self.asked: list[tuple[str, dict[str, Any]]] = []

    def generate_until(self, requests: list[Any]) -> list[str]:
        self.asked = [request.args for request in requests]
        return [ANSWERS[int(prompt.rpartition("Ann has ")[2].split()[0])] for prompt, _ in self.asked]

    def tok_encode(self, text: str) -> list[int]:
        return list(text.encode())

    def loglikelihood(self, requests: Any) -> Any:  # noqa: ARG002
        raise AssertionError

    loglikelihood_rolling = loglikelihood


@pytest.mark.parametrize("shots", [0, 2])
def test_the_final_number_is_matched_greedily(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, shots: int) -> None:
    scripted = Scripted()
    monkeypatch.setattr(harness, "_language_model", lambda *_: scripted)
    data = write_rows(tmp_path / "data")
    task = load_tasks("gsm8k", [data], shots)["gsm8k"]
    task.build_all_requests()
    model = find_model(str(save_model(tmp_path / "model")), "float32", torch.device("cpu"))
    output = run_task("gsm8k", task, range(4), model, batch_size=1)
    assert output.figures["exact_match,strict-match"] == pytest.approx(2 / 4)
    assert output.figures["exact_match,flexible-extract"] == pytest.approx(3 / 4)
    assert len(scripted.asked) == 4
    for prompt, settings in scripted.asked:
        assert settings["do_sample"] is False
        assert prompt.endswith("eggs and buys 2. How many?\nAnswer:")
        assert prompt.count("#### ") == shots
        assert prompt.count("Question: ") == shots + 1


@pytest.mark.parametrize("shots", [0, 2])
def test_the_shots_are_told(tmp_path: Path, shots: int) -> None:
    folder = save_model(tmp_path / "model")
    model = find_model(str(folder), "float32", torch.device("cpu"))
    options = BenchmarkOptions(["gsm8k"], [str(write_rows(tmp_path / "data"))], limit=1, shots=shots)
    assert measure_benchmarks(model, load_benchmarks(options), options)["gsm8k"].summary()["shots"] == shots


def test_fidelity_on_completions_alone(tmp_path: Path) -> None:
    model = find_model(str(save_model(tmp_path / "model")), "float32", torch.device("cpu"))
    file = write_rows(tmp_path / "data") / "gsm8k_test.jsonl"
    fields = {"prompt_field": "question", "completion_field": "answer", "template": "{prompt}\n{completion}"}
    found = measure_fidelity(model, model, FidelityOptions(str(file), **fields))
    ended = make_byte_tokenizer().eos_token_id is not None
    assert found.details["positions"] == sum(len(f"\nShe has {n}+2.\n#### {n + 2}") + ended for n in range(4))
    assert found.figures["kl_nats"] == pytest.approx(0, abs=1e-6)
