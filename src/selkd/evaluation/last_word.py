"""How sure a model is of the last word that it would write itself, for LAMBADA's calibration.

The harness scores the true last word only; calibration needs the probability of the model's own answer, right or
wrong. It is the product of the probabilities of the greedy tokens, as many as the true word has. The answer is right
where all of them are the true word's, which is the harness's accuracy of the greedy last word.

Legend: N examples, B of a batch, n tokens of the last word, V classes.
"""

from collections import defaultdict
from collections.abc import Sequence
from typing import Any

import torch
from tqdm import tqdm
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from selkd.models.head import evaluating


def greedy_confidences(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    pairs: Sequence[tuple[list[int], list[int]]],
    dtype: torch.dtype,
    batch_size: int,
) -> list[tuple[float, bool]]:
    """The model's confidence in its greedy continuation, and whether that is the true one, for each of N examples.

    Args:
        pairs: context tokens and the true continuation's tokens, as the harness splits them.
        dtype: of the products, under autocast where the weights have another.
        batch_size: contexts at once.
    """
    by_length: dict[int, list[int]] = defaultdict(list)
    for index, (_, continuation) in enumerate(pairs):
        by_length[len(continuation)].append(index)
    found: dict[int, tuple[float, bool]] = {}
    autocast = torch.autocast(model.device.type, dtype=dtype, enabled=dtype != model.dtype)
    with evaluating(model), autocast, tqdm(total=len(pairs), desc="last words", unit=" examples") as bar:
        for n_tokens, members in by_length.items():
            members.sort(key=lambda index: len(pairs[index][0]))
            for start in range(0, len(members), batch_size):
                batch = members[start : start + batch_size]
                probabilities, tokens = _greedy(model, tokenizer, [pairs[i][0] for i in batch], n_tokens)
                for index, confidence, written in zip(batch, probabilities, tokens, strict=True):
                    found[index] = (confidence, written == pairs[index][1])
                bar.update(len(batch))
    return [found[index] for index in range(len(pairs))]


def _greedy(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, contexts: list[list[int]], n_tokens: int
) -> tuple[list[float], list[list[int]]]:
    """Probability and tokens of B greedy continuations of ``n_tokens`` tokens."""
    width = max(map(len, contexts))
    pad = tokenizer.pad_token_id
    input_ids = torch.tensor([[pad] * (width - len(context)) + context for context in contexts], device=model.device)
    mask = torch.tensor([[0] * (width - len(c)) + [1] * len(c) for c in contexts], device=model.device)
    past: Any = None
    log_probability = torch.zeros(len(contexts), dtype=torch.float64)
    tokens: list[torch.Tensor] = []
    for _ in range(n_tokens):
        positions = (mask.cumsum(dim=1) - 1).clamp(min=0)[:, -input_ids.shape[1] :]
        output = model(
            input_ids=input_ids, attention_mask=mask, position_ids=positions, past_key_values=past, use_cache=True,
            logits_to_keep=1,
        )  # fmt: skip
        past = output.past_key_values
        best, token = torch.log_softmax(output.logits[:, -1].float(), dim=-1).max(dim=-1)
        log_probability += best.double().cpu()
        tokens.append(token)
        input_ids = token[:, None]
        mask = torch.cat([mask, torch.ones_like(input_ids)], dim=1)
    return log_probability.exp().tolist(), torch.stack(tokens, dim=1).tolist()
