"""Selection for a fraction of a head pass: entropy estimated at every position, exact at the best of them alone.

A sample's score needs the estimate alone.

Shapes: B batch, T positions, D hidden, V classes.
"""

import math
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from selkd.maths.chunked import ChunkedLogits, chunked_entropy, chunks, piece_size, wide
from selkd.maths.estimate import ClassSubset, estimated_entropy
from selkd.maths.head import Head
from selkd.recipe.choices import PositionOptions, SampleOptions
from selkd.selection.position_scores import PositionScores
from selkd.selection.positions import StepContext, counts_of, mark_highest
from selkd.selection.randomness import sample_generator


def by_frequency(token_counts: np.ndarray) -> np.ndarray:
    """All class ids [V], the most frequent first (equally frequent: the lower id), of their counts in a text [V]."""
    return np.argsort(-token_counts, kind="stable")


def class_subset(first: Tensor, ordered: Tensor, tail: int, seed: int, *stream: int | str) -> ClassSubset:
    """The classes ``first`` [F], and about ``tail`` of the others.

    One class is drawn from each of as many equal stretches of ``ordered`` [V], as a function of (seed, stream) alone,
    and those among ``first`` are left out. So each other class is as likely as any other, and where rounding puts
    another class into ``first``, the other draws stay.
    """
    vocab_size = len(ordered)
    is_first = torch.zeros(vocab_size, dtype=torch.bool, device=ordered.device).index_fill_(0, first, True)
    n_others = vocab_size - len(first)
    if tail < n_others:
        stretches = round(tail * vocab_size / n_others)
        uniforms = sample_generator(seed, b"", "tail classes", *stream).random(stretches)
        places = (np.arange(stretches) + uniforms) * (vocab_size / stretches)
        at = torch.from_numpy(places.astype(np.int64).clip(max=vocab_size - 1))
        drawn = ordered[at.to(ordered.device)]
        drawn = drawn[~is_first[drawn]]
        if len(drawn):
            return ClassSubset(torch.cat([first, drawn]), len(first), n_others / len(drawn))
    return ClassSubset(torch.cat([first, ordered[~is_first[ordered]]]), len(first), 1.0)


@torch.no_grad()
def most_probable(n: int, hidden_states: Tensor, head: Head) -> Tensor:
    """Ids of the ``n`` classes most probable at a few hidden states [N, D].

    Dense expression: ``softmax(head.logits(hidden_states)).mean(0).topk(n).indices``. A student that is cut or
    untrained puts its mass on classes that are rare in the text; they are told by a few of its own distributions.
    """
    logits, vocab_size = ChunkedLogits(hidden_states, head), head.vocab_size
    total = torch.zeros((), device=hidden_states.device)
    for rows in chunks(len(hidden_states), piece_size(vocab_size, hidden_states.device)):
        total = total + torch.softmax(logits(rows), dim=-1).sum(dim=0)
    return total.topk(n).indices


@dataclass(frozen=True)
class Estimator:
    """The entropy of a sample's positions from a part of the classes.

    Attributes:
        ordered: class ids, the most frequent of the training text first, [V].
        frequent, tail: how many classes are counted, and about how many stand for all others.
        calibration_fraction: the share of the sample's positions, evenly spaced, that tell its frequent classes; 0: the
            training text tells them.
        seed: the run's.
    """

    ordered: np.ndarray | Tensor
    frequent: int
    tail: int
    calibration_fraction: float
    seed: int

    @torch.no_grad()
    def __call__(self, hidden_states: Tensor, head: Head, *stream: int | str) -> Tensor:
        """Entropy in nats, [N], at the hidden states [N, D] of one sample; the classes are a function of (seed, stream)
        and of them."""
        if not len(hidden_states):
            return wide(hidden_states.new_zeros(0))
        ordered = torch.as_tensor(self.ordered, device=hidden_states.device)
        frequent = min(self.frequent, len(ordered))
        if self.calibration_fraction:
            count = math.ceil(self.calibration_fraction * len(hidden_states))
            probed = hidden_states[torch.linspace(0, len(hidden_states) - 1, count).round().long()]
            first = most_probable(frequent, probed, head)
        else:
            first = ordered[:frequent]
        return estimated_entropy(hidden_states, head, class_subset(first, ordered, self.tail, self.seed, *stream))


def estimator(options: PositionOptions | SampleOptions, ordered: np.ndarray | Tensor, seed: int) -> Estimator:
    """The estimator of a recipe's part, whose ``scoring`` estimates."""
    frequent, tail, share = options.frequent_classes, options.tail_classes, options.calibration_fraction
    assert frequent and tail and share is not None, "settled with the scoring"  # noqa: PT018
    return Estimator(ordered, frequent, tail, share, seed)


@torch.no_grad()
def score_in_two_stages(
    options: PositionOptions,
    estimate: Estimator,
    hidden_states: Tensor,
    head: Head,
    batch: dict[str, Tensor],
    context: StepContext,
) -> PositionScores:
    """The student's entropy at the valid positions of a batch: exact at the best, estimated at the others.

    The ceil((fraction + rescored_share) * n) positions of a sample with the highest estimate are rescored exactly. What
    is estimated is kept below the lowest exact score of its sample, so the highest scores are exact ones.

    Args:
        options: with ``scoring: two_stage``.
        estimate: as ``estimator`` makes it of the same options.
        hidden_states: the student's, [B, T, D].
        head: its head, in the dtype of the products.
        batch: of ``selkd.data.collate.collate``.
    """
    share = options.rescored_share
    assert share and context.fraction is not None, "top_k has a fraction, two_stage a share"  # noqa: PT018
    valid_mask = batch["valid_mask"]
    scores = wide(hidden_states.new_zeros(valid_mask.shape))
    for row, mask in enumerate(valid_mask):
        scores[row, mask] = estimate(hidden_states[row, mask], head, context.step)
    counts = counts_of(min(1.0, context.fraction + share), valid_mask.sum(dim=-1))
    is_best = mark_highest(scores, valid_mask, counts)
    best = is_best.flatten().nonzero().flatten()
    exact = chunked_entropy(hidden_states.flatten(0, 1)[best], head)
    known = exact.nan_to_num(nan=torch.inf)  # so that an error names the position that is not finite, and no other
    lowest = exact.new_full(valid_mask.shape, torch.inf).masked_scatter_(is_best, known).amin(dim=-1, keepdim=True)
    below = lowest * (1 - 1e-6) - 1e-6
    scores = scores.minimum(below).masked_fill(~valid_mask, 0).masked_scatter(is_best, exact)
    return PositionScores(scores, {"student_entropy": scores})
