"""Scores of positions: a metric, and the statistics that it combines, from hidden states and without gradient.

Shapes: B batch, T positions, N positions, n of a chunk, V classes, D hidden.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from selkd.maths.chunked import chunked_statistics, wide
from selkd.maths.head import Head
from selkd.maths.importance import Own, TeacherDraws, statistics, statistics_of_draws
from selkd.plugins import Metric, Policy
from selkd.recipe.choices import PositionOptions
from selkd.selection.host import Batch, first_marked, on_host, to_device, valid_index
from selkd.selection.positions import StepContext, counts_at, eligible, select
from selkd.selection.randomness import draw_uniforms, position_uniforms

LogitsOf = Callable[[slice], Tensor]
"""Gives the logits [n, V] of some of N positions."""
TeacherSide = LogitsOf | TeacherDraws
"""A teacher at N positions: its logits, a chunk at a time, or what is known of it by its draws and scalars."""


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
    teacher: TeacherSide | None,
    own: Own | None = None,
) -> dict[str, Tensor]:
    """Statistics ``names`` of N positions in one pass over the chunks of their logits: name -> [N].

    Args:
        names: names that ``selkd.maths.importance.statistics`` knows, or ``statistics_of_draws`` where there are draws.
        hidden_states: the student's, [N, D].
        head: its head, in the dtype of the products.
        targets: int64 [N].
        teacher: gives the teacher's logits at the same positions, on any device, or is what is known of it there;
            None if no name needs it.
        own: a user's functions by name, as ``statistics`` takes them.
    """

    def compute(student_logits: Tensor, rows: slice) -> Tensor:
        if isinstance(teacher, TeacherDraws):
            return statistics_of_draws(names, student_logits, teacher.at(rows), targets[rows])
        logits = None if teacher is None else teacher(rows).to(student_logits.device)
        return statistics(names, student_logits, logits, targets[rows], own)

    columns = chunked_statistics(hidden_states, head, compute, n_statistics=len(names))
    return dict(zip(names, columns.unbind(dim=-1), strict=True))


@torch.no_grad()
def score_positions(
    metric: str | None,
    hidden_states: Tensor,
    head: Head,
    batch: Batch,
    teacher: TeacherSide | None,
    random_stream: tuple[int, int] | None = None,
) -> PositionScores:
    """The metric at the valid positions of a batch.

    Args:
        metric: a metric's name; ``random`` is uniform noise; None scores nothing (zeros).
        hidden_states: the student's, [B, T, D].
        head: its head, in the dtype of the products.
        batch: from ``selkd.data.collate.collate``.
        teacher: gives the teacher's logits at the valid positions, in order, or is what is known of it there; None if
            the metric does not need it.
        random_stream: the run's seed and the optimiser step, for ``random``.
    """
    valid_mask = batch["valid_mask"]
    if metric is None:
        return PositionScores(wide(hidden_states.new_zeros(valid_mask.shape)), {})
    entry = Metric.find(metric)
    if entry.is_noise:
        assert random_stream is not None, "noise is a function of seed and step"
        seed, step = random_stream
        host = on_host(batch)
        noise = position_uniforms(seed, host["sample_ids"].numpy(), host["valid_mask"].numpy(), "positions", step)
        return PositionScores(to_device(torch.from_numpy(noise), hidden_states.device), {})
    valid = valid_index(batch)
    own = {metric: entry.values} if entry.is_own else {}
    hidden, targets = hidden_states.flatten(0, 1)[valid], batch["targets"].flatten()[valid]
    at_valid = position_statistics(entry.statistics, hidden, head, targets, teacher, own)
    placed = {
        name: values.new_zeros(valid_mask.numel()).index_copy_(0, valid, values).view(valid_mask.shape)
        for name, values in at_valid.items()
    }
    return PositionScores(entry.combine(placed, valid_mask), placed)


def choose_positions(
    options: PositionOptions, scores: Tensor, batch: Batch, context: StepContext, *, seed: int
) -> Tensor:
    """The policy's coefficients [B, T] over the eligible positions of a batch; draws are a function of each sample."""
    mask, use = eligible(options, batch), Policy.find(options.policy).uniforms
    if use is None:
        return select(options, scores, mask, context)
    host = on_host(batch)
    ids, mask_on_host = host["sample_ids"].numpy(), eligible(options, host)
    if use == "of draws":
        draws = counts_at(context, mask_on_host.sum(dim=-1)).numpy()
        noise = draw_uniforms(seed, ids, draws, "position draws", context.step)
    else:
        noise = position_uniforms(seed, ids, mask_on_host.numpy(), "own policy", context.step)
    return select(options, scores, mask, context, to_device(torch.from_numpy(noise), scores.device))


def chosen_index(options: PositionOptions, coefficients: Tensor, batch: Batch, context: StepContext) -> Tensor:
    """The flat positions [N], in order, whose coefficient of ``choose_positions`` is not 0.

    The host knows N beforehand if the policy picks K positions of each sample; else it waits for the device.
    """
    is_chosen = coefficients != 0
    if not Policy.find(options.policy).picks_counts or context.threshold is not None:
        return is_chosen.flatten().nonzero().flatten()
    return first_marked(is_chosen, int(counts_at(context, eligible(options, on_host(batch)).sum(dim=-1)).sum()))
