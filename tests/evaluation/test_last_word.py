"""The confidence in the model's own last word, against a plain forward pass for each token."""

import math
from pathlib import Path

import pytest
import torch
from tiny_benchmarks import ROWS, evaluated, make_byte_tokenizer, save_model, write_rows
from transformers import AutoModelForCausalLM

from selkd.evaluation.harness import load_tasks, run_task
from selkd.evaluation.last_word import greedy_confidences


def test_it_is_the_product_of_the_greedy_tokens_probabilities(tmp_path: Path) -> None:
    """Contexts of different lengths in one batch, words of different lengths, one of them the greedy one."""
    model = AutoModelForCausalLM.from_pretrained(save_model(tmp_path)).eval()
    generator = torch.Generator().manual_seed(3)
    contexts = [torch.randint(1, 257, (length,), generator=generator).tolist() for length in (5, 9, 13, 7)]
    words = [[3, 4], [5, 6], [7], [8, 9]]
    expected = []
    for number, (context, word) in enumerate(zip(contexts, words, strict=True)):
        tokens, probability, written = list(context), 1.0, []
        for _ in word:
            with torch.no_grad():
                best, token = torch.softmax(model(torch.tensor([tokens])).logits[0, -1], dim=-1).max(dim=-1)
            probability *= float(best)
            written.append(int(token))
            tokens.append(int(token))
        if number == 3:
            words[3] = written
        expected.append((probability, number == 3))
    found = greedy_confidences(evaluated(model), list(zip(contexts, words, strict=True)), 3)
    assert [right for _, right in found] == [right for _, right in expected]
    assert [confidence for confidence, _ in found] == pytest.approx(
        [confidence for confidence, _ in expected], rel=1e-4
    )


def test_it_is_right_where_the_harness_says_so(tmp_path: Path) -> None:
    """A model that learned one of the last words by heart: accuracy, confidence and log-likelihood must agree."""
    model = AutoModelForCausalLM.from_pretrained(save_model(tmp_path / "model"))
    tokenizer, word = make_byte_tokenizer(), " lamp"
    text = torch.tensor(tokenizer([ROWS["lambada_openai_test.jsonl"][1]["text"]])["input_ids"])
    optimiser = torch.optim.Adam(model.parameters(), lr=0.01)
    for _ in range(30):
        logits = model(text).logits[0, -len(word) - 1 : -1]
        torch.nn.functional.cross_entropy(logits, text[0, -len(word) :]).backward()
        optimiser.step()
        optimiser.zero_grad()
    write_rows(tmp_path, "lambada_openai_test.jsonl")
    task = load_tasks("lambada", [tmp_path], 0)["lambada"]
    task.build_all_requests()
    output = run_task("lambada", task, range(6), evaluated(model.eval()))
    accuracy = [example["measures"]["acc"][0] for example in output.examples]
    assert accuracy[1] == 1
    assert sum(accuracy) < 6
    assert [example["measures"]["ece"][1] for example in output.examples] == accuracy
    loglikelihood = output.examples[1]["responses"][0][0]
    assert output.examples[1]["measures"]["ece"][0] == pytest.approx(math.exp(loglikelihood), rel=1e-3)
