"""The criterion at the selected positions, a chunk at a time: lambda * D + (1 - lambda) * CE.

Shapes: N selected positions, n of a chunk, V classes.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from selkd.maths.chunked import chunk_size, chunks
from selkd.maths.divergence import (
    ValueAndGradient,
    cross_entropy,
    differentiated,
    log_softmax_,
    sampled_forward_kl,
    truncated_forward_kl,
)
from selkd.plugins import Criterion
from selkd.recipe.choices import CriterionOptions
from selkd.teacher.targets import DrawnClasses, FullDistribution, PickedTargets, TruncatedDistribution

KL_STRIDE = 4  # of the positions of a criterion that is not KL itself, one in so many is compared by it, too


class Comparison:
    """Compares teacher and student at the N selected positions of a micro-batch; ``chunked_loss`` calls it.

    Args:
        options: the criterion.
        teacher: the teacher's targets at the N positions.
        targets: the true next tokens, int64 [N].
        sample_of: the batch row of each position, int64 [N].
        vocab_size: V.

    Attributes:
        sums: ``divergence_nats`` and ``cross_entropy_nats``, those that are part of the criterion, for logging; and
            where it can be had, ``kl_nats``, KL(p || q) at temperature 1, with ``kl_positions``, of how many. Of drawn
            classes it is an unbiased estimate; of a truncated teacher, or draws at another temperature, it can't be
            had. Where the criterion is another one, every fourth position is measured.
    """

    def __init__(
        self, options: CriterionOptions, teacher: PickedTargets, targets: Tensor, sample_of: Tensor, vocab_size: int
    ) -> None:
        self.options = options
        self.teacher = teacher
        self.targets = targets
        self.vocab_size = vocab_size
        criterion = Criterion.find(options.name)
        self.compare: Callable[..., ValueAndGradient] = criterion.function
        if criterion.is_own:
            self.compare = differentiated(criterion.values, f"{criterion.key}: {criterion.name}")
        self.weights: dict[str, float | Tensor] = {name: getattr(options, name) for name in criterion.options}
        if criterion.position_weights is not None and options.kd_weight > 0:
            self.weights |= criterion.position_weights(self._teacher_log_p(), sample_of)
        is_part = {"divergence_nats": options.kd_weight > 0, "cross_entropy_nats": options.kd_weight < 1}
        self.sums = {name: torch.zeros((), device=targets.device) for name, is_used in is_part.items() if is_used}
        if options.kd_weight > 0 and teacher.knows_kl:  # on every rank alike, also where it has no position
            self.sums |= {name: torch.zeros((), device=targets.device) for name in ("kl_nats", "kl_positions")}

    def __call__(self, student_logits: Tensor, rows: slice) -> ValueAndGradient:
        """Values [n], and the gradient of their sum, [n, V], at the student logits [n, V], which are overwritten."""
        weight, temperature = self.options.kd_weight, self.options.temperature
        if weight < 1:
            logits = student_logits.clone() if weight > 0 else student_logits
            text_values, text_gradient = cross_entropy(logits, self.targets[rows])
            self.sums["cross_entropy_nats"] += text_values.sum()
        if weight == 0:  # the teacher is not asked
            return text_values, text_gradient
        values, gradient = self._divergence(student_logits, rows)
        self.sums["divergence_nats"] += values.sum()
        factor = weight * (temperature**2 if self.options.temperature_squared else 1.0)
        if factor != 1.0:
            values, gradient = values * factor, gradient.mul_(factor)
        if weight < 1:
            values, gradient = values + (1 - weight) * text_values, gradient.add_(text_gradient, alpha=1 - weight)
        return values, gradient

    def _divergence(self, student_logits: Tensor, rows: slice) -> ValueAndGradient:
        """D at the criterion's temperature, and its gradient in the undivided logits."""
        target, temperature = self.teacher.chunk(rows), self.options.temperature
        is_kl = self.options.name == "forward_kl" and temperature == 1.0
        if isinstance(target, FullDistribution) and not is_kl:
            every = slice(-rows.start % KL_STRIDE, None, KL_STRIDE)
            self._add_kl(_kl(student_logits[every], target.logits[every]))
        if temperature != 1.0:
            student_logits.div_(temperature)
        if isinstance(target, DrawnClasses):  # they were drawn at this temperature
            values, gradient = sampled_forward_kl(student_logits, target.class_ids, target.counts)
            if target.entropy is not None:
                w = target.counts / target.counts.sum(dim=-1, keepdim=True)
                # The value less the drawn target's own negative entropy is its cross-entropy with the student.
                self._add_kl(values - torch.xlogy(w, w).sum(dim=-1) - target.entropy)
        elif isinstance(target, TruncatedDistribution):  # at this temperature, too
            values, gradient = truncated_forward_kl(student_logits, target.class_ids, target.log_probabilities)
        else:
            weights = {name: w[rows] if isinstance(w, Tensor) else w for name, w in self.weights.items()}
            teacher_logits = target.logits.div_(temperature) if temperature != 1.0 else target.logits
            values, gradient = self.compare(student_logits, teacher_logits, self.targets[rows], **weights)
            if is_kl:
                self._add_kl(values)
        return values, gradient.div_(temperature) if temperature != 1.0 else gradient

    def _add_kl(self, values: Tensor) -> None:
        self.sums["kl_nats"] += values.sum()
        self.sums["kl_positions"] += len(values)

    @torch.no_grad()
    def _teacher_log_p(self) -> Tensor:
        """The teacher's log p(y) at the criterion's temperature, [N]."""
        parts = []
        for rows in chunks(len(self.targets), chunk_size(self.vocab_size, self.targets.device)):
            target = self.teacher.chunk(rows)
            assert isinstance(target, FullDistribution), "drawn classes go with forward KL alone"
            log_p = torch.log_softmax(target.logits / self.options.temperature, dim=-1)
            parts.append(log_p.gather(-1, self.targets[rows].unsqueeze(-1)).squeeze(-1))
        return torch.cat(parts) if parts else torch.zeros(0, device=self.targets.device)


def _kl(student_logits: Tensor, teacher_logits: Tensor) -> Tensor:
    """KL(p || q) at temperature 1, [n], of logits that stay as they are."""
    log_q, log_p = log_softmax_(student_logits.clone()), log_softmax_(teacher_logits.clone())
    return torch.linalg.vecdot(log_p.exp(), log_p - log_q)
