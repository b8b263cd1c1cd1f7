"""Scores of positions: a metric, and the statistics that it combines, from hidden states and without gradient.

Shapes: B batch, T positions, N positions, n of a chunk, V classes, D hidden.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from selkd.maths.chunked import chunked_statistics, wide
from selkd.maths.head import Head
from selkd.maths.importance import Own, statistics
from selkd.plugins import Metric, Policy
from selkd.recipe.choices import PositionOptions
from selkd.selection.positions import StepContext, counts_of, eligible, select
from selkd.selection.randomness import draw_uniforms, position_uniforms

LogitsOf = Callable[[slice], Tensor]
"""Gives the logits [n, V] of some of N positions."""


@dataclass(frozen=True)
class PositionScores:
    """A metric's values u [B, T] and the statistics [B, T] that it combines, 0 where not valid; detached."""

    values: Tensor
    statistics: dict[str, Tensor]


def position_statistics(
    names: Sequence[str],
    hidden_states: Tensor,
    head: Head,
    targets: Tensor,
    teacher_logits: LogitsOf | None,
    own: Own | None = None,
) -> dict[str, Tensor]:
    """Statistics ``names`` of N positions in one pass over the chunks of their logits: name -> [N].

    Args:
        names: names that ``selkd.maths.importance.statistics`` knows.
        hidden_states: the student's, [N, D].
        head: its head, in the dtype of the products.
        targets: int64 [N].
        teacher_logits: gives the teacher's at the same positions, on any device; None if no name needs them.
        own: a user's functions by name, as ``statistics`` takes them.
    """

    def compute(student_logits: Tensor, rows: slice) -> Tensor:
        logits = None if teacher_logits is None else teacher_logits(rows).to(student_logits.device)
        return statistics(names, student_logits, logits, targets[rows], own)

    columns = chunked_statistics(hidden_states, head, compute, n_statistics=len(names))
    return dict(zip(names, columns.unbind(dim=-1), strict=True))


@torch.no_grad()
def score_positions(
    metric: str | None,
    hidden_states: Tensor,
    head: Head,
    batch: dict[str, Tensor],
    teacher_logits: LogitsOf | None,
    random_stream: tuple[int, int] | None = None,
) -> PositionScores:
    """The metric at the valid positions of a batch.

    Args:
        metric: a metric's name; ``random`` is uniform noise; None scores nothing (zeros).
        hidden_states: the student's, [B, T, D].
        head: its head, in the dtype of the products.
        batch: from ``selkd.data.collate.collate``.
        teacher_logits: gives the teacher's at the valid positions, in order; None if the metric does not need them.
        random_stream: the run's seed and the optimiser step, for ``random``.
    """
    valid_mask = batch["valid_mask"]
    if metric is None:
        return PositionScores(wide(hidden_states.new_zeros(valid_mask.shape)), {})
    entry = Metric.find(metric)
    if entry.is_noise:
        assert random_stream is not None, "noise is a function of seed and step"
        seed, step = random_stream
        ids, mask = batch["sample_ids"].cpu().numpy(), valid_mask.cpu().numpy()
        noise = torch.from_numpy(position_uniforms(seed, ids, mask, "positions", step))
        return PositionScores(noise.to(hidden_states.device), {})
    own = {metric: entry.values} if entry.is_own else {}
    targets = batch["targets"][valid_mask]
    at_valid = position_statistics(entry.statistics, hidden_states[valid_mask], head, targets, teacher_logits, own)
    placed = {
        name: values.new_zeros(valid_mask.shape).masked_scatter_(valid_mask, values)
        for name, values in at_valid.items()
    }
    return PositionScores(entry.combine(placed, valid_mask), placed)


def choose_positions(
    options: PositionOptions, scores: Tensor, batch: dict[str, Tensor], context: StepContext, *, seed: int
) -> Tensor:
    """The policy's coefficients [B, T] over the eligible positions of a batch; draws are a function of each sample."""
    mask = eligible(options, batch["valid_mask"], batch["position_ids"])
    use = Policy.find(options.policy).uniforms
    if use is None:
        return select(options, scores, mask, context)
    ids = batch["sample_ids"].cpu().numpy()
    if use == "of draws":
        assert context.fraction is not None, "a policy that draws has a fraction"
        draws = counts_of(context.fraction, mask.sum(dim=-1)).cpu().numpy()
        noise = draw_uniforms(seed, ids, draws, "position draws", context.step)
    else:
        noise = position_uniforms(seed, ids, mask.cpu().numpy(), "own policy", context.step)
    return select(options, scores, mask, context, torch.from_numpy(noise).to(scores.device))
