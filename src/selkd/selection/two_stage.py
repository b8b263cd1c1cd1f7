"""Selection for a fraction of a head pass: entropy estimated at every position, exact at the best of them alone.

Shapes: B batch, T positions, D hidden, V classes.
"""

import math

import numpy as np
import torch
from torch import Tensor

from selkd.maths.chunked import ChunkedLogits, chunked_entropy, chunks, piece_size, wide
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
    ordered: np.ndarray | Tensor, frequent: int, tail: int, seed: int, *stream: int | str, device: torch.device
) -> ClassSubset:
    """The ``frequent`` first of the class ids ``ordered`` [V], and ``tail`` of the others.

    Those are drawn one from each of as many equal stretches of the order, so each class is as likely as any other;
    which, is a function of (seed, stream). A class may end two stretches and then be drawn twice.
    """
    ordered = torch.as_tensor(ordered, device=device)
    head, others = ordered[:frequent], ordered[frequent:]
    tail = min(tail, len(others))
    if tail == len(others):
        return ClassSubset(ordered, len(head), 1.0)
    uniforms = sample_generator(seed, b"", "tail classes", *stream).random(tail)
    places = ((np.arange(tail) + uniforms) * (len(others) / tail)).astype(np.int64).clip(max=len(others) - 1)
    ids = torch.cat([head, others[torch.from_numpy(places).to(device)]])
    return ClassSubset(ids, len(head), len(others) / tail)


@torch.no_grad()
def probable_first(ordered: Tensor, frequent: int, hidden_states: Tensor, head: Head) -> Tensor:
    """Class ids [V]: the ``frequent`` most probable at a few hidden states [n, D] first, the rest as in ``ordered``.

    Dense expression: ``softmax(head.logits(hidden_states)).mean(0).topk(frequent)``. A student that is cut or untrained
    puts its mass on classes that are rare in the text; they are told by a few of its own distributions.
    """
    logits, n_classes = ChunkedLogits(hidden_states, head), head.n_classes
    total = torch.zeros((), device=hidden_states.device)
    for rows in chunks(len(hidden_states), piece_size(n_classes, hidden_states.device)):
        total = total + torch.softmax(logits(rows), dim=-1).sum(dim=0)
    first = total.topk(min(frequent, n_classes)).indices
    is_first = torch.zeros(n_classes, dtype=torch.bool, device=first.device).index_fill_(0, first, True)
    return torch.cat([first, ordered[~is_first[ordered]]])


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

    Of each sample ``probed_share`` of the positions, evenly spaced, tell its frequent classes; without, the text does.
    Then the ceil((fraction + rescored_share) * n) positions with the highest estimate are rescored exactly. What is
    estimated is kept below the lowest exact score of its sample, so the highest scores are exact ones.

    Args:
        options: with ``scoring: two_stage``.
        ordered: class ids, the most frequent of the training text first, [V].
        hidden_states: the student's, [B, T, D].
        head: its head, in the dtype of the products.
        batch: of ``selkd.data.batching.collate``.
    """
    frequent, tail, share = options.frequent_classes, options.tail_classes, options.rescored_share
    assert frequent and tail and share and options.probed_share is not None, "settled"  # noqa: PT018
    assert place.fraction is not None, "top_k has a fraction"
    valid_mask, device = batch["valid_mask"], hidden_states.device
    by_text = torch.as_tensor(ordered, device=device)
    scores = wide(hidden_states.new_zeros(valid_mask.shape))
    for row, mask in enumerate(valid_mask):
        of_sample = hidden_states[row, mask]
        if not len(of_sample):
            continue
        classes = by_text
        if options.probed_share:
            count = math.ceil(options.probed_share * len(of_sample))
            probed = of_sample[torch.linspace(0, len(of_sample) - 1, count).round().long()]
            classes = probable_first(by_text, frequent, probed, head)
        subset = class_subset(classes, frequent, tail, seed, place.step, device=device)
        scores[row, mask] = estimated_entropy(of_sample, head, subset)
    counts = counts_of(min(1.0, place.fraction + share), valid_mask.sum(dim=-1))
    is_best = mark_highest(scores, valid_mask, counts)
    best = is_best.flatten().nonzero().flatten()
    exact = chunked_entropy(hidden_states.flatten(0, 1)[best], head)
    lowest = exact.new_full(valid_mask.shape, torch.inf).masked_scatter_(is_best, exact).amin(dim=-1, keepdim=True)
    below = lowest * (1 - 1e-6) - 1e-6
    scores = scores.minimum(below).masked_fill(~valid_mask, 0).masked_scatter(is_best, exact)
    return PositionScores(scores, {"student_entropy": scores})
