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
from selkd.selection.host import Batch, first_marked, on_host, to_device, valid_index
from selkd.selection.position_scores import PositionScores
from selkd.selection.positions import StepContext, counts_of, mark_highest
from selkd.selection.randomness import sample_generator


@dataclass(frozen=True)
class ClassSubset:
    """Classes that stand for the whole vocabulary.

    Attributes:
        ids: int64 [F + R], the frequent classes first, then those that stand for all others. One may occur twice.
        n_frequent: F.
        tail_weights: how many classes each of the R stands for, float64 [R]; 0: for none, as it is a frequent one,
            too. None: each stands for itself.
    """

    ids: Tensor
    n_frequent: int
    tail_weights: Tensor | None


def estimated_entropy(hidden_states: Tensor, head: Head, subset: ClassSubset, chunk: int | None = None) -> Tensor:
    """Entropy in nats, [N], estimated at hidden states [N, D], without gradient.

    Dense expression, with z the logits of ``subset``, w = 1 for its frequent classes and ``tail_weights`` for the
    others: ``Z = (w * z.exp()).sum(-1)``, ``Z.log() - (w * z.exp() * z).sum(-1) / Z``. Exact if the subset is the whole
    vocabulary.

    Args:
        head: in the dtype of the products.
    """

    def compute(logits: Tensor, _: slice) -> Tensor:
        return entropy(logits, subset.n_frequent, subset.tail_weights).unsqueeze(-1)

    return chunked_statistics(hidden_states, head.rows(subset.ids), compute, chunk).squeeze(-1)


def by_frequency(token_counts: np.ndarray) -> np.ndarray:
    """All class ids [V] in descending order of their counts [V] in a text; of equal ones the lower id comes first."""
    return np.argsort(-token_counts, kind="stable")


def class_subset(first: Tensor, ordered: Tensor, tail: int, seed: int, *stream: int | str) -> ClassSubset:
    """The classes ``first`` [F], and about ``tail`` of the others.

    ``ordered`` [V] is cut into equal stretches and one class is drawn from each, as a function of (seed, stream) alone;
    draws that are among ``first`` count nothing. So all other classes are equally likely, and if rounding changes
    ``first``, the draws stay.
    """
    vocab_size = len(ordered)
    is_other = torch.ones(vocab_size, dtype=torch.float64, device=ordered.device).index_fill_(0, first, 0)
    n_others = vocab_size - len(first)
    if tail >= n_others:
        others = ordered[first_marked(is_other[ordered] > 0, n_others)]
        return ClassSubset(torch.cat([first, others]), len(first), None)
    stretches = round(tail * vocab_size / n_others)
    uniforms = sample_generator(seed, b"", "tail classes", *stream).random(stretches)
    places = (np.arange(stretches) + uniforms) * (vocab_size / stretches)
    index = torch.from_numpy(places.astype(np.int64).clip(max=vocab_size - 1))
    drawn = ordered[to_device(index, ordered.device)]
    counts = is_other[drawn]
    return ClassSubset(torch.cat([first, drawn]), len(first), counts * (n_others / counts.sum().clamp(min=1)))


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
            first = most_probable(frequent, hidden_states[to_device(evenly_spaced, hidden_states.device)], head)
        else:
            first = ordered[:frequent]
        return estimated_entropy(hidden_states, head, class_subset(first, ordered, tail, self.seed, *stream))


@torch.no_grad()
def score_in_two_stages(
    estimate: Estimator,
    hidden_states: Tensor,
    head: Head,
    batch: Batch,
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
    valid_mask, valid, hidden_states = batch["valid_mask"], valid_index(batch), hidden_states.flatten(0, 1)
    n_valid = on_host(batch)["valid_mask"].sum(dim=-1)
    estimates = [estimate(hidden, head, context.step) for hidden in hidden_states[valid].split(n_valid.tolist())]
    scores = wide(hidden_states.new_zeros(valid_mask.numel()))
    scores = scores.index_copy_(0, valid, torch.cat(estimates)).view(valid_mask.shape)
    counts = counts_of(min(1.0, context.fraction + share), n_valid)
    is_best = mark_highest(scores, valid_mask, to_device(counts, valid_mask.device))
    best = first_marked(is_best, int(counts.sum()))
    exact = chunked_entropy(hidden_states[best], head)
    # NaN must not become the lowest score, or an error would name other positions than the one that is not finite.
    finite = exact.nan_to_num(nan=torch.inf)
    lowest = exact.new_full(valid_mask.shape, torch.inf).masked_scatter_(is_best, finite).amin(dim=-1, keepdim=True)
    below = lowest * (1 - 1e-6) - 1e-6
    scores = scores.minimum(below).masked_fill(~valid_mask, 0).masked_scatter(is_best, exact)
    return PositionScores(scores, {"student_entropy": scores})
