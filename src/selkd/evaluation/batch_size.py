"""How many prompts go through a model together: from what one needs and what memory there is.

Legend: T tokens of the longest prompt with its answer, V classes.
"""

from typing import Any

import psutil
import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

_MOST = 128
_MOST_ON_CPU = 16  # a processor is busy with a few prompts; writing answers token by token, it is not
_BYTES_A_LOGIT = 12  # the logits, their float32 copy and its log-softmax
_CANDIDATES = 8


def rows_at_once(task: Any, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> int:
    """A batch size whose logits and key-value cache take at most a quarter of the memory that is free."""
    generates = task.OUTPUT_TYPE == "generate_until"
    longest = _longest(task, tokenizer)
    config = model.config.get_text_config(decoder=True)
    if generates:
        longest += (task.get_config("generation_kwargs") or {}).get("max_gen_toks", 256)
    all_heads = getattr(config, "num_attention_heads", None) or 1  # models without attention have a smaller state
    heads = getattr(config, "num_key_value_heads", None) or all_heads
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // all_heads
    cache_bytes = 2 * config.num_hidden_layers * heads * head_dim * 4 * longest
    logits_bytes = _BYTES_A_LOGIT * int(config.vocab_size) * (1 if generates else longest)
    fitting = _free_bytes(model.device) // 4 // (logits_bytes + cache_bytes)
    most = _MOST_ON_CPU if model.device.type == "cpu" and not generates else _MOST
    return max(1, min(int(fitting), most))


def _longest(task: Any, tokenizer: PreTrainedTokenizerBase) -> int:
    """T: tokens of the longest of the prompts with the most characters."""
    texts = ["".join(part for part in instance.args if isinstance(part, str)) for instance in task.instances]
    texts.sort(key=len, reverse=True)
    return max(len(tokenizer(text)["input_ids"]) for text in texts[:_CANDIDATES])


def _free_bytes(device: torch.device) -> int:
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0])
    return int(psutil.virtual_memory().available)
