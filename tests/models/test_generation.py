"""Answers: Transformers' own greedy ones where nothing is drawn, exact draws that belong to a prompt where it is."""

import gc
from dataclasses import replace

import numpy as np
import pytest
import torch
from chatty import PLAIN, chat_tokenizer
from tiny import V, make_model, make_tokenizer
from transformers import DynamicCache, PreTrainedModel

from selkd.models.generation import Decoding, generate, stop_ids

PROMPTS = [np.arange(2, 2 + n) for n in (1, 7, 3)]
STOP = [5, 1]


def answers(
    model: PreTrainedModel, prompts: list[np.ndarray], uniforms: np.ndarray, **changes: float
) -> list[list[int]]:
    decoding = Decoding(temperature=1.0, top_p=1.0, stop=STOP, pad_token_id=1, vocab_size=V)
    return generate(model, prompts, uniforms, replace(decoding, **changes))


def test_without_temperature_an_answer_is_transformers_greedy_one() -> None:
    model = make_model(3)
    model.generation_config.repetition_penalty = 5.0  # settings of its own play no part
    found = answers(model, PROMPTS, np.zeros((3, 9)), temperature=0.0)
    assert model.generation_config.repetition_penalty == 5.0
    for prompt, answer in zip(PROMPTS, found, strict=True):
        ids = prompt.tolist()
        for token in answer:
            assert token == int(model(torch.tensor([ids])).logits[0, -1].argmax())
            ids.append(token)
        assert len(answer) == 9 or answer[-1] in STOP
        assert not set(answer[:-1]) & set(STOP)


def test_an_answer_does_not_depend_on_the_others_beside_it() -> None:
    model, uniforms = make_model(3), np.random.default_rng(0).random((3, 9))
    together = answers(model, PROMPTS, uniforms)
    assert together == [answers(model, [p], uniforms[i : i + 1])[0] for i, p in enumerate(PROMPTS)]
    assert together[::-1] == answers(model, PROMPTS[::-1], uniforms[::-1].copy())
    assert together != answers(model, PROMPTS, np.random.default_rng(1).random((3, 9)))
    assert not model.training


def test_the_draws_are_the_models_distribution() -> None:
    model, n = make_model(3), 4000
    grid = (np.arange(n)[:, None] + 0.5) / n
    prompt = np.array([7, 8])
    p = torch.softmax(model(torch.tensor([[7, 8]])).logits[0, -1].double(), dim=-1)
    for temperature, top_p in ((1.0, 1.0), (0.5, 1.0), (1.0, 0.6)):
        expected = p ** (1 / temperature) / (p ** (1 / temperature)).sum()
        if top_p < 1:
            order = expected.argsort(descending=True)
            kept = order[: int((expected[order].cumsum(0) < top_p).sum()) + 1]
            expected = torch.zeros_like(p).scatter(0, kept, expected[kept])
            expected /= expected.sum()
        found = answers(model, [prompt] * n, grid, temperature=temperature, top_p=top_p)
        shares = torch.bincount(torch.tensor([answer[0] for answer in found]), minlength=V) / n
        assert (shares - expected).abs().max() <= 1.5 / n


def test_classes_that_the_teacher_lacks_are_never_drawn() -> None:
    uniforms = np.random.default_rng(0).random((3, 30))
    decoding = Decoding(temperature=3.0, top_p=1.0, stop=[], pad_token_id=1, vocab_size=20)
    found = generate(make_model(3), PROMPTS, uniforms, decoding)
    assert max(max(answer) for answer in found) < 20
    assert [len(answer) for answer in found] == [30] * 3


def test_the_cache_is_used_and_then_freed() -> None:
    model, widths = make_model(3), []
    hook = model.model.embed_tokens.register_forward_hook(lambda _m, given, _o: widths.append(given[0].shape[1]))
    answers(model, PROMPTS, np.random.default_rng(0).random((3, 9)))
    hook.remove()
    assert widths[0] == 7
    assert set(widths[1:]) == {1}, "after the prompt one token at a time"
    gc.collect()
    assert not [found for found in gc.get_objects() if isinstance(found, DynamicCache)]


@pytest.mark.parametrize(("own", "expected"), [(None, [1]), (7, [1, 7]), ([7, 9], [1, 7, 9])])
def test_the_stop_tokens_are_the_tokenizers_and_the_models(own: int | list[int] | None, expected: list[int]) -> None:
    model = make_model(3)
    model.generation_config.eos_token_id = own
    assert stop_ids(model, make_tokenizer()) == expected


def test_the_end_of_a_chats_turn_stops_too() -> None:
    """A base model's end token is often not the one that its template writes."""
    tokenizer = chat_tokenizer(PLAIN)
    tokenizer.eos_token = "</s>"
    ends = sorted(tokenizer.convert_tokens_to_ids(["</s>", "<|im_end|>"]))
    model = make_model(3)
    model.generation_config.eos_token_id = None
    assert stop_ids(model, tokenizer) == ends
    tokenizer.chat_template = None
    assert stop_ids(model, tokenizer) == [tokenizer.eos_token_id]
