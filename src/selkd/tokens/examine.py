"""The metric and the coefficients of some policies at each position of a text, for reports and ``selkd tokens``.

Shapes: B samples, T positions.
"""

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from selkd.data.collate import collate
from selkd.data.samples import Sample
from selkd.models.head import evaluating
from selkd.models.pair import ModelPair
from selkd.models.tokenizers import token_texts
from selkd.plugins import Metric
from selkd.recipe.choices import PositionOptions
from selkd.selection.position_scores import choose_positions, score_positions
from selkd.selection.positions import StepContext


def examine(
    models: ModelPair,
    samples: Sequence[Sample],
    metric: str,
    policies: Sequence[tuple[PositionOptions, StepContext]],
    seed: int,
) -> dict[str, Any]:
    """The samples' tokens, the metric at each position, and the coefficients that each policy gives.

    Index t of scores and coefficients is about token t+1. A policy ranks by its own metric, which may be another.

    Args:
        models: the teacher is loaded only if a metric needs it.
        policies: the policies and their contexts, all at the same step. gls has no queue here, so it picks the top
            scores of each sample, as at the start of a run.

    Returns:
        ``metric``; ``policies``, their names; ``samples``, a list of ``sample_id``, ``tokens``, ``scores`` (None where
        not valid), ``valid``, ``coefficients`` (one list a policy) and ``selected`` (by the first policy).
    """
    padded = collate(samples, models.pad_token_id)
    batch = {name: tensor.to(models.student.device) for name, tensor in padded.items()}
    valid_mask, step = batch["valid_mask"], policies[0][1].step
    metrics = {metric, *(options.metric for options, _ in policies)}
    with evaluating(models.student):
        hidden = models.student_hidden(batch)
        needs_teacher = {name: name is not None and Metric.find(name).needs_teacher for name in metrics}
        teacher_logits = models.teacher_logits(batch) if any(needs_teacher.values()) else None
    scores = {
        name: score_positions(
            name, hidden, models.student_head, batch, teacher_logits if needs_teacher[name] else None, (seed, step)
        ).values
        for name in metrics
    }
    coefficients = [
        choose_positions(options, scores[options.metric], batch, context, seed=seed) for options, context in policies
    ]

    def row_of(tensor: Tensor, row: int) -> list[Any]:
        return tensor[row].tolist()[: len(samples[row].token_ids)]

    return {
        "metric": metric,
        "policies": [options.policy for options, _ in policies],
        "samples": [
            {
                "sample_id": sample.id.hex(),
                "tokens": token_texts(models.tokenizer, sample.token_ids.tolist()),
                "scores": [
                    round(value, 4) if valid else None
                    for value, valid in zip(row_of(scores[metric], row), row_of(valid_mask, row), strict=True)
                ],
                "valid": row_of(valid_mask, row),
                "coefficients": [row_of(weights, row) for weights in coefficients],
                "selected": row_of(coefficients[0] > 0, row),
            }
            for row, sample in enumerate(samples)
        ],
    }
