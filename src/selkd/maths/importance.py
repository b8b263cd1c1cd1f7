"""Position-importance metrics on a chunk of logits, at temperature 1 whatever the criterion's.

A metric combines statistics of single positions. One pass over the chunks computes just the statistics that are needed.
Only ``soft_or`` looks at a whole sample, when its statistics are combined.

Shapes: B batch, T positions, n positions of a chunk, V classes. Statistics are in nats, logits float32 or float64.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, NamedTuple

from selkd.maths.divergence import entropy, log_softmax_
from selkd.plugins import Metric, deferred

if TYPE_CHECKING:
    import torch
    from torch import Tensor
else:
    torch = deferred("torch")

RATIO_EPSILON = 1e-6  # nats, added to the denominator of ``ce_ratio``


Metric.add(
    "student_entropy",
    statistics=("student_entropy",),
    label="the student’s entropy",
    unit="nats",
    description="H(q) = -sum q log q",
    of_sample="mean H(q) over its valid positions",
)
Metric.add(
    "teacher_entropy",
    statistics=("teacher_entropy",),
    needs_teacher=True,
    label="the teacher’s entropy",
    unit="nats",
    description="H(p)",
)
Metric.add(
    "student_ce",
    statistics=("student_ce",),
    label="the student’s cross-entropy",
    unit="nats",
    description="-log q(y)",
)
Metric.add(
    "teacher_ce",
    statistics=("teacher_ce",),
    needs_teacher=True,
    label="the teacher’s cross-entropy",
    unit="nats",
    description="-log p(y)",
)
Metric.add(
    "kl",
    statistics=("kl",),
    needs_teacher=True,
    label="the divergence KL(teacher ‖ student)",
    unit="nats",
    description="KL(p ‖ q)",
    of_sample="mean KL(p ‖ q)",
)
Metric.add(
    "reverse_kl",
    statistics=("reverse_kl",),
    needs_teacher=True,
    label="the divergence KL(student ‖ teacher)",
    unit="nats",
    description="KL(q ‖ p)",
)
Metric.add(
    "kl_plus_student_entropy",
    lambda of, _: of["kl"] + of["student_entropy"],
    statistics=("kl", "student_entropy"),
    needs_teacher=True,
    label="the divergence plus the student’s entropy",
    unit="nats",
    description="KL(p ‖ q) + H(q)",
)


def ce_ratio(student_ce: Tensor, teacher_ce: Tensor) -> Tensor:
    """CE(y, q) / (CE(y, p) + 1e-6): how much worse the student does than the teacher."""
    return student_ce / (teacher_ce + RATIO_EPSILON)


Metric.add(
    "ce_ratio",
    lambda of, _: ce_ratio(of["student_ce"], of["teacher_ce"]),
    statistics=("student_ce", "teacher_ce"),
    needs_teacher=True,
    label="the ratio of the student’s to the teacher’s cross-entropy",
    description="-log q(y) / (-log p(y) + 1e-6)",
    of_sample="the student's mean cross-entropy over the teacher's",
)
Metric.add(
    "ce_ratio_plus_student_entropy",
    lambda of, _: ce_ratio(of["student_ce"], of["teacher_ce"]) + of["student_entropy"],
    statistics=("student_ce", "teacher_ce", "student_entropy"),
    needs_teacher=True,
    label="the cross-entropy ratio plus the student’s entropy",
    description="ce_ratio + H(q), not rescaled",
)


def soft_or(student_entropy: Tensor, kl: Tensor, valid_mask: Tensor) -> Tensor:
    """1 - (1 - H/max H) * (1 - KL/max KL), [B, T], maxima over each sample's valid positions; 0 where not valid.

    Where a maximum is 0, its factor is 1 (not specified by the paper).
    """

    def doubt(values: Tensor) -> Tensor:
        values = values.clamp(min=0).masked_fill(~valid_mask, 0)
        highest = values.amax(dim=-1, keepdim=True)
        return 1 - torch.where(highest > 0, values / highest, 0.0)

    return (1 - doubt(student_entropy) * doubt(kl)).masked_fill(~valid_mask, 0)


Metric.add(
    "soft_or",
    lambda of, valid_mask: soft_or(of["student_entropy"], of["kl"], valid_mask),
    statistics=("student_entropy", "kl"),
    needs_teacher=True,
    is_scaled=True,
    label="the soft-or of the student’s entropy and the divergence",
    description="1 - (1 - H(q)/max H(q)) · (1 - KL(p ‖ q)/max KL(p ‖ q)), maxima over the sample's valid positions",
)
Metric.add(
    "random",
    label="chance",
    description="uniform noise of (seed, sample, step)",
    of_sample="uniform noise of (seed, sample)",
)


Own = Mapping[str, "Callable[[Tensor, Tensor | None, Tensor], Tensor]"]

OF_STUDENT = frozenset({"student_entropy", "student_ce", "student_confidence", "student_right"})
OF_TEACHER = frozenset({"teacher_entropy", "teacher_ce"})
"""Statistics of one model's logits; all others compare the two models."""


def statistics(
    names: Sequence[str],
    student_logits: Tensor,
    teacher_logits: Tensor | None,
    targets: Tensor,
    own: Own | None = None,
) -> Tensor:
    """Statistics of n positions, [n, len(names)], without gradient. The logits are overwritten.

    Args:
        names: ``student_entropy`` H(q), ``teacher_entropy`` H(p), ``student_ce`` -log q(y), ``teacher_ce`` -log p(y),
            ``kl`` KL(p || q), ``reverse_kl`` KL(q || p), ``top1_agreement`` (1 where both models rank the same class
            first, else 0), ``student_confidence`` (the probability of the student's first class), ``student_right`` (1
            where that is y), and the names in ``own``.
        student_logits, teacher_logits: [n, V]; the teacher's may be None if no name needs them.
        targets: int64 [n].
        own: a user's functions of (student_logits, teacher_logits, targets), by name.
    """
    values = {}
    for name, function in (own or {}).items():
        teacher_copy = None if teacher_logits is None else teacher_logits.clone()
        values[name] = function(student_logits.clone(), teacher_copy, targets).to(student_logits.dtype)
    built_in = set(names) - values.keys()
    if built_in == {"student_entropy"}:
        values["student_entropy"] = entropy(student_logits)
    elif built_in:
        assert teacher_logits is not None or built_in <= OF_STUDENT, f"{names} need the teacher's logits"
        if "top1_agreement" in built_in and teacher_logits is not None:  # before the logits are overwritten
            same = student_logits.argmax(dim=-1) == teacher_logits.argmax(dim=-1)
            values["top1_agreement"] = same.to(student_logits.dtype)
        log_q = None if built_in <= OF_TEACHER else log_softmax_(student_logits)
        log_p = None if teacher_logits is None or built_in <= OF_STUDENT else log_softmax_(teacher_logits)
        index = targets.unsqueeze(-1)
        if log_q is not None and {"student_confidence", "student_right"} & built_in:
            highest = log_q.amax(dim=-1)
            values["student_confidence"] = highest.exp()
            values["student_right"] = (log_q.gather(-1, index).squeeze(-1) == highest).to(log_q.dtype)
        values |= _of_one_model(built_in, "student", "reverse_kl", log_q, log_p, index)
        values |= _of_one_model(built_in, "teacher", "kl", log_p, log_q, index)
    return torch.stack([values[name] for name in names], dim=-1)


class TeacherDraws(NamedTuple):
    """What is known of a teacher by classes drawn from it at temperature 1 and its scalars, at n positions.

    Attributes:
        class_ids: int64 [n, C].
        counts: [n, C], how often each class was drawn; rows are padded with count 0.
        entropy: H(p), [n].
        cross_entropy: -log p(y), [n].
    """

    class_ids: Tensor
    counts: Tensor
    entropy: Tensor
    cross_entropy: Tensor

    def at(self, rows: slice) -> TeacherDraws:
        """Those of some of the positions."""
        return TeacherDraws(*(values[rows] for values in self))


def statistics_of_draws(names: Sequence[str], student_logits: Tensor, teacher: TeacherDraws, targets: Tensor) -> Tensor:
    """Statistics of n positions, [n, len(names)], as ``statistics`` gives them, from a teacher's draws and scalars.

    ``kl`` is an estimate, -H(p) - sum_v w(v) log q(v) with w the share of the draws. Its expectation over the draws is
    KL(p || q), so by chance it may be negative; all others are exact. The logits are overwritten.
    """
    dtype = student_logits.dtype
    values = {"teacher_entropy": teacher.entropy.to(dtype), "teacher_ce": teacher.cross_entropy.to(dtype)}
    if not OF_TEACHER.issuperset(names):
        log_q = log_softmax_(student_logits)
        values |= _of_one_model(set(names), "student", "", log_q, None, targets.unsqueeze(-1))
        if "kl" in names:
            weights = teacher.counts.to(dtype)
            weights = weights / weights.sum(dim=-1, keepdim=True).clamp(min=1)
            drawn = torch.linalg.vecdot(weights, log_q.gather(-1, teacher.class_ids.long()))
            values["kl"] = -values["teacher_entropy"] - drawn
    return torch.stack([values[name] for name in names], dim=-1)


def _of_one_model(
    names: set[str], model: str, divergence: str, log: Tensor | None, other: Tensor | None, index: Tensor
) -> dict[str, Tensor]:
    """Those of the statistics ``names`` that are expectations under one model's distribution, and its cross-entropy.

    Args:
        model: ``student`` or ``teacher``.
        divergence: the name of the KL from this model's distribution to the other's.
        log, other: log-probabilities [n, V] of this model and of the other; None if ``names`` do not need them.
        index: the targets, [n, 1].
    """
    values: dict[str, Tensor] = {}
    if log is None:
        return values
    if f"{model}_ce" in names:
        values[f"{model}_ce"] = -log.gather(-1, index).squeeze(-1)
    if {f"{model}_entropy", divergence} & names:
        probabilities = log.exp()
        if f"{model}_entropy" in names:
            values[f"{model}_entropy"] = torch.linalg.vecdot(probabilities, log).neg().clamp_(min=0)
        if divergence in names and other is not None:
            values[divergence] = torch.linalg.vecdot(probabilities, log - other)
    return values
