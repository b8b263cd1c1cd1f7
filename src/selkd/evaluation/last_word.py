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

from selkd.evaluation.evaluated_model import EvaluatedModel
from selkd.models.head import evaluating


def greedy_confidences(
    model: EvaluatedModel, pairs: Sequence[tuple[list[int], list[int]]], batch_size: int
) -> list[tuple[float, bool]]:
    """The model's confidence in its greedy continuation, and whether that is the true one, for each of N examples.

    Args:
        pairs: context tokens and the true continuation's tokens, as the harness splits them.
        batch_size: contexts at once.
    """
    by_length: dict[int, list[int]] = defaultdict(list)
    for index, (_, continuation) in enumerate(pairs):
        by_length[len(continuation)].append(index)
    answers: dict[int, tuple[float, bool]] = {}
    weights = model.model
    autocast = torch.autocast(weights.device.type, dtype=model.dtype, enabled=model.dtype != weights.dtype)
    with evaluating(weights), autocast, tqdm(total=len(pairs), desc="last words", unit=" examples") as bar:
        for n_tokens, members in by_length.items():
            members.sort(key=lambda index: len(pairs[index][0]))
            for start in range(0, len(members), batch_size):
                batch = members[start : start + batch_size]
                probabilities, tokens = _greedy(model, [pairs[index][0] for index in batch], n_tokens)
                for index, confidence, written in zip(batch, probabilities, tokens, strict=True):
                    answers[index] = (confidence, written == pairs[index][1])
                bar.update(len(batch))
    return [answers[index] for index in range(len(pairs))]


def _greedy(model: EvaluatedModel, contexts: list[list[int]], n_tokens: int) -> tuple[list[float], list[list[int]]]:
    """Probability and tokens of B greedy continuations of ``n_tokens`` tokens; contexts are padded on the left."""
    width, pad, device = max(map(len, contexts)), model.tokenizer.pad_token_id, model.model.device
    padding = [width - len(context) for context in contexts]
    rows = [[pad] * n_pad + context for n_pad, context in zip(padding, contexts, strict=True)]
    input_ids = torch.tensor(rows, device=device)
    mask = (torch.arange(width, device=device) >= torch.tensor(padding, device=device)[:, None]).long()
    past: Any = None
    log_probability = torch.zeros(len(contexts), dtype=torch.float64)
    tokens: list[torch.Tensor] = []
    for _ in range(n_tokens):
        positions = (mask.cumsum(dim=1) - 1).clamp(min=0)[:, -input_ids.shape[1] :]
        output = model.model(
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
