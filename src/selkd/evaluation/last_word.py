"""How sure a model is of the last word that it would write itself, for LAMBADA's calibration.

The harness scores the true last word only; calibration needs the probability of the model's own answer, right or
wrong: the product of the probabilities of as many greedy tokens as the true word has. The answer is right if these are
the true word's tokens, as in the harness's accuracy of the greedy last word.
"""

from collections import defaultdict
from collections.abc import Sequence
from typing import Any

import torch
from tqdm import tqdm
from transformers import GenerationConfig

from selkd.evaluation.evaluated_model import EvaluatedModel
from selkd.models.generation import replaced_settings
from selkd.models.head import evaluating


def greedy_confidences(
    model: EvaluatedModel, pairs: Sequence[tuple[list[int], list[int]]], batch_size: int
) -> list[tuple[float, bool]]:
    """For each example, the model's confidence in its greedy continuation, and whether that is the true one.

    Args:
        pairs: for each example the context's tokens and the true continuation's, as the harness splits them.
        batch_size: contexts at once.
    """
    by_length: dict[int, list[int]] = defaultdict(list)
    for index, (_, continuation) in enumerate(pairs):
        by_length[len(continuation)].append(index)
    answers: dict[int, tuple[float, bool]] = {}
    weights = model.model
    autocast = torch.autocast(weights.device.type, dtype=model.dtype, enabled=model.dtype != weights.dtype)
    with evaluating(weights), autocast, tqdm(total=len(pairs), desc="last words", unit=" examples") as bar:
        for n_tokens, indices in by_length.items():
            indices.sort(key=lambda index: len(pairs[index][0]))
            for start in range(0, len(indices), batch_size):
                batch = indices[start : start + batch_size]
                probabilities, answer_ids = _greedy(model, [pairs[index][0] for index in batch], n_tokens)
                for index, confidence, token_ids in zip(batch, probabilities, answer_ids, strict=True):
                    answers[index] = (confidence, token_ids == pairs[index][1])
                bar.update(len(batch))
    return [answers[index] for index in range(len(pairs))]


def _greedy(model: EvaluatedModel, contexts: list[list[int]], n_tokens: int) -> tuple[list[float], list[list[int]]]:
    """The probability and the tokens of each context's greedy continuation; contexts are padded on the left."""
    width, pad, weights = max(map(len, contexts)), model.tokenizer.pad_token_id, model.model
    input_ids = torch.tensor([[pad] * (width - len(context)) + context for context in contexts])
    mask = torch.tensor([[0] * (width - len(context)) + [1] * len(context) for context in contexts])
    settings = GenerationConfig(
        do_sample=False,
        max_new_tokens=n_tokens,
        pad_token_id=pad,
        use_cache=True,
        output_logits=True,
        return_dict_in_generate=True,
    )
    with replaced_settings(weights, settings):
        output: Any = weights.generate(input_ids=input_ids.to(weights.device), attention_mask=mask.to(weights.device))
    best = torch.stack([torch.log_softmax(logits.float(), dim=-1).amax(dim=-1) for logits in output.logits])
    return best.double().sum(dim=0).exp().tolist(), output.sequences[:, width:].tolist()
