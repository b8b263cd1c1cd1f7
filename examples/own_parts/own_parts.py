"""Four parts of one's own. A recipe names them as ``own_parts:margin`` and so on; see recipe.yaml beside this file.

A part asks for what it needs by the names of its parameters (``selkd.plugins`` lists them), works on tensors, and
returns one number a position (a sampler: classes and counts). selkd does the rest: chunks, gradients, checks.
"""

import torch
from torch import Tensor


def margin(student_logits: Tensor) -> Tensor:
    """Metric: high where the student's two best classes are close. [n, V] -> [n]."""
    best = torch.softmax(student_logits, dim=-1).topk(2).values
    return 1 - (best[:, 0] - best[:, 1])


def early_and_unsure(scores: Tensor, valid_mask: Tensor, counts: Tensor, progress: float) -> Tensor:
    """Policy: the K highest scores, each weighted by its score, more sharply as the run goes on. [B, T] -> [B, T]."""
    ranked = scores.masked_fill(~valid_mask, -torch.inf)
    order = ranked.argsort(dim=-1, descending=True, stable=True)
    is_picked = torch.zeros_like(valid_mask).scatter(
        -1, order, torch.arange(order.shape[-1], device=order.device) < counts.unsqueeze(-1)
    )
    weights = torch.where(is_picked & valid_mask, scores.clamp(min=1e-6) ** (1 + progress), 0.0)
    return weights / weights.sum(dim=-1, keepdim=True).clamp(min=1e-12)


def hellinger(student_logits: Tensor, teacher_logits: Tensor) -> Tensor:
    """Criterion: squared Hellinger distance, 1 - sum sqrt(p q). [n, V] -> [n], differentiated by autograd."""
    log_q, log_p = student_logits.log_softmax(dim=-1), teacher_logits.log_softmax(dim=-1)
    return 1 - ((log_p + log_q) / 2).exp().sum(dim=-1)


def stratified(probabilities: Tensor, draws: int, uniforms: Tensor) -> tuple[Tensor, Tensor]:
    """Sampler: one uniform draw in each of U equal strata of the cumulative distribution. -> ids, counts [n, U].

    Unbiased like rs_kd, its variance between that and systematic's.
    """
    points = (torch.arange(draws, device=uniforms.device) + uniforms) / draws
    cumulative = probabilities.double().cumsum(dim=-1)
    drawn = torch.searchsorted(cumulative, points * cumulative[:, -1:], right=True)
    drawn = drawn.clamp(max=probabilities.shape[-1] - 1)
    counts = torch.ones_like(drawn)
    for column in range(1, draws):  # move the count of a class drawn again to its last place
        same = drawn[:, column] == drawn[:, column - 1]
        counts[:, column] += torch.where(same, counts[:, column - 1], 0)
        counts[:, column - 1] = torch.where(same, 0, counts[:, column - 1])
    return drawn, counts
