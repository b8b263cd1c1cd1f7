"""A model's answers to prompts: Transformers' generation in padded batches, each prompt with draws of its own.

Shapes: B prompts, T tokens of an answer at most.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from jinja2 import TemplateError
from torch import Tensor
from transformers import (
    GenerationConfig,
    LogitsProcessor,
    LogitsProcessorList,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    TemperatureLogitsWarper,
    TopPLogitsWarper,
)

from selkd.models.head import evaluating


def stop_ids(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """The tokens that end an answer: the tokenizer's end token, the end tokens of the model's generation settings, and
    the token with which the chat template ends a turn."""
    configured = getattr(model.generation_config, "eos_token_id", None)
    tokens = configured if isinstance(configured, list) else [configured]
    tokens = [*tokens, tokenizer.eos_token_id, _end_of_turn(tokenizer)]
    return sorted({int(token) for token in tokens if token is not None})


def _end_of_turn(tokenizer: PreTrainedTokenizerBase) -> int | None:
    """The special token right after the assistant's text, if the tokenizer has a chat template that puts one there."""
    answer = "\ue000"
    turns = [{"role": "user", "content": "a"}, {"role": "assistant", "content": answer}]
    try:
        text = str(tokenizer.apply_chat_template(turns, tokenize=False))
    except (TemplateError, ValueError, TypeError):  # no template, or one that refuses this conversation
        return None
    following = tokenizer(text.rpartition(answer)[2], add_special_tokens=False)["input_ids"]
    is_special = bool(following) and following[0] in tokenizer.added_tokens_decoder
    return int(following[0]) if is_special else None


class _Draw(LogitsProcessor):
    """Leaves one class of each row: the class at which the cumulative distribution passes the row's next uniform.

    An answer is drawn by its prompt's own uniforms, not by a stream that the batch shares. Other prompts in the batch
    change its logits by rounding alone, which in bfloat16 changes about one draw in some tens.
    """

    def __init__(self, uniforms: Tensor, prompt_width: int) -> None:
        self.uniforms, self.prompt_width = uniforms, prompt_width

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        cumulative = torch.softmax(scores.double(), dim=-1).cumsum(dim=-1)
        n_written = input_ids.shape[1] - self.prompt_width
        threshold = self.uniforms[:, n_written, None] * cumulative[:, -1:]
        drawn = torch.searchsorted(cumulative, threshold, right=True).clamp_(max=scores.shape[1] - 1)
        return torch.full_like(scores, -torch.inf).scatter_(1, drawn, 0.0)


@dataclass(frozen=True)
class Decoding:
    """How answers are drawn.

    Attributes:
        temperature: the sampling temperature; 0 takes the most likely token.
        top_p: tokens are drawn from the most likely ones that hold this share of the probability; 1: from all.
        stop: the tokens that end an answer.
        pad_token_id: the token that fills up shorter prompts.
        vocab_size: the number of classes that teacher and student share; no other class is drawn.
    """

    temperature: float
    top_p: float
    stop: Sequence[int]
    pad_token_id: int
    vocab_size: int


def generate(
    model: PreTrainedModel, prompts: Sequence[np.ndarray], uniforms: np.ndarray, decoding: Decoding
) -> list[list[int]]:
    """The tokens of an answer to each of B prompts, including the stop token that ended it, if one did.

    The model's own generation settings have no effect.

    Args:
        prompts: the token ids of each prompt, at least one.
        uniforms: [B, T] in [0, 1), which decide the draws. T is the greatest length of an answer.
    """
    base: Any = model.get_base_model() if hasattr(model, "get_base_model") else model  # without PEFT's wrapper
    device, width, limit = base.device, max(map(len, prompts)), uniforms.shape[1]
    input_ids = torch.full((len(prompts), width), decoding.pad_token_id)
    attention_mask = torch.zeros_like(input_ids)
    for row, prompt in enumerate(prompts):
        input_ids[row, width - len(prompt) :] = torch.from_numpy(np.asarray(prompt, dtype=np.int64))
        attention_mask[row, width - len(prompt) :] = 1
    processors = LogitsProcessorList()
    if decoding.temperature > 0:
        if decoding.temperature != 1:
            processors.append(TemperatureLogitsWarper(decoding.temperature))
        if decoding.top_p < 1:
            processors.append(TopPLogitsWarper(decoding.top_p))
        processors.append(_Draw(torch.from_numpy(uniforms).to(device), width))
    config = GenerationConfig(
        do_sample=False,  # the last processor draws
        max_new_tokens=limit,
        eos_token_id=list(decoding.stop) or None,
        pad_token_id=decoding.pad_token_id,
        suppress_tokens=list(range(decoding.vocab_size, base.get_output_embeddings().weight.shape[0])) or None,
        use_cache=True,
    )
    with evaluating(model), replaced_settings(base, config):
        tokens = base.generate(
            input_ids=input_ids.to(device), attention_mask=attention_mask.to(device), logits_processor=processors
        )
    return [_until(decoding.stop, answer) for answer in tokens[:, width:].tolist()]


def _until(stop: Sequence[int], answer: list[int]) -> list[int]:
    end = next((index for index, token in enumerate(answer) if token in stop), len(answer) - 1)
    return answer[: end + 1]


@contextmanager
def replaced_settings(model: PreTrainedModel, config: GenerationConfig) -> Iterator[None]:
    """Within the block, ``config`` replaces the model's settings; ``generate(config)`` would merge the two."""
    original = model.generation_config
    model.generation_config = config
    try:
        yield
    finally:
        model.generation_config = original
