"""Selective distillation on one page: score, select, compare at the selected positions, sum.

    l_it   = lambda * D(p_it, q_it) + (1 - lambda) * CE(y_it, q_it)
    loss_i = sum_t a_it * l_it
    loss   = mean of loss_i over the counted samples of the whole optimiser step

Shapes: B batch, T positions, N selected positions, n of a chunk, V classes, D hidden.
"""

from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from selkd.maths.chunked import chunked_loss, compute_dtype, wide
from selkd.maths.finite import require_finite
from selkd.maths.head import Head
from selkd.recipe.choices import CriterionOptions, PositionOptions
from selkd.selection.position_scores import PositionScores, choose_positions, score_positions
from selkd.selection.positions import StepContext, counts_of, eligible
from selkd.selection.two_stage import Estimator, score_in_two_stages
from selkd.teacher.targets import Batch, TeacherTargets
from selkd.training.criterion import Comparison

AGREEMENT_EVERY = 50  # optimiser steps between two measurements of two-stage against exact selection


class Budget(NamedTuple):
    """What a step counts for: samples with an eligible position, valid positions, and ceil(k*n) summed."""

    samples: int
    valid: int
    selected: int


@dataclass(frozen=True)
class Objective:
    """What a recipe says about the loss. One instance serves a whole run.

    ``classes_by_frequency``: class ids [V], the most frequent of the training text first, for two-stage scoring.
    """

    criterion: CriterionOptions
    positions: PositionOptions
    seed: int
    classes_by_frequency: np.ndarray | None = None

    def budget(self, batch: Batch, context: StepContext) -> Budget:
        """What a batch counts for, known before the forward pass."""
        n_valid = eligible(self.positions, batch["valid_mask"], batch["position_ids"]).sum(dim=-1)
        selected = n_valid if context.fraction is None else counts_of(context.fraction, n_valid)
        return Budget(
            samples=int((n_valid > 0).sum()), valid=int(batch["valid_mask"].sum()), selected=int(selected.sum())
        )

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
        context: StepContext,
        normaliser: Tensor | int,
    ) -> dict[str, Tensor]:
        """The share of one micro-batch in the step's loss, with what was selected.

        Args:
            hidden_states: [B, T, D], the student's, with gradient.
            head: the student's head over the classes that it shares with the teacher.
            batch: of ``selkd.data.collate.collate``.
            teacher: the targets of the same batch.
            context: where in the run the step is.
            normaliser: of the whole step, all its micro-batches and ranks.

        Returns:
            ``loss``, a scalar with gradient; ``scores`` [B, T], detached; and detached sums for logging:
            ``positions_selected``; over the selected positions ``divergence_nats``, ``cross_entropy_nats`` (if it is
            in the criterion) and ``selected_score``, over the valid ones ``valid_score`` (of exact scoring); the same
            of the student's entropy (``selected_entropy_nats``, ``valid_entropy_nats``) if the metric is made of it;
            on some steps of two-stage scoring, of its float32 selection, how much of it is exact selection's
            (``agreeing_positions`` of ``compared_positions``).

        Raises:
            RunError: a logit is not finite; the sample and position are named.
        """
        valid_mask = batch["valid_mask"]
        valid = valid_mask.flatten().nonzero().flatten()
        flat_hidden = hidden_states.flatten(0, 1)
        with torch.no_grad():
            compute_head = head.to(compute_dtype(hidden_states))

        scored = self.score(hidden_states.detach(), compute_head, batch, teacher, context)
        if scored.statistics:
            of_all = torch.stack([each.flatten()[valid] for each in scored.statistics.values()])
            what = f"positions.metric: {self.positions.metric}, of the student's or the teacher's logits"
            require_finite(of_all.sum(dim=0), valid, batch, f"{what} {_before(context)}")
        coefficients = choose_positions(self.positions, scored.values, batch, context, seed=self.seed).flatten()
        picked = coefficients.nonzero().flatten()
        weights = coefficients[picked]
        if self.positions.reduction == "per_position":
            weights = torch.ones_like(weights)

        sample_of = picked // valid_mask.shape[1]
        targets = batch["targets"].flatten()[picked]
        comparison = Comparison(self.criterion, teacher.at(picked), targets, sample_of, head.vocab_size)
        weights = weights / max(1, int(normaliser))
        total, values = chunked_loss(flat_hidden[picked], head, weights, comparison, compute_head=compute_head)
        what = f"criterion.name: {self.criterion.name}, of the student's or the teacher's logits"
        require_finite(values, picked, batch, f"{what} {_before(context)}")

        sums = {"positions_selected": torch.tensor(len(picked), device=values.device), **comparison.sums}
        logged = {"score": scored.values} if scored.statistics else {}
        if "student_entropy" in scored.statistics:
            logged["entropy_nats"] = scored.statistics["student_entropy"]
        for name, each in logged.items():
            sums[f"selected_{name}"] = each.flatten()[picked].sum()
            if self.positions.scoring == "exact":  # else those of the other positions are estimates
                sums[f"valid_{name}"] = each.flatten()[valid].sum()
        if self.positions.scoring == "two_stage" and total.requires_grad and context.step % AGREEMENT_EVERY == 0:
            sums |= self.agreement(hidden_states.detach(), head, batch, context)
        return {"loss": total, "scores": scored.values, **sums}

    def score(
        self, hidden_states: Tensor, head: Head, batch: Batch, teacher: TeacherTargets | None, context: StepContext
    ) -> PositionScores:
        """The scores of a batch, in the dtype of ``head``."""
        options = self.positions
        if options.scoring == "two_stage":
            ordered = self.classes_by_frequency
            assert ordered is not None, "two-stage scoring is given the classes in the order of their frequency"
            estimate = Estimator(options, torch.as_tensor(ordered, device=hidden_states.device), self.seed)
            return score_in_two_stages(estimate, hidden_states, head, batch, context)
        logits = None
        if teacher is not None and options.needs_teacher:
            logits = teacher.at(batch["valid_mask"].flatten().nonzero().flatten()).logits
        return score_positions(options.metric, hidden_states, head, batch, logits, (self.seed, context.step))

    @torch.no_grad()
    def agreement(self, hidden_states: Tensor, head: Head, batch: Batch, context: StepContext) -> dict[str, Tensor]:
        """How many positions exact selection picks (``compared_positions``), and how many of them this scoring does.

        Both in float32 at the same hidden states [B, T, D], so that rounding decides nothing.
        """
        hidden = wide(hidden_states)
        exact_head = head.to(hidden.dtype)
        of_all = score_positions(self.positions.metric, hidden, exact_head, batch, None)
        found, exact = (
            choose_positions(self.positions, scored.values, batch, context, seed=self.seed) > 0
            for scored in (self.score(hidden, exact_head, batch, None, context), of_all)
        )
        return {"agreeing_positions": (found & exact).sum(), "compared_positions": exact.sum()}


def _before(context: StepContext) -> str:
    return f"at optimiser step {context.step}, before its update"
