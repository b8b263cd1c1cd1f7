"""Selective distillation on one page: score, select, compare at the selected positions, sum.

    l_it   = lambda * D(p_it, q_it) + (1 - lambda) * CE(y_it, q_it)
    loss_i = sum_t a_it * l_it
    loss   = mean of loss_i over the counted samples of the whole optimiser step

Shapes: B batch, T positions, N selected positions, n of a chunk, V classes, D hidden.
"""

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from selkd.maths.chunked import chunked_entropy, chunked_loss, compute_dtype
from selkd.maths.divergence import ValueAndGradient, cross_entropy, forward_kl, sampled_forward_kl
from selkd.maths.head import Head
from selkd.recipe import CriterionOptions, PositionOptions
from selkd.selection.noise import position_uniforms
from selkd.selection.positions import counts_of, select
from selkd.teacher import Batch, FullDistribution, PickedTargets, Target, TeacherTargets


class Budget(NamedTuple):
    """Samples with a valid position, valid positions, and positions that are picked."""

    samples: int
    valid: int
    selected: int


@dataclass(frozen=True)
class Objective:
    """What a recipe says about the loss. One instance serves a whole run."""

    criterion: CriterionOptions
    positions: PositionOptions
    seed: int

    def budget(self, valid_mask: Tensor) -> Budget:
        """What a batch with ``valid_mask`` [B, T] counts for, known before the forward pass."""
        n_valid = valid_mask.sum(dim=-1)
        selected = n_valid if self.positions.fraction is None else counts_of(self.positions.fraction, n_valid)
        return Budget(samples=int((n_valid > 0).sum()), valid=int(n_valid.sum()), selected=int(selected.sum()))

    def normaliser(self, step_budget: Budget) -> int:
        """What the loss of a whole optimiser step is divided by: counted samples, or picked positions."""
        return step_budget.samples if self.positions.reduction == "per_sample" else step_budget.selected

    def __call__(
        self,
        hidden_states: Tensor,
        head: Head,
        batch: Batch,
        teacher: TeacherTargets,
        *,
        step: int,
        normaliser: Tensor | int,
    ) -> dict[str, Tensor]:
        """The share of one micro-batch in the step's loss, with what was selected.

        Args:
            hidden_states: [B, T, D], the student's, with gradient.
            head: the student's head over the classes that it shares with the teacher.
            batch: of ``selkd.data.batching.collate``.
            teacher: the targets of the same batch.
            step: the optimiser step.
            normaliser: of the whole step, all its micro-batches and ranks.

        Returns:
            ``loss``, a scalar with gradient, and detached sums for logging: ``divergence_nats`` and
            ``cross_entropy_nats`` (the latter if it is in the criterion) over the selected positions;
            ``selected_entropy_nats`` and ``entropy_nats`` over the selected and the valid ones (if entropy is the
            metric).
        """
        valid_mask = batch["valid_mask"]
        valid = valid_mask.flatten().nonzero().flatten()
        flat_hidden = hidden_states.flatten(0, 1)
        with torch.no_grad():
            narrow_head = head.to(compute_dtype(hidden_states))

        scores = self._scores(flat_hidden, narrow_head, batch, valid, step)
        coefficients = select(self.positions.policy, scores, valid_mask, self.positions.fraction).flatten()
        picked = coefficients.nonzero().flatten()
        weights = coefficients[picked]
        if self.positions.reduction == "per_position":
            weights = torch.ones_like(weights)

        comparison = _Comparison(self.criterion, teacher.at(picked), batch["targets"].flatten()[picked])
        total, _ = chunked_loss(flat_hidden[picked], head, weights, comparison, narrow_head=narrow_head)
        result = {
            "loss": total / max(1, int(normaliser)),
            **comparison.sums,
        }
        if self.positions.metric == "student_entropy":
            result["selected_entropy_nats"] = scores.flatten()[picked].sum()
            result["entropy_nats"] = scores.flatten()[valid].sum()
        return result

    def _scores(self, flat_hidden: Tensor, head: Head, batch: Batch, valid: Tensor, step: int) -> Tensor:
        """The metric's values [B, T], detached; zeros for a policy that needs none."""
        valid_mask = batch["valid_mask"]
        if self.positions.policy == "random":
            ids, mask = batch["sample_ids"].cpu().numpy(), valid_mask.cpu().numpy()
            return torch.from_numpy(position_uniforms(self.seed, ids, mask, "positions", step)).to(flat_hidden.device)
        if self.positions.metric is None:
            return torch.zeros(valid_mask.shape, device=flat_hidden.device)
        entropies = chunked_entropy(flat_hidden.detach()[valid], head)
        return entropies.new_zeros(valid_mask.numel()).index_copy_(0, valid, entropies).view(valid_mask.shape)


class _Comparison:
    """The criterion at the selected positions, a chunk at a time; keeps the sums that are logged."""

    def __init__(self, criterion: CriterionOptions, teacher: PickedTargets, targets: Tensor) -> None:
        self.criterion = criterion
        self.teacher = teacher
        self.targets = targets
        self.sums = {"divergence_nats": torch.zeros((), device=targets.device)}
        if criterion.kd_weight < 1:
            self.sums["cross_entropy_nats"] = torch.zeros_like(self.sums["divergence_nats"])

    def __call__(self, student_logits: Tensor, rows: slice) -> ValueAndGradient:
        weight, temperature = self.criterion.kd_weight, self.criterion.temperature
        if weight < 1:
            text_values, text_gradient = cross_entropy(student_logits.clone(), self.targets[rows])
            self.sums["cross_entropy_nats"] += text_values.sum()
        values, gradient = _divergence(student_logits, self.teacher.chunk(rows), temperature)
        self.sums["divergence_nats"] += values.sum()
        factor = weight * (temperature**2 if self.criterion.temperature_squared else 1.0)
        if factor != 1.0:
            values, gradient = values * factor, gradient.mul_(factor)
        if weight < 1:
            values, gradient = values + (1 - weight) * text_values, gradient.add_(text_gradient, alpha=1 - weight)
        return values, gradient


def _divergence(student_logits: Tensor, target: Target, temperature: float) -> ValueAndGradient:
    if isinstance(target, FullDistribution):
        return forward_kl(student_logits, target.logits, temperature)
    return sampled_forward_kl(student_logits, target.class_ids, target.counts, temperature)
