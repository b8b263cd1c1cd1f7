"""Survey sampling of positions (policy ``pps``): few positions, none twice, and Full KD's mean in expectation.

Shapes: B batch, T positions, K picked positions of a sample.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from selkd.plugins import Policy, deferred
from selkd.selection.positions import Candidates

if TYPE_CHECKING:
    import torch
    from torch import Tensor
else:
    torch = deferred("torch")

# An inclusion probability so near 1 counts as 1: rounding of the running sum must not take a position twice.
_NEARLY = 1 - 1e-9


def take_systematically(candidates: Candidates) -> Tensor:
    """pps: K positions without replacement, in proportion to u^power; a = 1 / (n * pi) (Horvitz and Thompson).

    pi_t = min(1, c * u_t^power) is the probability that t is taken, with c such that the pi of a sample add up to K.
    With S_t their running sum in the order of the text and one uniform r of the sample, t is taken if an integer j >= 0
    has S_{t-1} <= r + j < S_t. So exactly K are taken, and the expectation is Full KD's mean, but for positions with a
    score of 0, which are never taken while others can be.
    """
    assert candidates.uniforms is not None, "a policy that draws needs uniforms"
    mask, counts = candidates.valid_mask, candidates.counts.unsqueeze(-1)
    u = candidates.scores.double().clamp(min=0).masked_fill(~mask, 0)
    highest = u.amax(dim=-1, keepdim=True)
    power = candidates.options.power
    weights = ((u / highest.masked_fill(highest == 0, 1.0)) ** (1.0 if power is None else power)).masked_fill(~mask, 0)
    sure = _certain(weights, counts)
    # A position with pi = 1 adds 1 to the running sum, which moves none of the others: these are drawn by themselves.
    rest, drawn = mask & ~sure, (counts - sure.sum(dim=-1, keepdim=True)).double()
    weights = weights.masked_fill(~rest, 0)
    weights = torch.where(weights.sum(dim=-1, keepdim=True) > 0, weights, rest.double())
    running = weights.cumsum(dim=-1)
    total = running[:, -1:].masked_fill(running[:, -1:] == 0, 1.0)
    ends = running / total * drawn  # the last is the integer that is left to draw, without rounding
    r = candidates.uniforms[:, :1] if candidates.uniforms.shape[-1] else drawn.new_zeros(drawn.shape)
    passed = ends.floor() + (ends - ends.floor() > r)  # how many of r, r + 1, r + 2 … lie below S_t
    taken = passed.diff(dim=-1, prepend=torch.zeros_like(drawn)) > 0
    n_valid = mask.sum(dim=-1, keepdim=True).clamp(min=1)
    pi = torch.where(taken, weights / total * drawn, 1.0)
    return ((taken | sure) / (n_valid * pi)).to(candidates.scores.dtype)


def _certain(weights: Tensor, counts: Tensor) -> Tensor:
    """The positions whose pi reaches 1, with c solved again for the rest each time that one does: bool [B, T].

    In descending order of weight, number i is certain if all before it are and (K - i) * w_i >= sum of w from i on.
    """
    ordered, order = weights.sort(dim=-1, descending=True, stable=True)
    from_here = ordered.flip(-1).cumsum(dim=-1).flip(-1)
    left = counts - torch.arange(ordered.shape[-1], device=ordered.device)
    reaches = (ordered > 0) & (left > 0) & (left * ordered >= from_here * _NEARLY)
    return torch.zeros_like(reaches).scatter_(-1, order, reaches.to(torch.int8).cumprod(dim=-1).bool())


Policy.add(
    "pps",
    take_systematically,
    label="a {share} systematic sample of the positions by {metric}, weighted to stay unbiased",
    description="K positions without replacement, each with probability pi = min(1, c · u^`power`), c such that these "
    "add up to K, by one random start and equal steps; 1/(n · pi). In expectation Full KD. `power: 0`: evenly spaced "
    "positions with 1/K, and no metric",
    uniforms="of draws",
    is_corrected=True,
    options={"power": 1.0},
)
