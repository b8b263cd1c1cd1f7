"""The executable specification: selective distillation in plain torch on full logits.

Every fast path of selkd is tested against this file. It is written to be read in one sitting and keeps [B, T, V]
tensors without shame. Row t of the logits is the distribution of token t+1; scores, coefficients and masks line up
with it. Entropies and divergences are in nats. Give float64 logits for float64 answers.

Shapes: B batch, T positions, V classes, C distinct drawn classes.
"""

import math
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor

from selkd.recipe import ClassOptions, CriterionOptions, PositionOptions, Recipe, parse_part
from selkd.selection.noise import position_uniforms


def importance(
    metric: str,
    student_logits: Tensor,
    teacher_logits: Tensor | None,
    targets: Tensor,
    valid_mask: Tensor | None = None,
) -> Tensor:
    """Position-importance scores u(t), [B, T], at temperature 1.

    ``student_entropy``: H(q_t) = -sum q log q. Neither the teacher, the targets nor the mask enter it; they are
    arguments because other metrics need them.
    """
    del teacher_logits, targets, valid_mask
    if metric != "student_entropy":
        raise ValueError(f"metric {metric!r} is not known. Allowed: student_entropy")
    log_q = torch.log_softmax(student_logits, dim=-1)
    return -(log_q.exp() * log_q).sum(dim=-1)


def select(
    policy: str,
    scores: Tensor | None,
    valid_mask: Tensor,
    fraction: float | None = None,
    *,
    seed: int = 0,
    sample_ids: np.ndarray | None = None,
    step: int = 0,
) -> Tensor:
    """Coefficients a_it [B, T]: 1/K on the K picked positions of a sample, 0 elsewhere.

    ``all``: every valid position. ``top_k``: the ceil(k*n) highest scores, equal ones to the earlier position.
    ``random``: ceil(k*n) without replacement, a function of (seed, sample id, step).
    """
    if policy not in ("all", "top_k", "random"):
        raise ValueError(f"policy {policy!r} is not known. Allowed: all, top_k, random")
    if policy == "random":
        if sample_ids is None:
            sample_ids = np.arange(len(valid_mask) * 2, dtype=np.int64).view(np.uint8).reshape(-1, 16)
        scores = torch.from_numpy(position_uniforms(seed, sample_ids, valid_mask.bool().numpy(), "positions", step))
    dtype = torch.float64 if scores is None else scores.dtype
    coefficients = torch.zeros(valid_mask.shape, dtype=dtype)
    for row, valid in enumerate(valid_mask.bool()):
        positions = valid.nonzero().flatten().tolist()
        if policy != "all":
            assert scores is not None, f"policy {policy} needs scores"
            assert fraction is not None, f"policy {policy} needs a fraction"
            count = math.ceil(fraction * len(positions) - 1e-9)
            positions = sorted(positions, key=lambda t: (-scores[row, t].item(), t))[:count]
        coefficients[row, positions] = 1 / max(1, len(positions))
    return coefficients


def divergence(
    criterion: str, student_logits: Tensor, teacher_logits: Tensor, targets: Tensor, *, temperature: float = 1.0
) -> Tensor:
    """D(p, q) [B, T], of both models' logits over ``temperature``; not multiplied by its square.

    ``forward_kl``: KL(p || q) = sum p (log p - log q).
    """
    del targets
    if criterion != "forward_kl":
        raise ValueError(f"criterion {criterion!r} is not known. Allowed: forward_kl")
    log_q = torch.log_softmax(student_logits / temperature, dim=-1)
    log_p = torch.log_softmax(teacher_logits / temperature, dim=-1)
    return (log_p.exp() * (log_p - log_q)).sum(dim=-1)


def sampled_divergence(
    student_logits: Tensor, class_ids: Tensor, counts: Tensor, *, temperature: float = 1.0
) -> Tensor:
    """RS-KD's forward KL to w = counts / sum(counts), [B, T]: the sum over drawn classes of w (log w - log q).

    ``class_ids`` and ``counts`` [B, T, C], rows padded with count 0. q is the softmax over the whole vocabulary.
    """
    log_q = torch.log_softmax(student_logits / temperature, dim=-1).gather(-1, class_ids)
    weights = counts.to(log_q.dtype) / counts.sum(dim=-1, keepdim=True).clamp(min=1)
    return (torch.xlogy(weights, weights) - weights * log_q).sum(dim=-1)


def loss(
    student_logits: Tensor,
    teacher_logits: Tensor,
    targets: Tensor,
    valid_mask: Tensor,
    recipe: Recipe | Mapping[str, Any],
    *,
    class_ids: Tensor | None = None,
    counts: Tensor | None = None,
    seed: int = 0,
    sample_ids: np.ndarray | None = None,
    step: int = 0,
) -> Tensor:
    """The loss of one optimiser step, a scalar.

    l_it = lambda * D(p_it, q_it) * T^2 + (1 - lambda) * CE(y_it, q_it);  loss_i = sum_t a_it l_it;  loss = mean over
    the samples that have a valid position (``reduction: per_position``: the sum over all picked positions of the
    step, divided by how many they are).

    Args:
        recipe: a Recipe, or a mapping with any of its criterion, positions and classes parts.
        class_ids, counts: [B, T, C], the teacher's drawn classes; needed unless ``classes.sampler`` is ``all``.
    """
    parts = (
        recipe
        if isinstance(recipe, Mapping)
        else {p: getattr(recipe, p) for p in ("criterion", "positions", "classes")}
    )
    criterion = parse_part(CriterionOptions, parts.get("criterion", {}), "criterion")
    positions = parse_part(PositionOptions, parts.get("positions", {}), "positions")
    classes = parse_part(ClassOptions, parts.get("classes", {}), "classes")

    scores = None
    if positions.metric is not None:
        scores = importance(positions.metric, student_logits, teacher_logits, targets, valid_mask).detach()
    a = select(positions.policy, scores, valid_mask, positions.fraction, seed=seed, sample_ids=sample_ids, step=step)

    temperature = criterion.temperature
    if classes.sampler == "all":
        d = divergence(criterion.name, student_logits, teacher_logits, targets, temperature=temperature)
    else:
        assert class_ids is not None, f"classes.sampler: {classes.sampler} needs class_ids"
        assert counts is not None, f"classes.sampler: {classes.sampler} needs counts"
        d = sampled_divergence(student_logits, class_ids, counts, temperature=temperature)
    if criterion.temperature_squared:
        d = d * temperature**2
    log_q = torch.log_softmax(student_logits, dim=-1)
    ce = -log_q.gather(-1, targets.unsqueeze(-1)).squeeze(-1)
    per_position = criterion.kd_weight * d + (1 - criterion.kd_weight) * ce

    a = a.to(per_position.dtype)
    if positions.reduction == "per_position":
        picked = a > 0
        return (picked * per_position).sum() / picked.sum().clamp(min=1)
    counted = valid_mask.bool().any(dim=-1).sum().clamp(min=1)
    return (a * per_position).sum() / counted
