"""What a run keeps of held-out text for its report: sums by sample, the change at each token, what models write."""

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tiny_run import make_recipe, make_task
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.models.llama.modeling_llama import LlamaModel

from selkd import distill
from selkd.data.samples import Sample, SampleDataset
from selkd.run import finish
from selkd.sealed import unsealed
from selkd.tokens import changes


@pytest.fixture(autouse=True)
def _cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SELKD_CACHE", str(tmp_path / "selkd"))


def read(run: Path, name: str) -> dict[str, Any]:
    content: dict[str, Any] = json.loads((run / name).read_text())
    return content


def test_a_run_keeps_what_its_report_shows(tmp_path: Path) -> None:
    run = distill(make_recipe(tmp_path), tmp_path / "run").path
    record, sums, kept = unsealed(run / "record.json"), read(run, "fidelity.json"), read(run, "held_out.json")
    assert {"fidelity.json", "held_out.json"} <= record["files"].keys()

    # The sums over samples make the record's figures.
    positions = sum(sums["positions"])
    assert positions == record["fidelity"]["positions"]
    for when in ("before", "after"):
        figures = record["fidelity"][when]
        assert sum(sums[when]["kl_nats"]) / positions == pytest.approx(figures["kl_nats"], rel=1e-5)
        assert sum(sums[when]["top1_agreement"]) / positions == pytest.approx(figures["top1_agreement"])
        nll = sum(sums[when]["cross_entropy_nats"]) / positions
        assert math.exp(nll) == pytest.approx(figures["perplexity"], rel=1e-5)
        # The bootstrap's error is near that of a ratio by its linear form.
        ratio, pairs = figures["kl_nats"], list(zip(sums[when]["kl_nats"], sums["positions"], strict=True))
        n = len(pairs)
        error = math.sqrt(sum((kl - ratio * count) ** 2 for kl, count in pairs) * n / (n - 1)) / positions
        assert record["fidelity"]["standard_errors"][when]["kl_nats"] == pytest.approx(error, rel=0.15)

    # KL at each token, by Transformers' own forward of a single document in float64.
    teacher = AutoModelForCausalLM.from_pretrained(tmp_path / "teacher", dtype=torch.float64)
    student = AutoModelForCausalLM.from_pretrained(run / "student", dtype=torch.float64)
    tokenizer = AutoTokenizer.from_pretrained(run / "student")
    assert kept["nats_of"] == "kl"
    text = kept["texts"][0]
    length = next((t for t, valid in enumerate(text["valid"]) if not valid), len(text["valid"])) + 1  # one document
    ids = torch.tensor([tokenizer.convert_tokens_to_ids([token.strip() for token in text["tokens"][:length]])])
    with torch.no_grad():
        p, q = (model(ids).logits[0].log_softmax(-1) for model in (teacher, student))
    exact = (p.exp() * (p - q)).sum(-1)
    for t in range(length - 1):
        assert text["after"][t] == pytest.approx(exact[t].item(), abs=2e-4)
        assert text["teacher_first"][t].strip() == tokenizer.decode([int(p[t].argmax())]).strip()
        assert text["after_first"][t].strip() == tokenizer.decode([int(q[t].argmax())]).strip()
    assert [value is None for value in text["before"]] == [not valid for valid in text["valid"]]

    # What is written is the greedy answer of each model.
    assert len(kept["continuations"]) == 3
    for row in kept["continuations"]:
        prompt = torch.tensor([tokenizer.convert_tokens_to_ids(row["prompt"].split())])
        for name, model in (("teacher", teacher), ("after", student)):
            width, size = prompt.shape[1], row[name]["tokens"]
            answer = model.generate(prompt, max_new_tokens=size, do_sample=False)[0, width:]
            assert tokenizer.decode(answer, skip_special_tokens=True).split() == row[name]["text"].split()
        same = row["after"]["same"]
        assert row["after"]["text"].split()[:same] == row["teacher"]["text"].split()[:same]
        assert row["teacher"]["same"] == row["teacher"]["tokens"]


def test_every_token_that_the_teacher_runs_on_is_counted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """By counting what enters the teacher's body while the report's texts, answers and examples are made."""
    ran_on = {"train": 0, "held_out": 0, "examples": 0}
    now, forward = ["train"], LlamaModel.forward

    def counted(self: LlamaModel, input_ids: torch.Tensor, **others: Any) -> Any:
        if self.config.num_hidden_layers == 4:  # the student has two
            ran_on[now[-1]] += input_ids.numel()
        return forward(self, input_ids=input_ids, **others)

    def within(name: str) -> None:
        write = getattr(finish, f"write_{name}")

        def writes(*arguments: Any) -> None:
            now.append(name)
            write(*arguments)
            now.pop()

        monkeypatch.setattr(finish, f"write_{name}", writes)

    monkeypatch.setattr(LlamaModel, "forward", counted)
    within("held_out")
    within("examples")
    positions = {"metric": "kl", "policy": "top_k", "fraction": 0.2}
    live: dict[str, Any] = {"positions": positions, "classes": {"sampler": "all"}, "cache": None}
    monkeypatch.setattr(changes, "TOKENS_AT_ONCE", 120)  # two prompts of 16 with their answers, then the third
    record = distill(make_recipe(tmp_path, **live), tmp_path / "run").record
    assert len(read(tmp_path / "run", "held_out.json")["continuations"]) == 3
    tokens = record["teacher_tokens"]
    assert tokens["held_out"] == ran_on["held_out"] > 0
    assert tokens["examples"] == ran_on["examples"] > 0
    assert sum(tokens.values()) == record["counts"]["teacher_tokens"]
    assert unsealed(tmp_path / "run" / "record.json")["teacher_tokens"] == tokens


def test_without_fidelity_no_teacher_is_loaded_and_none_writes(tmp_path: Path) -> None:
    evaluation = {"suite": [], "generations": 2}
    recipe = make_recipe(tmp_path, data=make_task(tmp_path), evaluation=evaluation)
    run = distill(recipe, tmp_path / "run").path
    kept = read(run, "held_out.json")
    assert kept["nats_of"] == "student_ce"
    assert "no fidelity" in kept["why_no_teacher"]
    assert [row["teacher"] for row in kept["continuations"]] == [None, None]
    assert all(row["after"]["tokens"] and row["after"]["same"] is None for row in kept["continuations"])
    # A prompt with its completion: the prompt is gone on from, up to the first learned token.
    assert all(row["prompt"].split()[-1] == "w3" for row in kept["continuations"])
    assert not (run / "fidelity.json").exists()


def test_generations_can_be_turned_off(tmp_path: Path) -> None:
    run = distill(make_recipe(tmp_path, evaluation={"generations": 0}), tmp_path / "run").path
    assert read(run, "held_out.json")["continuations"] == []


def test_sums_on_the_way_are_kept_by_step(tmp_path: Path) -> None:
    """Each line's sums make the figure that was logged at its step; a step that is measured again is kept once."""
    run = distill(make_recipe(tmp_path, evaluation={"every_steps": 2, "generations": 0}), tmp_path / "run").path
    lines = [json.loads(line) for line in (run / "fidelity_steps.jsonl").read_text().splitlines()]
    logged = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    figures = {line["step"]: line["held_out_kl_nats"] for line in logged if "held_out_kl_nats" in line}
    positions = sum(read(run, "fidelity.json")["positions"])
    assert {line["step"]: sum(line["kl_nats"]) / positions for line in lines} == pytest.approx(figures, rel=1e-5)
    assert len(figures) > 2
    record = unsealed(run / "record.json")
    assert "fidelity_steps.jsonl" in record["files"]
    assert 0 <= record["fidelity"]["after"]["calibration_error"] <= 1


def test_a_prompt_is_gone_on_from_whole_and_a_text_from_its_beginning() -> None:
    def prompts(is_target: np.ndarray | None) -> list[int]:
        sample = Sample(np.arange(2, 62), np.zeros(1, np.int32), is_target)
        return [len(prompt) for prompt in changes.prompts_of(SampleDataset.from_samples([sample]), 3, 100)]

    assert prompts(None) == [48]
    assert prompts(np.arange(60) >= 52) == [52]
    assert prompts(np.zeros(60, bool)) == [60]
