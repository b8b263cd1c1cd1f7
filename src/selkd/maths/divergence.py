"""Criteria on a chunk of logits: the value at each position and, in closed form, the gradient.

Each function returns ``(values [n], gradient [n, V])``: the gradient of ``values.sum()`` with respect to the student's
logits. It is computed in the forward pass, because only then are the chunk's logits in memory.

The functions overwrite the logits: a chunk of them is the largest tensor in memory. Callers divide the logits by the
temperature. With g = dD/dq, the gradient of a criterion D in the student's logits is q * (g - sum q g).

Shapes: n positions of a chunk, V classes, C distinct drawn classes (padded with count 0). Logits and results are
float32 or float64; reductions run in that dtype.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import TYPE_CHECKING, TypeAlias

from selkd.plugins import Criterion, deferred

if TYPE_CHECKING:
    import torch
    from torch import Tensor
else:
    torch = deferred("torch")

ValueAndGradient = tuple["Tensor", "Tensor"]
Weight: TypeAlias = "float | Tensor"  # one number for all positions, or [n]


def forward_kl(student_logits: Tensor, teacher_logits: Tensor, targets: Tensor) -> ValueAndGradient:  # noqa: ARG001
    """KL(p || q). Dense expression: ``(p * (log p - log q)).sum(-1)``; its gradient is ``q - p``."""
    for logits in (student_logits, teacher_logits):
        logits.sub_(logits.amax(dim=-1, keepdim=True))
    p, log_ratio = teacher_logits.exp(), teacher_logits.sub_(student_logits)
    q = student_logits.exp_()  # one exponential of each logit: the sums' logarithms are added to the values
    p_total, q_total = p.sum(dim=-1, keepdim=True), q.sum(dim=-1, keepdim=True)
    p.div_(p_total)
    values = log_ratio.mul_(p).sum(dim=-1)  # in place; vecdot would need another [n, V]
    values += (q_total.log() - p_total.log()).squeeze(-1)
    return values, q.div_(q_total).sub_(p)


Criterion.add("forward_kl", forward_kl, label="forward KL divergence", description="KL(p ‖ q) = sum p log(p/q)")


def reverse_kl(student_logits: Tensor, teacher_logits: Tensor, targets: Tensor) -> ValueAndGradient:  # noqa: ARG001
    """KL(q || p). Dense expression: ``(q * (log q - log p)).sum(-1)``."""
    log_q, log_p = log_softmax_(student_logits), log_softmax_(teacher_logits)
    q = log_q.exp()
    difference = log_q.sub_(log_p)
    values = torch.linalg.vecdot(q, difference)
    return values, q.mul_(difference.sub_(values.unsqueeze(-1)))


Criterion.add("reverse_kl", reverse_kl, label="reverse KL divergence", description="KL(q ‖ p)")


def jsd(student_logits: Tensor, teacher_logits: Tensor, targets: Tensor, beta: float) -> ValueAndGradient:  # noqa: ARG001
    """Generalised Jensen-Shannon: beta * KL(p || m) + (1 - beta) * KL(q || m), m = beta * p + (1 - beta) * q."""
    log_q, log_p = log_softmax_(student_logits), log_softmax_(teacher_logits)
    log_m = torch.logaddexp(log_p + math.log(beta), log_q + math.log1p(-beta))
    q, log_ratio = log_q.exp(), log_q.sub_(log_m)
    values = beta * torch.linalg.vecdot(log_p.exp(), log_p - log_m) + (1 - beta) * torch.linalg.vecdot(q, log_ratio)
    return values, _through_softmax_(q, log_ratio.mul_(1 - beta))


Criterion.add(
    "jsd",
    jsd,
    options={"beta": 0.5},
    mixes=True,
    label="Jensen–Shannon divergence",
    description="beta · KL(p ‖ m) + (1-beta) · KL(q ‖ m), m = beta · p + (1-beta) · q",
)


def skew_kl(student_logits: Tensor, teacher_logits: Tensor, targets: Tensor, alpha: float) -> ValueAndGradient:  # noqa: ARG001
    """KL(p || m), m = alpha * p + (1 - alpha) * q."""
    log_q, log_p = log_softmax_(student_logits), log_softmax_(teacher_logits)
    log_m = torch.logaddexp(log_p + math.log(alpha), log_q + math.log1p(-alpha))
    log_ratio = log_p - log_m
    values = torch.linalg.vecdot(log_p.exp_(), log_ratio)
    return values, _through_softmax_(log_q.exp_(), log_ratio.expm1_().mul_(alpha - 1))


Criterion.add(
    "skew_kl",
    skew_kl,
    options={"alpha": 0.1},
    mixes=True,
    label="skewed KL divergence",
    description="KL(p ‖ alpha · p + (1-alpha) · q)",
)


def skew_reverse_kl(student_logits: Tensor, teacher_logits: Tensor, targets: Tensor, alpha: float) -> ValueAndGradient:  # noqa: ARG001
    """KL(q || m), m = alpha * q + (1 - alpha) * p."""
    log_q, log_p = log_softmax_(student_logits), log_softmax_(teacher_logits)
    log_m = torch.logaddexp(log_q + math.log(alpha), log_p + math.log1p(-alpha))
    q, log_ratio = log_q.exp(), log_q.sub_(log_m)
    values = torch.linalg.vecdot(q, log_ratio)
    return values, _through_softmax_(q, log_ratio - alpha * log_ratio.expm1())


Criterion.add(
    "skew_reverse_kl",
    skew_reverse_kl,
    options={"alpha": 0.1},
    mixes=True,
    label="skewed reverse KL divergence",
    description="KL(q ‖ alpha · q + (1-alpha) · p)",
)


def total_variation(student_logits: Tensor, teacher_logits: Tensor, targets: Tensor) -> ValueAndGradient:  # noqa: ARG001
    """0.5 * sum |p - q|; where p = q, the subgradient is 0."""
    q = log_softmax_(student_logits).exp_()
    difference = q - log_softmax_(teacher_logits).exp_()
    values = 0.5 * difference.abs().sum(dim=-1)
    return values, _through_softmax_(q, difference.sign_().mul_(0.5))


Criterion.add("total_variation", total_variation, label="total variation distance", description="½ sum |p - q|")


def decoupled(
    student_logits: Tensor, teacher_logits: Tensor, targets: Tensor, alpha: Weight, beta: Weight
) -> ValueAndGradient:
    """alpha * TCKD + beta * NCKD (DKD; with weights for each position, AT-KD).

    TCKD is the KL between (p(y), 1 - p(y)) and (q(y), 1 - q(y)); NCKD the KL between p' and q', which are p and q
    renormalised without y and 0 at y. Their gradients are p(y) (q - onehot(y)) + (1 - p(y)) (q - q') and q' - p'.
    """
    index = targets.unsqueeze(-1)
    log_q, log_p = log_softmax_(student_logits), log_softmax_(teacher_logits)
    q_target, p_target = log_q.gather(-1, index), log_p.gather(-1, index)
    others_q, rest_q = _without(log_q, index)
    others_p, rest_p = _without(log_p, index)  # rest: log(1 - p(y)), [n, 1]
    p_y, not_y = p_target.exp(), rest_p.exp()
    tckd = (p_y * (p_target - q_target) + not_y * (rest_p - rest_q)).squeeze(-1)
    p_others = others_p.exp()
    nckd = torch.linalg.vecdot(p_others, torch.where(p_others > 0, others_p - others_q, 0.0))

    a, b = (weight.unsqueeze(-1) if isinstance(weight, torch.Tensor) else weight for weight in (alpha, beta))
    q_others = others_q.exp_()
    gradient = q_others * (b - a * not_y) - b * p_others + a * log_q.exp_()  # p(y) q + (1 - p(y)) q = q
    gradient.scatter_add_(-1, index, -(a * p_y))
    return alpha * tckd + beta * nckd, gradient


Criterion.add(
    "dkd",
    decoupled,
    options={"alpha": 1.0, "beta": 8.0},
    label="decoupled KL divergence (DKD)",
    description="alpha · TCKD + beta · NCKD. TCKD: KL between (p(y), 1-p(y)) and (q(y), 1-q(y)); NCKD: KL between "
    "p and q renormalised without y",
)


def adaptive_weights(log_p_target: Tensor, sample: Tensor) -> dict[str, Tensor]:
    """AT-KD's weights of TCKD (``alpha``) and NCKD (``beta``) at N picked positions.

    Of the m positions of a sample, the ceil(m/2) with the highest 1 - p(y) are hard (of equal ones the earlier), the
    others easy. Hard positions get both parts with weight 0.8 * m / m_hard, easy ones NCKD with 0.2 * m / m_easy. An
    empty half gives its weight to the other.

    Args:
        log_p_target: the teacher's log p(y), [N]. It orders positions whose 1 - p(y) would round to 1, too.
        sample: the number of the sample that each position belongs to, int64 [N].
    """
    order = log_p_target.argsort(stable=True)
    order = order[sample[order].argsort(stable=True)]
    sorted_samples = sample[order]
    starts = torch.searchsorted(sorted_samples, sample)
    m = torch.searchsorted(sorted_samples, sample, right=True) - starts
    rank = torch.empty_like(order).scatter_(0, order, torch.arange(len(order), device=order.device)) - starts
    m_hard = (m + 1) // 2
    is_hard = rank < m_hard
    share = torch.full_like(log_p_target, 0.2).masked_fill(is_hard, 0.8).masked_fill(is_hard & (m == m_hard), 1.0)
    weight = share * m / torch.where(is_hard, m_hard, m - m_hard)
    return {"alpha": weight * is_hard, "beta": weight}


Criterion.add(
    "at_kd",
    decoupled,
    position_weights=adaptive_weights,
    label="adaptive-teaching divergence (AT-KD)",
    description="of the m picked positions of a sample, the ceil(m/2) with the highest 1 - p(y) are hard: "
    "0.8 · m/m_hard · (TCKD + NCKD); the others easy: 0.2 · m/m_easy · NCKD",
)


def differentiated(function: Callable[[Tensor, Tensor, Tensor], Tensor], name: str) -> Callable[..., ValueAndGradient]:
    """A criterion made of a function that returns values alone; autograd computes the gradient.

    Args:
        function: maps student and teacher logits [n, V] and targets [n] to values [n].
        name: its name in errors.
    """

    def compare(student_logits: Tensor, teacher_logits: Tensor, targets: Tensor) -> ValueAndGradient:
        with torch.enable_grad():
            logits = student_logits.detach().requires_grad_()
            values = function(logits, teacher_logits, targets)
            if not values.requires_grad:
                raise ValueError(f"{name} does not depend on student_logits by differentiable steps")
            (gradient,) = torch.autograd.grad(values.sum(), logits)
        if not torch.isfinite(gradient).all():
            raise ValueError(f"{name} has a gradient that is not finite; mind sqrt and log at 0")
        return values.detach(), gradient

    return compare


def sampled_forward_kl(student_logits: Tensor, class_ids: Tensor, counts: Tensor) -> ValueAndGradient:
    """KL to the drawn target ``w = counts / counts.sum()``: the sum over drawn classes of ``w * (log w - log q)``.

    ``class_ids`` int64 and ``counts`` [n, C]; q is the student's softmax over its whole vocabulary, so the gradient
    ``q - w`` is an unbiased estimate of forward KL's where E[w] = p (method: class sampling).
    """
    log_q, q = _gather_and_softmax_(student_logits, class_ids)
    weights = counts.to(q.dtype)
    weights = weights / weights.sum(dim=-1, keepdim=True)
    log_weights = torch.where(counts > 0, weights, 1.0).log()  # log 1 = 0 in the padding
    values = torch.linalg.vecdot(weights, log_weights - log_q)
    return values, q.scatter_add_(-1, class_ids, -weights)


def truncated_forward_kl(student_logits: Tensor, class_ids: Tensor, log_probabilities: Tensor) -> ValueAndGradient:
    """Forward KL to a teacher of which K classes are known; all others count as one class with the mass that is left.

    D = sum over the K of p (log p - log q), + p* log(p*/q*), with p* = 1 - sum p and q* the student's mass outside the
    K. It is never negative, and a lower bound of KL(p || q), by the data-processing inequality. Its gradient is q - p
    at the K classes and q (1 - p*/q*) at the others. Where probabilities sum to more than 1, as rounded ones may, they
    are divided by their sum. (Method: truncated teacher with its tail.)

    Args:
        class_ids: int64 [n, K], different within a row but for its padding.
        log_probabilities: [n, K], the teacher's at the criterion's temperature; -inf pads the end of a row.
    """
    log_q = log_softmax_(student_logits)
    log_p = log_probabilities.double()
    log_p = log_p - log_p.logsumexp(dim=-1, keepdim=True).clamp(min=0)
    log_p_tail = log_p.logsumexp(dim=-1, keepdim=True).expm1().neg().clamp(min=0).log().to(log_q.dtype)
    log_p = log_p.to(log_q.dtype)
    p, p_tail = log_p.exp(), log_p_tail.exp()
    # Of a row without a known class the tail is all there is, and no class is taken out of it.
    removed = torch.where((p > 0).any(dim=-1, keepdim=True), -torch.inf, log_q.gather(-1, class_ids))
    others = log_q.scatter(-1, torch.where(p > 0, class_ids, class_ids[:, :1]), removed)
    log_q_tail = others.logsumexp(dim=-1, keepdim=True)
    has_tail = (p_tail > 0) & (log_q_tail > -torch.inf)  # rounding leaves a mass where every class is known
    log_ratio = torch.where(has_tail, log_p_tail - log_q_tail, -torch.inf)
    values = torch.where(p > 0, p * (log_p - log_q.gather(-1, class_ids)), 0.0).sum(dim=-1)
    values += torch.where(has_tail, p_tail * log_ratio, 0.0).squeeze(-1)
    gradient = log_q.exp_().sub_(others.add_(log_ratio).exp_())
    return values.clamp_(min=0), gradient.scatter_add_(-1, class_ids, -p)


def cross_entropy(student_logits: Tensor, targets: Tensor) -> ValueAndGradient:
    """-log q(y) in nats of the true next tokens ``targets`` int64 [n]; the gradient is ``q - onehot(y)``."""
    index = targets.unsqueeze(-1)
    log_q, gradient = _gather_and_softmax_(student_logits, index)
    return -log_q.squeeze(-1), gradient.scatter_add_(-1, index, torch.full_like(index, -1, dtype=gradient.dtype))


def entropy(logits: Tensor, n_frequent: int = 0, tail_weights: Tensor | None = None) -> Tensor:
    """H(q) = -sum q log q in nats, [n], of logits [n, V]; all classes but the first F count ``tail_weights`` times.

    Args:
        n_frequent: F.
        tail_weights: how many classes each of the others stands for, [V - F]; None: for itself.
    """
    shifted = logits.sub_(logits.amax(dim=-1, keepdim=True))
    weights = shifted.exp()
    if tail_weights is not None:
        weights[:, n_frequent:].mul_(tail_weights.to(weights.dtype))
    total = weights.sum(dim=-1)
    return (total.log() - weights.mul_(shifted).sum(dim=-1) / total).clamp_(min=0)


def log_softmax_(logits: Tensor) -> Tensor:
    """log softmax over the last dimension, in place. The maximum is subtracted first, so large logits round less."""
    logits.sub_(logits.amax(dim=-1, keepdim=True))
    return logits.sub_(logits.exp().sum(dim=-1, keepdim=True).log_())


def _gather_and_softmax_(logits: Tensor, class_ids: Tensor) -> tuple[Tensor, Tensor]:
    """log q at ``class_ids`` [n, C], and q = softmax of the logits, in their place: one exponential of each logit."""
    picked = logits.sub_(logits.amax(dim=-1, keepdim=True)).gather(-1, class_ids)
    total = logits.exp_().sum(dim=-1, keepdim=True)
    return picked - total.log(), logits.div_(total)


def _through_softmax_(q: Tensor, g: Tensor) -> Tensor:
    """The gradient in the logits, made in place of the gradient ``g`` in q: q * (g - sum q g).

    A constant added to ``g`` makes no difference.
    """
    return g.sub_(torch.linalg.vecdot(q, g).unsqueeze(-1)).mul_(q)


def _without(log_probabilities: Tensor, index: Tensor) -> tuple[Tensor, Tensor]:
    """The log of a distribution renormalised without class ``index`` [n, 1], -inf there, and the log of its mass."""
    others = log_probabilities.scatter(-1, index, -torch.inf)
    rest = others.logsumexp(dim=-1, keepdim=True)
    return others.sub_(rest), rest
