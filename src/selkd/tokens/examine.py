"""Real text with what a metric and some policies make of it: for the report's page and for ``selkd tokens``."""

from collections.abc import Sequence
from typing import Any

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from selkd.data.collate import collate
from selkd.data.samples import Sample
from selkd.models.head import evaluating, head_of, hidden_states
from selkd.models.tokenizers import token_texts
from selkd.recipe.choices import ClassOptions, PositionOptions
from selkd.selection.position_scores import choose_positions, score_positions
from selkd.selection.positions import StepContext, step_context
from selkd.teacher.live import LiveTeacher


def examine(
    student: PreTrainedModel,
    teacher: PreTrainedModel | None,
    tokenizer: PreTrainedTokenizerBase,
    samples: Sequence[Sample],
    metric: str,
    policies: Sequence[PositionOptions],
    vocab_size: int,
    seed: int,
    *,
    contexts: Sequence[StepContext] | None = None,
) -> dict[str, Any]:
    """The samples' tokens, the metric at each position, and what each policy makes of it.

    Index t of scores and coefficients is about token t+1. Scores are exact, in the models' own dtypes. A policy ranks
    by its own metric, where that is another.

    Args:
        teacher: needed if a metric needs it.
        contexts: where in a run each policy is, all at the same step; by default at the first. gls has no queue here,
            so its start is shown: the top scores of each sample.

    Returns:
        ``metric``; ``policies``, their names; ``samples``, a list of ``sample_id``, ``tokens``, ``scores`` (None where
        not valid), ``valid``, ``coefficients`` (one list a policy) and ``selected`` (by the first policy).
    """
    batch = {name: tensor.to(student.device) for name, tensor in collate(samples, int(tokenizer.pad_token_id)).items()}
    valid_mask, head = batch["valid_mask"], head_of(student).slice_vocab(vocab_size)
    with evaluating(student):
        hidden = hidden_states(student, batch["input_ids"], batch["position_ids"])
    targets = None
    if teacher is not None:
        targets = LiveTeacher(teacher, ClassOptions.model_validate({}), 1.0, seed, vocab_size).targets(batch, 0)
    names = {metric, *(options.metric for options in policies)}
    contexts = contexts or [step_context(options, 0, 1) for options in policies]
    step = contexts[0].step if contexts else 0
    scores = {name: score_positions(name, hidden, head, batch, targets, seed=seed, step=step).values for name in names}
    coefficients = [
        choose_positions(options, scores[options.metric], batch, context, seed=seed)
        for options, context in zip(policies, contexts, strict=True)
    ]

    def row_of(tensor: torch.Tensor, row: int) -> list[Any]:
        return tensor[row].tolist()[: len(samples[row].token_ids)]

    return {
        "metric": metric,
        "policies": [options.policy for options in policies],
        "samples": [
            {
                "sample_id": sample.id.hex(),
                "tokens": token_texts(tokenizer, sample.token_ids.tolist()),
                "scores": [
                    round(value, 4) if valid else None
                    for value, valid in zip(row_of(scores[metric], row), row_of(valid_mask, row), strict=True)
                ],
                "valid": row_of(valid_mask, row),
                "coefficients": [row_of(each, row) for each in coefficients],
                "selected": row_of(coefficients[0] > 0, row),
            }
            for row, sample in enumerate(samples)
        ],
    }
