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
    sampled_forward_kl,
    truncated_forward_kl,
)
from selkd.plugins import Criterion
from selkd.recipe.choices import CriterionOptions
from selkd.teacher.targets import DrawnClasses, FullDistribution, PickedTargets, TruncatedDistribution


class Comparison:
    """Compares teacher and student at the N selected positions of a micro-batch; ``chunked_loss`` calls it.

    Args:
        options: the criterion.
        teacher: the teacher's targets at the N positions.
        targets: the true next tokens, int64 [N].
        sample_of: the batch row of each position, int64 [N].
        vocab_size: V.

    Attributes:
        sums: ``divergence_nats`` and ``cross_entropy_nats``, those that are part of the criterion, for logging.
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
        if temperature != 1.0:
            student_logits.div_(temperature)
        if isinstance(target, DrawnClasses):  # they were drawn at this temperature
            values, gradient = sampled_forward_kl(student_logits, target.class_ids, target.counts)
        elif isinstance(target, TruncatedDistribution):  # at this temperature, too
            values, gradient = truncated_forward_kl(student_logits, target.class_ids, target.log_probabilities)
        else:
            weights = {name: w[rows] if isinstance(w, Tensor) else w for name, w in self.weights.items()}
            teacher_logits = target.logits.div_(temperature) if temperature != 1.0 else target.logits
            values, gradient = self.compare(student_logits, teacher_logits, self.targets[rows], **weights)
        return values, gradient.div_(temperature) if temperature != 1.0 else gradient

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
