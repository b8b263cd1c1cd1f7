"""Scores for a fraction of the head's cost: entropy is estimated from some classes, and exact at the best positions.

Approximate scoring of samples uses the estimate alone.

Shapes: B batch, T positions, N positions of one sample, D hidden, V classes, F frequent classes, R of the others.
"""

import math
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from selkd.maths.chunked import ChunkedLogits, chunked_entropy, chunked_statistics, chunks, piece_size, wide
from selkd.maths.divergence import entropy
from selkd.maths.head import Head
from selkd.recipe.choices import PositionOptions, SampleOptions
from selkd.selection.position_scores import PositionScores
from selkd.selection.positions import StepContext, counts_of, mark_highest
from selkd.selection.randomness import sample_generator


@dataclass(frozen=True)
class ClassSubset:
    """Classes that stand for the whole vocabulary.

    Attributes:
        ids: int64 [F + R], the frequent classes first, then those that stand for all others. One may occur twice.
        n_frequent: F.
        tail_weight: how many classes each of the R stands for, (V - F) / R.
    """

    ids: Tensor
    n_frequent: int
    tail_weight: float


def estimated_entropy(hidden_states: Tensor, head: Head, subset: ClassSubset, chunk: int | None = None) -> Tensor:
    """Entropy in nats, [N], estimated at hidden states [N, D], without gradient.

    Dense expression, with z the logits of ``subset``, w = 1 for its frequent classes and ``tail_weight`` for the
    others: ``Z = (w * z.exp()).sum(-1)``, ``Z.log() - (w * z.exp() * z).sum(-1) / Z``. Exact if the subset is the whole
    vocabulary.

    Args:
        head: in the dtype of the products.
    """

    def compute(logits: Tensor, _: slice) -> Tensor:
        return entropy(logits, subset.n_frequent, subset.tail_weight).unsqueeze(-1)

    return chunked_statistics(hidden_states, head.rows(subset.ids), compute, chunk).squeeze(-1)


def by_frequency(token_counts: np.ndarray) -> np.ndarray:
    """All class ids [V] in descending order of their counts [V] in a text; of equal ones the lower id comes first."""
    return np.argsort(-token_counts, kind="stable")


def class_subset(first: Tensor, ordered: Tensor, tail: int, seed: int, *stream: int | str) -> ClassSubset:
    """The classes ``first`` [F], and about ``tail`` of the others.

    ``ordered`` [V] is cut into equal stretches and one class is drawn from each, as a function of (seed, stream) alone;
    draws that are among ``first`` are left out. So all other classes are equally likely, and if rounding changes
    ``first``, the draws stay.
    """
    vocab_size = len(ordered)
    is_first = torch.zeros(vocab_size, dtype=torch.bool, device=ordered.device).index_fill_(0, first, True)
    n_others = vocab_size - len(first)
    if tail < n_others:
        stretches = round(tail * vocab_size / n_others)
        uniforms = sample_generator(seed, b"", "tail classes", *stream).random(stretches)
        places = (np.arange(stretches) + uniforms) * (vocab_size / stretches)
        drawn = ordered[torch.from_numpy(places.astype(np.int64).clip(max=vocab_size - 1)).to(ordered.device)]
        drawn = drawn[~is_first[drawn]]
        if len(drawn):
            return ClassSubset(torch.cat([first, drawn]), len(first), n_others / len(drawn))
    return ClassSubset(torch.cat([first, ordered[~is_first[ordered]]]), len(first), 1.0)


@torch.no_grad()
def most_probable(n: int, hidden_states: Tensor, head: Head) -> Tensor:
    """Ids of the ``n`` classes that are most probable at a few hidden states [N, D].

    Dense expression: ``softmax(head.logits(hidden_states)).mean(0).topk(n).indices``. The text's frequencies would miss
    the classes of a pruned or untrained student, which puts its mass on classes that are rare in the text.
    """
    logits, vocab_size = ChunkedLogits(hidden_states, head), head.vocab_size
    total = torch.zeros((), device=hidden_states.device)
    for rows in chunks(len(hidden_states), piece_size(vocab_size, hidden_states.device)):
        total = total + torch.softmax(logits(rows), dim=-1).sum(dim=0)
    return total.topk(n).indices


@dataclass(frozen=True)
class Estimator:
    """Estimates the entropy of a sample's positions from a part of the classes.

    Attributes:
        options: a recipe's part whose ``scoring`` estimates.
        ordered: class ids [V], those most frequent in the training text first.
        seed: the run's.
    """

    options: PositionOptions | SampleOptions
    ordered: np.ndarray | Tensor
    seed: int

    @torch.no_grad()
    def __call__(self, hidden_states: Tensor, head: Head, *stream: int | str) -> Tensor:
        """Entropy in nats, [N], at the hidden states [N, D] of one sample.

        The classes are a function of (seed, stream) and, unless ``calibration_fraction`` is 0, of the hidden states.
        """
        frequent, tail = self.options.frequent_classes, self.options.tail_classes
        fraction = self.options.calibration_fraction
        assert frequent and tail and fraction is not None, "the recipe sets them with the scoring"  # noqa: PT018
        if not len(hidden_states):
            return wide(hidden_states.new_zeros(0))
        ordered = torch.as_tensor(self.ordered, device=hidden_states.device)
        frequent = min(frequent, len(ordered))
        if fraction:
            count = math.ceil(fraction * len(hidden_states))
            evenly_spaced = torch.linspace(0, len(hidden_states) - 1, count).round().long()
            first = most_probable(frequent, hidden_states[evenly_spaced], head)
        else:
            first = ordered[:frequent]
        return estimated_entropy(hidden_states, head, class_subset(first, ordered, tail, self.seed, *stream))


@torch.no_grad()
def score_in_two_stages(
    estimate: Estimator,
    hidden_states: Tensor,
    head: Head,
    batch: dict[str, Tensor],
    context: StepContext,
) -> PositionScores:
    """The student's entropy at the valid positions of a batch: exact at the best positions, estimated at the others.

    The ceil((fraction + rescored_share) * n) positions of a sample with the highest estimates are scored exactly.
    Estimates are cut to just below the lowest exact score of their sample, so that the highest scores are exact.

    Args:
        estimate: its options are a recipe's positions with ``scoring: two_stage``.
        hidden_states: the student's, [B, T, D].
        head: its head, in the dtype of the products.
        batch: from ``selkd.data.collate.collate``.
    """
    assert isinstance(estimate.options, PositionOptions), "only positions are scored in two stages"
    share = estimate.options.rescored_share
    assert share and context.fraction is not None, "the recipe sets them with the scoring"  # noqa: PT018
    valid_mask = batch["valid_mask"]
    scores = wide(hidden_states.new_zeros(valid_mask.shape))
    for row, mask in enumerate(valid_mask):
        scores[row, mask] = estimate(hidden_states[row, mask], head, context.step)
    counts = counts_of(min(1.0, context.fraction + share), valid_mask.sum(dim=-1))
    is_best = mark_highest(scores, valid_mask, counts)
    best = is_best.flatten().nonzero().flatten()
    exact = chunked_entropy(hidden_states.flatten(0, 1)[best], head)
    # NaN must not become the lowest score, or an error would name other positions than the one that is not finite.
    finite = exact.nan_to_num(nan=torch.inf)
    lowest = exact.new_full(valid_mask.shape, torch.inf).masked_scatter_(is_best, finite).amin(dim=-1, keepdim=True)
    below = lowest * (1 - 1e-6) - 1e-6
    scores = scores.minimum(below).masked_fill(~valid_mask, 0).masked_scatter(is_best, exact)
    return PositionScores(scores, {"student_entropy": scores})
