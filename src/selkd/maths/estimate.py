"""The entropy of a distribution, estimated from a part of its classes: all that are frequent, some of the others.

Shapes: N positions, n of a chunk, F frequent classes, R of the others, D hidden, V classes.
"""

from dataclasses import dataclass

from torch import Tensor

from selkd.maths.chunked import chunked_statistics
from selkd.maths.head import Head


@dataclass(frozen=True)
class ClassSubset:
    """Classes that stand for the whole vocabulary.

    Attributes:
        ids: int64 [F + R]: the frequent ones first, then those that stand for all others.
        n_frequent: F.
        tail_weight: how many classes each of the R stands for, (V - F) / R. One may be there twice.
    """

    ids: Tensor
    n_frequent: int
    tail_weight: float


def estimated_entropy(hidden_states: Tensor, head: Head, subset: ClassSubset, chunk: int | None = None) -> Tensor:
    """Entropy in nats, [N], estimated at hidden states [N, D], without gradient.

    Dense expression, with w = 1 for the frequent classes and ``tail_weight`` for the others of ``subset``, z their
    logits: ``Z = (w * z.exp()).sum(-1)``, ``Z.log() - (w * z.exp() * z).sum(-1) / Z``. Exact where the subset is the
    whole vocabulary.

    Args:
        head: in the dtype of the products.
    """

    def compute(logits: Tensor, _: slice) -> Tensor:
        return weighted_entropy(logits, subset.n_frequent, subset.tail_weight).unsqueeze(-1)

    return chunked_statistics(hidden_states, head.rows(subset.ids), compute, chunk).squeeze(-1)


def weighted_entropy(logits: Tensor, n_frequent: int, tail_weight: float) -> Tensor:
    """Entropy in nats, [n], of logits [n, F + R], the last R counted ``tail_weight`` times. Consumes them."""
    shifted = logits.sub_(logits.amax(dim=-1, keepdim=True))
    weights = shifted.exp()
    if tail_weight != 1.0:
        weights[:, n_frequent:].mul_(tail_weight)
    total = weights.sum(dim=-1)
    return (total.log() - weights.mul_(shifted).sum(dim=-1) / total).clamp_(min=0)
