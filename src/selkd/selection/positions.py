"""Position policies: scores in, final coefficients out.

A policy returns the coefficients a_it of ``loss_i = sum_t a_it * l_it``; nothing divides by them again. For a policy
that picks K positions of a sample they are 1/K there and 0 elsewhere.

Shapes: B batch, T positions.
"""

from collections.abc import Callable

import torch
from torch import Tensor

Policy = Callable[[Tensor, Tensor, Tensor], Tensor]  # scores [B, T], valid_mask [B, T], counts [B] -> coefficients


def counts_of(fraction: float, n_valid: Tensor) -> Tensor:
    """K = ceil(k * n) of each sample in decimal arithmetic, so that 0.07 of 100 is 7; int64 like ``n_valid`` [B]."""
    return torch.ceil(fraction * n_valid.to(torch.float64) - 1e-9).clamp_(min=0).to(torch.int64)


def take_all(scores: Tensor, valid_mask: Tensor, counts: Tensor) -> Tensor:  # noqa: ARG001
    """Every valid position, a = 1/n (Full KD)."""
    return _spread(valid_mask, scores.dtype)


def take_top(scores: Tensor, valid_mask: Tensor, counts: Tensor) -> Tensor:
    """The K valid positions with the highest scores, equal scores to the earlier one; a = 1/K."""
    ranked = scores.masked_fill(~valid_mask, -torch.inf)
    order = ranked.argsort(dim=-1, descending=True, stable=True)
    ranks = torch.empty_like(order).scatter_(
        -1, order, torch.arange(order.shape[-1], device=order.device).expand_as(order)
    )
    return _spread((ranks < counts.unsqueeze(-1)) & valid_mask, scores.dtype)


# ``random`` is ``top_k`` of uniform noise: K positions without replacement, each set equally likely.
POLICIES: dict[str, Policy] = {"all": take_all, "top_k": take_top, "random": take_top}


def select(policy: str, scores: Tensor, valid_mask: Tensor, fraction: float | None) -> Tensor:
    """Coefficients [B, T] of ``policy`` in the dtype of ``scores``; a row without valid positions is all 0.

    Args:
        policy: a name in ``POLICIES``.
        scores: [B, T], the metric's values (noise for ``random``; ignored by ``all``); anything where not valid.
        valid_mask: bool [B, T].
        fraction: k in (0, 1]; None takes every position.

    Raises:
        ValueError: a score at a valid position is not finite; the row and position are named.
    """
    bad = valid_mask & ~torch.isfinite(scores)
    if bad.any():
        row, position = (int(i) for i in bad.nonzero()[0])
        raise ValueError(
            f"the score of position {position} in row {row} of the batch is {scores[row, position].item()}: the "
            "student's logits are not finite. Lower the learning rate or use float32."
        )
    n_valid = valid_mask.sum(dim=-1)
    return POLICIES[policy](scores, valid_mask, n_valid if fraction is None else counts_of(fraction, n_valid))


def _spread(picked: Tensor, dtype: torch.dtype) -> Tensor:
    """1/K on the K picked positions of each row."""
    return picked.to(dtype) / picked.sum(dim=-1, keepdim=True).clamp(min=1)
