"""Class samplers: a teacher's distribution in, drawn class ids and integer counts out.

Shapes: n positions, V classes, U draws, C distinct drawn classes (rows padded with count 0 and class 0).
"""

from collections.abc import Callable

import torch
from torch import Tensor


def rs_kd(probabilities: Tensor, uniforms: Tensor) -> tuple[Tensor, Tensor]:
    """U draws with replacement from p at each position (RS-KD): distinct class ids and how often each was drawn.

    E[counts / U] = p, so forward KL's gradient stays unbiased. The cumulative sums are float64: in float32 the tail
    of a large vocabulary would never be drawn.

    Args:
        probabilities: [n, V], rows summing to 1 up to rounding.
        uniforms: float64 [n, U] in [0, 1).

    Returns:
        ``class_ids`` int64 and ``counts`` int64, both [n, C]; ids ascend within a row, counts of a row sum to U.
    """
    cumulative = probabilities.to(torch.float64).cumsum(dim=-1)
    points = (uniforms * cumulative[:, -1:]).sort(dim=-1).values
    drawn = torch.searchsorted(cumulative, points, right=True).clamp_(max=probabilities.shape[-1] - 1)
    return count_distinct(drawn)


def count_distinct(drawn: Tensor) -> tuple[Tensor, Tensor]:
    """Distinct ids and counts [n, C] of ids [n, U] that ascend within each row."""
    is_new = torch.ones_like(drawn, dtype=torch.bool)
    is_new[:, 1:] = drawn[:, 1:] != drawn[:, :-1]
    slot = is_new.cumsum(dim=-1) - 1
    width = int(is_new.sum(dim=-1).max()) if len(drawn) else 0
    class_ids = drawn.new_zeros(len(drawn), width).scatter_(-1, slot, drawn)
    counts = drawn.new_zeros(len(drawn), width).scatter_add_(-1, slot, torch.ones_like(drawn))
    return class_ids, counts


ClassSampler = Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]

SAMPLERS: dict[str, ClassSampler] = {"rs_kd": rs_kd}
