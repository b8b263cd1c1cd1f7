"""Selection for a fraction of a head pass: entropy estimated at every position, exact at the best of them alone.

Shapes: B batch, T positions, D hidden, V classes.
"""

import numpy as np
import torch
from torch import Tensor

from selkd.maths.chunked import chunked_entropy
from selkd.maths.estimate import ClassSubset, estimated_entropy
from selkd.maths.head import Head
from selkd.recipe_choices import PositionOptions
from selkd.selection.noise import sample_generator
from selkd.selection.positions import Place, counts_of, mark_highest
from selkd.selection.scores import PositionScores


def by_frequency(token_counts: np.ndarray) -> np.ndarray:
    """All class ids [V], the most frequent first (equally frequent: the lower id), of their counts in a text [V]."""
    return np.argsort(-token_counts, kind="stable")


def class_subset(
    ordered: np.ndarray, frequent: int, tail: int, seed: int, *stream: int | str, device: torch.device
) -> ClassSubset:
    """The ``frequent`` first of the class ids ``ordered`` [V], and ``tail`` of the others.

    Those are drawn one from each of as many equal stretches of the order, so each class is as likely as any other;
    which, is a function of (seed, stream). A class may end two stretches and then be drawn twice.
    """
    head, others = ordered[:frequent], ordered[frequent:]
    tail = min(tail, len(others))
    if tail == len(others):
        return ClassSubset(torch.from_numpy(ordered).to(device), len(head), 1.0)
    uniforms = sample_generator(seed, b"", "tail classes", *stream).random(tail)
    places = ((np.arange(tail) + uniforms) * (len(others) / tail)).astype(np.int64).clip(max=len(others) - 1)
    ids = np.concatenate([head, others[places]])
    return ClassSubset(torch.from_numpy(ids).to(device), len(head), len(others) / tail)


@torch.no_grad()
def score_in_two_stages(
    options: PositionOptions,
    ordered: np.ndarray,
    hidden_states: Tensor,
    head: Head,
    batch: dict[str, Tensor],
    place: Place,
    *,
    seed: int,
) -> PositionScores:
    """The student's entropy at the valid positions of a batch: exact at the best, estimated at the others.

    Of each sample the ceil((fraction + rescored_share) * n) positions with the highest estimate are rescored exactly.
    What is estimated is kept below the lowest exact score of its sample, so the highest scores are exact ones.

    Args:
        options: with ``scoring: two_stage``.
        ordered: class ids, the most frequent of the training text first, [V].
        hidden_states: the student's, [B, T, D].
        head: its head, in the dtype of the products.
        batch: of ``selkd.data.batching.collate``.
    """
    assert options.frequent_classes and options.tail_classes and options.rescored_share, "settled"  # noqa: PT018
    assert place.fraction is not None, "top_k has a fraction"
    valid_mask = batch["valid_mask"]
    flat, valid = hidden_states.flatten(0, 1), valid_mask.flatten().nonzero().flatten()
    subset = class_subset(ordered, options.frequent_classes, options.tail_classes, seed, place.step, device=flat.device)
    estimated = estimated_entropy(flat[valid], head, subset)
    scores = estimated.new_zeros(valid_mask.numel()).index_copy_(0, valid, estimated).view(valid_mask.shape)
    counts = counts_of(min(1.0, place.fraction + options.rescored_share), valid_mask.sum(dim=-1))
    is_best = mark_highest(scores, valid_mask, counts)
    best = is_best.flatten().nonzero().flatten()
    exact = chunked_entropy(flat[best], head)
    lowest = exact.new_full(valid_mask.shape, torch.inf).masked_scatter_(is_best, exact).amin(dim=-1, keepdim=True)
    below = lowest * (1 - 1e-6) - 1e-6
    scores = scores.minimum(below).masked_fill(~valid_mask, 0).masked_scatter(is_best, exact)
    return PositionScores(scores, {"student_entropy": scores})
