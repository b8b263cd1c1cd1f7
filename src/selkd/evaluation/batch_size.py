"""How many prompts go through a model together, from what one prompt needs and what memory is free."""

from typing import Any

import psutil
import torch

from selkd.evaluation.evaluated_model import EvaluatedModel

_MOST = 128
_MOST_ON_CPU = 16  # a few prompts keep a processor busy, unless it writes answers token by token
_BYTES_A_LOGIT = 12  # the logits, their float32 copy and its log-softmax
_CANDIDATES = 8


def rows_at_once(task: Any, model: EvaluatedModel) -> int:
    """The batch size whose logits and key-value cache take at most a quarter of the free memory."""
    writes = task.OUTPUT_TYPE == "generate_until"
    config = model.model.config.get_text_config(decoder=True)
    all_heads = getattr(config, "num_attention_heads", None) or 1  # a model without attention needs less
    heads = getattr(config, "num_key_value_heads", None) or all_heads
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // all_heads
    longest = _longest_prompt(task, model) + (answer_tokens(task) if writes else 0)
    cache_bytes = 2 * config.num_hidden_layers * heads * head_dim * 4 * longest
    logits_bytes = _BYTES_A_LOGIT * int(config.vocab_size) * (1 if writes else longest)
    device = model.model.device
    fitting = _free_bytes(device) // 4 // (logits_bytes + cache_bytes)
    return max(1, min(int(fitting), _MOST_ON_CPU if device.type == "cpu" and not writes else _MOST))


def answer_tokens(task: Any) -> int:
    """The greatest number of tokens that a written answer of the task may have."""
    return int((task.get_config("generation_kwargs") or {}).get("max_gen_toks", 256))


def _longest_prompt(task: Any, model: EvaluatedModel) -> int:
    """The most tokens that one of the prompts with the most characters has."""
    texts = ["".join(part for part in instance.args if isinstance(part, str)) for instance in task.instances]
    longest_texts = sorted(texts, key=len, reverse=True)[:_CANDIDATES]
    return max(len(model.tokenizer(text)["input_ids"]) for text in longest_texts)


def _free_bytes(device: torch.device) -> int:
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0])
    return int(psutil.virtual_memory().available)
