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

from selkd.recipe.choices import ClassOptions, CriterionOptions, FractionSchedule, PositionOptions
from selkd.recipe.combinations import check_loss
from selkd.recipe.part import parse_part
from selkd.recipe.recipe import Recipe
from selkd.selection.randomness import draw_uniforms, position_uniforms

# What is specified here, each criterion with the defaults of its options.
METRICS = (
    "student_entropy",
    "teacher_entropy",
    "student_ce",
    "teacher_ce",
    "kl",
    "reverse_kl",
    "kl_plus_student_entropy",
    "ce_ratio",
    "ce_ratio_plus_student_entropy",
    "soft_or",
)
POLICIES = ("all", "top_k", "random", "gls", "curriculum", "pos_rs", "pos_rs_corrected", "weighted")
CRITERIA: dict[str, dict[str, float]] = {
    "forward_kl": {},
    "reverse_kl": {},
    "jsd": {"beta": 0.5},
    "skew_kl": {"alpha": 0.1},
    "skew_reverse_kl": {"alpha": 0.1},
    "total_variation": {},
    "dkd": {"alpha": 1.0, "beta": 8.0},
    "at_kd": {},
}


def importance(
    metric: str,
    student_logits: Tensor,
    teacher_logits: Tensor | None,
    targets: Tensor,
    valid_mask: Tensor | None = None,
) -> Tensor:
    """Position-importance scores u(t), [B, T], at temperature 1.

    ``soft_or`` alone looks at ``valid_mask`` (all positions, if not given); it is 0 where not valid. ``random`` is
    noise of a run's seed and has no value here. ``teacher_logits`` may be None where the metric needs no teacher.
    """
    if metric not in METRICS:
        raise ValueError(f"metric {metric!r} is not known. Allowed: {', '.join(METRICS)}")
    log_q = torch.log_softmax(student_logits, dim=-1)
    if teacher_logits is None:
        return _combined(metric, log_q, targets, None, valid_mask)
    log_p = torch.log_softmax(teacher_logits, dim=-1)
    if metric == "reverse_kl":
        return (log_q.exp() * (log_q - log_p)).sum(dim=-1)
    kl = (log_p.exp() * (log_p - log_q)).sum(dim=-1)
    teacher_ce = -log_p.gather(-1, targets.unsqueeze(-1)).squeeze(-1)
    return _combined(metric, log_q, targets, (-(log_p.exp() * log_p).sum(dim=-1), teacher_ce, kl), valid_mask)


def importance_of_draws(
    metric: str,
    student_logits: Tensor,
    targets: Tensor,
    class_ids: Tensor,
    counts: Tensor,
    scalars: tuple[Tensor, Tensor],
    valid_mask: Tensor | None = None,
) -> Tensor:
    """``importance`` of a teacher known by draws at temperature 1, [B, T, C], and by H(p) and -log p(y), [B, T].

    KL(p || q) is the estimate -H(p) - sum_v w(v) log q(v), w = counts / sum(counts), whose expectation over the draws
    is KL; all else is exact. ``reverse_kl`` can't be had.
    """
    assert metric != "reverse_kl", "draws say nothing of the classes that were not drawn"
    log_q = torch.log_softmax(student_logits, dim=-1)
    weights = counts / counts.sum(dim=-1, keepdim=True).clamp(min=1e-30)
    kl = -scalars[0] - (weights * log_q.gather(-1, class_ids)).sum(dim=-1)
    return _combined(metric, log_q, targets, (*scalars, kl), valid_mask)


def _combined(metric: str, log_q: Tensor, targets: Tensor, of_teacher: Any, valid_mask: Tensor | None) -> Tensor:
    """The metric from log q and, of the teacher, its entropy, its cross-entropy and KL, or None."""
    student_entropy = -(log_q.exp() * log_q).sum(dim=-1)
    student_ce = -log_q.gather(-1, targets.unsqueeze(-1)).squeeze(-1)
    if metric in ("student_entropy", "student_ce"):
        return student_entropy if metric == "student_entropy" else student_ce
    if of_teacher is None:
        raise ValueError(f"metric {metric!r} needs teacher_logits")
    teacher_entropy, teacher_ce, kl = of_teacher
    ce_ratio = student_ce / (teacher_ce + 1e-6)
    values = {
        "teacher_entropy": teacher_entropy,
        "teacher_ce": teacher_ce,
        "kl": kl,
        "kl_plus_student_entropy": kl + student_entropy,
        "ce_ratio": ce_ratio,
        "ce_ratio_plus_student_entropy": ce_ratio + student_entropy,
    }
    if metric in values:
        return values[metric]
    valid = torch.ones_like(kl, dtype=torch.bool) if valid_mask is None else valid_mask.bool()
    scores = torch.zeros_like(kl)
    for u in (student_entropy, kl.clamp(min=0)):  # soft_or
        highest = u.masked_fill(~valid, 0).amax(dim=-1, keepdim=True)
        scores = 1 - (1 - scores) * torch.where(highest > 0, 1 - u / highest, 1.0)
    return scores.masked_fill(~valid, 0)


def two_stage_scores(
    student_logits: Tensor,
    valid_mask: Tensor,
    fraction: float,
    rescored_share: float,
    class_ids: Tensor,
    class_weights: Tensor,
) -> Tensor:
    """The student's entropy [B, T], exact at the best positions of each sample and below those elsewhere; 0 if invalid.

    Best are the ceil((fraction + rescored_share) * n) highest by an estimate: the entropy formula over ``class_ids``
    [B, m] alone, each counted ``class_weights`` [B, m] times (0: not). What is not rescored ranks below what is.
    """
    z = student_logits.gather(-1, class_ids.unsqueeze(1).expand(-1, student_logits.shape[1], -1))
    weights = class_weights.unsqueeze(1)
    log_total = (z + weights.log()).logsumexp(dim=-1)
    estimate = log_total - (weights * (z - log_total.unsqueeze(-1)).exp() * z).sum(dim=-1)
    exact = importance("student_entropy", student_logits, None, torch.zeros_like(valid_mask, dtype=torch.int64))
    scores = torch.zeros_like(exact)
    for row, valid in enumerate(valid_mask.bool()):
        positions = valid.nonzero().flatten().tolist()
        k = math.ceil(min(1.0, fraction + rescored_share) * len(positions) - 1e-9)
        best = sorted(positions, key=lambda t: (-estimate[row, t].item(), t))[:k]
        rest = [t for t in positions if t not in best]
        scores[row, best] = exact[row, best]
        if rest:
            lowest = exact[row, best].min()
            scores[row, rest] = estimate[row, rest].clamp(max=lowest * (1 - 1e-6) - 1e-6)
    return scores


def select(
    policy: str,
    scores: Tensor | None,
    valid_mask: Tensor,
    fraction: float | None = None,
    *,
    progress: float = 0.0,
    seed: int = 0,
    sample_ids: np.ndarray | None = None,
    step: int = 0,
    queue: np.ndarray | None = None,
    queue_size: int = 30_000,
    smoothing: float = 1.0,
    clip: float | None = None,
    skip_first: int = 0,
    coverage: float = 0.0,
    position_ids: Tensor | None = None,
) -> Tensor:
    """Coefficients a_it [B, T] of ``loss_i = sum_t a_it * l_it``; rows without a valid position are 0.

    ``all``: 1/n everywhere. ``top_k``: 1/K on the K = ceil(k*n) highest scores, equal ones to the earlier position.
    ``random``: K without replacement. ``gls``: the scores at or above the (1-k) quantile of ``queue``, all with
    1 / (sum of ceil(k*n) over the batch, which is the step here: the loss is their sum over the samples, not the
    mean); ``top_k``'s choice while less than a tenth of ``queue_size`` has been seen. ``curriculum``: K in ascending
    order from floor((n - K) * progress). ``pos_rs``, ``pos_rs_corrected``: K draws in proportion to the scores.
    ``weighted``: u / sum u.

    Args:
        seed, sample_ids, step: what random choices are a function of; ``sample_ids`` uint8 [B, 16].
        queue: the recent valid scores of ``gls``.
        smoothing, clip, skip_first, coverage: the mitigations of ``pos_rs`` and ``pos_rs_corrected``.
        position_ids: [B, T], from 0 in each document, for ``skip_first``; by default a row is one document.
    """
    if policy not in POLICIES:
        raise ValueError(f"policy {policy!r} is not known. Allowed: {', '.join(POLICIES)}")
    valid_mask = valid_mask.bool()
    if skip_first:
        places = torch.arange(valid_mask.shape[1]) if position_ids is None else position_ids
        valid_mask = valid_mask & (places >= skip_first)
    if sample_ids is None:
        sample_ids = np.arange(len(valid_mask) * 2, dtype=np.int64).view(np.uint8).reshape(-1, 16)
    if policy == "random":
        scores = torch.from_numpy(position_uniforms(seed, sample_ids, valid_mask.numpy(), "positions", step))
    coefficients = torch.zeros(valid_mask.shape, dtype=torch.float64 if scores is None else scores.dtype)
    k_of_rows = [math.ceil((1.0 if fraction is None else fraction) * n - 1e-9) for n in valid_mask.sum(-1).tolist()]
    is_early = queue is None or 10 * len(queue) < queue_size
    for row, valid in enumerate(valid_mask):
        positions, k = valid.nonzero().flatten().tolist(), k_of_rows[row]
        n = len(positions)
        if n == 0:
            continue
        if policy == "all":
            coefficients[row, positions] = 1 / n
            continue
        assert scores is not None, f"policy {policy} needs scores"
        u = scores[row].detach().double().numpy()
        from_highest = sorted(positions, key=lambda t: (-u[t], t))
        match policy:
            case "top_k" | "random":
                coefficients[row, from_highest[:k]] = 1 / k
            case "gls":
                assert fraction is not None, "gls needs a fraction"
                picked = from_highest[:k]
                if queue is not None and not is_early:
                    threshold = np.quantile(queue, 1 - fraction)
                    picked = [t for t in positions if u[t] >= threshold]
                coefficients[row, picked] = 1 / sum(k_of_rows)
            case "curriculum":
                start = math.floor((n - k) * progress + 1e-9)
                coefficients[row, sorted(positions, key=lambda t: (u[t], t))[start : start + k]] = 1 / k
            case "weighted":
                coefficients[row, positions] = torch.from_numpy(_proportional(u[positions])).to(scores.dtype)
            case _:  # pos_rs, pos_rs_corrected
                n_sure = math.ceil(coverage * k - 1e-9)
                rest = sorted(from_highest[n_sure:])
                weights = u[rest] if clip is None else np.minimum(u[rest], np.quantile(u[positions].clip(min=0), clip))
                weights = weights.clip(min=0) / max(weights.max(initial=0), 1e-300)  # no power of it overflows
                r = _proportional(weights ** (1 / smoothing))
                points = draw_uniforms(seed, sample_ids[row : row + 1], np.array([k]), "position draws", step)[0]
                drawn = np.searchsorted(r.cumsum(), points[: k - n_sure] * r.sum(), side="right")
                times = np.bincount(drawn, minlength=len(rest))[: len(rest)]
                is_corrected = policy == "pos_rs_corrected"
                a = times / ((k - n_sure) * n * np.where(r > 0, r, 1)) if is_corrected and k > n_sure else times / k
                coefficients[row, from_highest[:n_sure]] = 1 / n if is_corrected else 1 / k
                coefficients[row, rest] = torch.from_numpy(a).to(scores.dtype)
    return coefficients


def _proportional(u: np.ndarray) -> np.ndarray:
    """u / sum u, scores below 0 as 0; uniform where all are 0."""
    u = u.clip(min=0)
    return u / u.sum() if u.sum() > 0 else np.full(len(u), 1 / max(1, len(u)))


def divergence(
    criterion: str,
    student_logits: Tensor,
    teacher_logits: Tensor,
    targets: Tensor,
    *,
    temperature: float = 1.0,
    picked_mask: Tensor | None = None,
    alpha: float | None = None,
    beta: float | None = None,
) -> Tensor:
    """D(p, q) [B, T], of both models' logits over ``temperature``; not multiplied by its square.

    ``alpha`` and ``beta`` are the criterion's own (defaults: ``CRITERIA``). ``picked_mask``
    [B, T] is what ``at_kd`` ranks within each sample (all positions, if not given); it is 0 elsewhere.
    """
    if criterion not in CRITERIA:
        raise ValueError(f"criterion {criterion!r} is not known. Allowed: {', '.join(CRITERIA)}")
    alpha = CRITERIA[criterion].get("alpha", 0.0) if alpha is None else alpha
    beta = CRITERIA[criterion].get("beta", 0.0) if beta is None else beta
    log_q = torch.log_softmax(student_logits / temperature, dim=-1)
    log_p = torch.log_softmax(teacher_logits / temperature, dim=-1)
    p, q = log_p.exp(), log_q.exp()

    def kl(log_a: Tensor, log_b: Tensor) -> Tensor:
        return (log_a.exp() * (log_a - log_b)).sum(dim=-1)

    match criterion:
        case "forward_kl":
            return kl(log_p, log_q)
        case "reverse_kl":
            return kl(log_q, log_p)
        case "jsd":
            log_m = (beta * p + (1 - beta) * q).log()
            return beta * kl(log_p, log_m) + (1 - beta) * kl(log_q, log_m)
        case "skew_kl":
            return kl(log_p, (alpha * p + (1 - alpha) * q).log())
        case "skew_reverse_kl":
            return kl(log_q, (alpha * q + (1 - alpha) * p).log())
        case "total_variation":
            return 0.5 * (p - q).abs().sum(dim=-1)

    # dkd and at_kd: the true token against the rest (TCKD), and among the rest (NCKD).
    is_target = torch.nn.functional.one_hot(targets, p.shape[-1]).bool()
    rest_p, rest_q = (log.masked_fill(is_target, -torch.inf).logsumexp(-1) for log in (log_p, log_q))
    target_p, target_q = (log.gather(-1, targets.unsqueeze(-1)).squeeze(-1) for log in (log_p, log_q))
    tckd = target_p.exp() * (target_p - target_q) + rest_p.exp() * (rest_p - rest_q)
    others_p, others_q = log_p - rest_p.unsqueeze(-1), log_q - rest_q.unsqueeze(-1)
    nckd = (others_p.exp() * (others_p - others_q)).masked_fill(is_target, 0).sum(dim=-1)
    if criterion == "dkd":
        return alpha * tckd + beta * nckd

    picked_mask = torch.ones_like(targets, dtype=torch.bool) if picked_mask is None else picked_mask.bool()
    values = torch.zeros_like(tckd)
    for row, picked in enumerate(picked_mask):
        positions = sorted(picked.nonzero().flatten().tolist(), key=lambda t: (target_p[row, t].item(), t))
        m, n_hard = len(positions), math.ceil(len(positions) / 2)
        hard, easy = positions[:n_hard], positions[n_hard:]
        if hard:
            values[row, hard] = (0.8 if easy else 1.0) * m / len(hard) * (tckd + nckd)[row, hard]
        if easy:
            values[row, easy] = 0.2 * m / len(easy) * nckd[row, easy]
    return values


def sampled_divergence(
    student_logits: Tensor, class_ids: Tensor, counts: Tensor, *, temperature: float = 1.0
) -> Tensor:
    """RS-KD's forward KL to w = counts / sum(counts), [B, T]: the sum over drawn classes of w (log w - log q).

    ``class_ids`` and ``counts`` [B, T, C], rows padded with count 0. q is the softmax over the whole vocabulary.
    """
    log_q = torch.log_softmax(student_logits / temperature, dim=-1).gather(-1, class_ids)
    weights = counts.to(log_q.dtype)
    weights = weights / weights.sum(dim=-1, keepdim=True).clamp(min=1e-30)
    return (torch.xlogy(weights, weights) - weights * log_q).sum(dim=-1)


def truncated_divergence(
    student_logits: Tensor, class_ids: Tensor, log_probabilities: Tensor, *, temperature: float = 1.0
) -> Tensor:
    """Forward KL [B, T] to a teacher of which K classes are known and the mass of all others together, the tail.

    ``class_ids`` and ``log_probabilities`` [B, T, K], the teacher's at ``temperature``; -inf pads a row.
    """
    q = torch.softmax(student_logits / temperature, dim=-1)
    p = log_probabilities.exp()
    p = p / p.sum(dim=-1, keepdim=True).clamp(min=1)
    is_known = torch.zeros_like(q).scatter_add_(-1, class_ids, (p > 0).to(q.dtype)) > 0
    p_tail, q_tail = (1 - p.sum(dim=-1)).clamp(min=0), q.masked_fill(is_known, 0).sum(dim=-1)
    known = torch.xlogy(p, p) - torch.xlogy(p, q.gather(-1, class_ids))
    return known.sum(dim=-1) + torch.xlogy(p_tail, p_tail) - torch.xlogy(p_tail, q_tail)


def loss(
    student_logits: Tensor,
    teacher_logits: Tensor,
    targets: Tensor,
    valid_mask: Tensor,
    recipe: Recipe | Mapping[str, Any],
    *,
    class_ids: Tensor | None = None,
    counts: Tensor | None = None,
    scalars: tuple[Tensor, Tensor] | None = None,
    scoring_counts: Tensor | None = None,
    seed: int = 0,
    sample_ids: np.ndarray | None = None,
    step: int = 0,
    total_steps: int = 1,
    queue: np.ndarray | None = None,
    position_ids: Tensor | None = None,
) -> Tensor:
    """The loss of one optimiser step, a scalar.

    l_it = lambda * D(p_it, q_it) * T^2 + (1 - lambda) * CE(y_it, q_it);  loss_i = sum_t a_it l_it;  loss = mean over
    the samples that have an eligible position (``reduction: per_position``: the sum over all picked positions of the
    step, divided by how many they are; ``gls``: by its budget).

    Args:
        recipe: a Recipe, or a mapping with any of its criterion, positions and classes parts.
        class_ids, counts: [B, T, C], the teacher's drawn classes; needed unless ``classes.sampler`` is ``all``.
        scalars: H(p) and -log p(y), [B, T]; with them, positions are scored as by ``importance_of_draws``.
        scoring_counts: the counts of the draws that do, which are others than those in ``counts``.
        step, total_steps: the place of the step in the run, for schedules, curriculum and random choices.
        seed, sample_ids, queue, position_ids: as in ``select``.
    """
    parts = (
        recipe
        if isinstance(recipe, Mapping)
        else {p: getattr(recipe, p) for p in ("criterion", "positions", "classes")}
    )
    criterion = parse_part(CriterionOptions, parts.get("criterion", {}), "criterion")
    positions = parse_part(PositionOptions, parts.get("positions", {}), "positions")
    classes = parse_part(ClassOptions, parts.get("classes", {}), "classes")
    check_loss(criterion, classes)

    scores = None
    if positions.metric not in (None, "random") and scalars is not None:
        assert class_ids is not None and counts is not None, "scalars come with draws"  # noqa: PT018
        drawn = class_ids, counts if scoring_counts is None else scoring_counts
        scores = importance_of_draws(positions.metric, student_logits, targets, *drawn, scalars, valid_mask).detach()
    elif positions.metric not in (None, "random"):
        scores = importance(positions.metric, student_logits, teacher_logits, targets, valid_mask).detach()
    elif positions.metric == "random":
        ids = np.arange(len(targets) * 2, dtype=np.int64).view(np.uint8).reshape(-1, 16)
        ids = ids if sample_ids is None else sample_ids
        scores = torch.from_numpy(position_uniforms(seed, ids, valid_mask.bool().numpy(), "positions", step))
    fraction = positions.fraction
    if isinstance(fraction, FractionSchedule):
        done = min(1.0, step / (fraction.over * total_steps))
        done = (1 - math.cos(math.pi * done)) / 2 if fraction.shape == "cosine" else done
        fraction = fraction.start + (fraction.to - fraction.start) * done
    span = positions.curriculum_steps or 1.0
    a = select(
        positions.policy,
        scores,
        valid_mask,
        fraction,
        progress=min(1.0, step / (span if isinstance(span, int) else span * total_steps)),
        seed=seed,
        sample_ids=sample_ids,
        step=step,
        queue=queue,
        queue_size=positions.queue_size or 30_000,
        smoothing=positions.smoothing or 1.0,
        clip=positions.clip,
        skip_first=positions.skip_first or 0,
        coverage=positions.coverage or 0.0,
        position_ids=position_ids,
    )

    temperature = criterion.temperature
    if classes.sampler == "all":
        d = divergence(
            criterion.name,
            student_logits,
            teacher_logits,
            targets,
            temperature=temperature,
            picked_mask=a > 0,
            alpha=criterion.alpha,
            beta=criterion.beta,
        )
    else:
        assert class_ids is not None, f"classes.sampler: {classes.sampler} needs class_ids"
        assert counts is not None, f"classes.sampler: {classes.sampler} needs counts"
        if classes.tail:  # the counts of top_k are probabilities
            d = truncated_divergence(student_logits, class_ids, counts.log(), temperature=temperature)
        else:
            d = sampled_divergence(student_logits, class_ids, counts, temperature=temperature)
    if criterion.temperature_squared:
        d = d * temperature**2
    log_q = torch.log_softmax(student_logits, dim=-1)
    ce = -log_q.gather(-1, targets.unsqueeze(-1)).squeeze(-1)
    per_position = criterion.kd_weight * d + (1 - criterion.kd_weight) * ce

    a = a.to(per_position.dtype)
    if positions.policy == "gls":
        return (a * per_position).sum()
    if positions.reduction == "per_position":
        picked = a > 0
        return (picked * per_position).sum() / picked.sum().clamp(min=1)
    eligible = valid_mask.bool()
    if positions.skip_first:
        places = torch.arange(targets.shape[1]) if position_ids is None else position_ids
        eligible = eligible & (places >= positions.skip_first)
    return (a * per_position).sum() / eligible.any(dim=-1).sum().clamp(min=1)
