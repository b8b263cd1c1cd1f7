"""Scores of positions: a metric at every valid position of a batch, from hidden states, without gradient.

Shapes: B batch, T positions, n of a chunk, V classes, D hidden.
"""

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from selkd.maths.chunked import chunked_statistics, wide
from selkd.maths.head import Head
from selkd.maths.importance import statistics
from selkd.plugins import Metric, Policy
from selkd.recipe.choices import PositionOptions
from selkd.selection.positions import StepContext, counts_of, eligible, select
from selkd.selection.randomness import draw_uniforms, position_uniforms


class Logits(Protocol):
    def logits(self, rows: slice) -> Tensor:
        """Logits [n, V] of some positions."""


class LogitsAt(Protocol):
    def at(self, index: Tensor) -> Logits:
        """The logits at flat positions ``index`` into [B * T]."""


@dataclass(frozen=True)
class PositionScores:
    """A metric's values u [B, T] and the statistics [B, T] that it was made of, 0 where not valid; detached."""

    values: Tensor
    statistics: dict[str, Tensor]


@torch.no_grad()
def score_positions(
    metric: str | None,
    hidden_states: Tensor,
    head: Head,
    batch: dict[str, Tensor],
    teacher: LogitsAt | None,
    *,
    seed: int,
    step: int,
) -> PositionScores:
    """The metric at the valid positions of a batch, one pass over the chunks for all the statistics that it needs.

    Args:
        metric: a metric's name; ``random`` is uniform noise of (seed, sample id, step); None scores nothing (zeros).
        hidden_states: the student's, [B, T, D].
        head: its head, in the dtype of the products.
        batch: of ``selkd.data.collate.collate``.
        teacher: needed by some metrics.
    """
    valid_mask, device = batch["valid_mask"], hidden_states.device
    if metric is None:
        return PositionScores(wide(hidden_states.new_zeros(valid_mask.shape)), {})
    entry = Metric.find(metric)
    if entry.is_noise:
        ids, mask = batch["sample_ids"].cpu().numpy(), valid_mask.cpu().numpy()
        noise = torch.from_numpy(position_uniforms(seed, ids, mask, "positions", step))
        return PositionScores(noise.to(device), {})
    valid = valid_mask.flatten().nonzero().flatten()
    names = entry.statistics
    own = {metric: entry.values} if entry.is_own else {}
    targets = batch["targets"].flatten()[valid]
    teachers = None
    if entry.needs_teacher:
        assert teacher is not None, f"{metric} needs the teacher"
        teachers = teacher.at(valid)

    def compute(student_logits: Tensor, rows: slice) -> Tensor:
        teacher_logits = None if teachers is None else teachers.logits(rows)
        return statistics(names, student_logits, teacher_logits, targets[rows], own)

    columns = chunked_statistics(hidden_states.flatten(0, 1)[valid], head, compute, n_statistics=len(names))
    placed = columns.new_zeros(valid_mask.numel(), len(names)).index_copy_(0, valid, columns)
    found = {name: placed[:, i].view(valid_mask.shape) for i, name in enumerate(names)}
    return PositionScores(entry.combine(found, valid_mask), found)


def choose_positions(
    options: PositionOptions, scores: Tensor, batch: dict[str, Tensor], context: StepContext, *, seed: int
) -> Tensor:
    """The policy's coefficients [B, T] over the eligible positions of a batch, with the sample's own random draws."""
    mask, uniforms = eligible(options, batch["valid_mask"], batch["position_ids"]), None
    wanted = Policy.find(options.policy).uniforms
    if wanted == "of draws":
        assert context.fraction is not None, "a policy that draws has a fraction"
        draws = counts_of(context.fraction, mask.sum(dim=-1)).cpu().numpy()
        noise = draw_uniforms(seed, batch["sample_ids"].cpu().numpy(), draws, "position draws", context.step)
        uniforms = torch.from_numpy(noise).to(scores.device)
    elif wanted == "of positions":
        ids = batch["sample_ids"].cpu().numpy()
        noise = position_uniforms(seed, ids, mask.cpu().numpy(), "own policy", context.step)
        uniforms = torch.from_numpy(noise).to(scores.device)
    return select(options, scores, mask, context, uniforms)
