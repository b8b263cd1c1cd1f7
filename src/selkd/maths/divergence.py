"""Criteria on a chunk of logits: per-position values and, in closed form, their gradients.

Each function returns ``(values [n], gradient [n, V])``, the gradient being that of ``values.sum()`` with respect to
the student's logits. The gradient is formed here, in the forward pass, because the chunk's logits are alive here.

Logits that are given are consumed: a chunk of them is the largest thing in memory, so it is worked on in place.

Shapes: n positions of a chunk, V classes, C distinct drawn classes (padded with count 0). Logits and results are
float32 or float64; reductions run in that dtype.
"""

import torch
from torch import Tensor

ValueAndGradient = tuple[Tensor, Tensor]


def forward_kl(student_logits: Tensor, teacher_logits: Tensor, temperature: float = 1.0) -> ValueAndGradient:
    """KL(p || q) in nats of teacher and student logits [n, V], both divided by ``temperature``.

    Dense expression: ``(p * (log p - log q)).sum(-1)``; its gradient is ``(q - p) / temperature``.
    """
    log_q, log_p = _log_softmax_(student_logits, temperature), _log_softmax_(teacher_logits, temperature)
    p = log_p.exp()
    values = torch.linalg.vecdot(p, log_p.sub_(log_q))
    gradient = log_q.exp_().sub_(p)
    return values, gradient.div_(temperature) if temperature != 1.0 else gradient


def sampled_forward_kl(
    student_logits: Tensor, class_ids: Tensor, counts: Tensor, temperature: float = 1.0
) -> ValueAndGradient:
    """KL to the drawn target ``w = counts / counts.sum()``: the sum over drawn classes of ``w * (log w - log q)``.

    ``class_ids`` int64 and ``counts`` [n, C]; q is the student's softmax over its whole vocabulary, so the gradient
    ``(q - w) / temperature`` is an unbiased estimate of forward KL's where E[w] = p (method: class sampling).
    """
    log_q = _log_softmax_(student_logits, temperature)
    weights = counts.to(log_q.dtype)
    weights = weights / weights.sum(dim=-1, keepdim=True)
    log_weights = torch.where(counts > 0, weights, 1.0).log()  # log 1 = 0 where nothing was drawn
    values = torch.linalg.vecdot(weights, log_weights - log_q.gather(-1, class_ids))
    gradient = log_q.exp_().scatter_add_(-1, class_ids, -weights)
    return values, gradient.div_(temperature) if temperature != 1.0 else gradient


def cross_entropy(student_logits: Tensor, targets: Tensor) -> ValueAndGradient:
    """-log q(y) in nats of the true next tokens ``targets`` int64 [n]; the gradient is ``q - onehot(y)``."""
    log_q = _log_softmax_(student_logits)
    index = targets.unsqueeze(-1)
    values = -log_q.gather(-1, index).squeeze(-1)
    gradient = log_q.exp_()
    return values, gradient.scatter_add_(-1, index, torch.full_like(index, -1, dtype=gradient.dtype))


def entropy(logits: Tensor) -> Tensor:
    """H(q) = -sum q log q in nats, [n], of logits [n, V]."""
    shifted = logits.sub_(logits.amax(dim=-1, keepdim=True))
    weights = shifted.exp()
    total = weights.sum(dim=-1)
    return (total.log() - torch.linalg.vecdot(weights, shifted) / total).clamp_(min=0)


def _log_softmax_(logits: Tensor, temperature: float = 1.0) -> Tensor:
    """log softmax(logits / temperature) over the last dimension, in place."""
    if temperature != 1.0:
        logits.div_(temperature)
    return logits.sub_(logits.logsumexp(dim=-1, keepdim=True))
