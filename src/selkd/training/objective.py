"""Selective distillation on one page: score, select, compare at the selected positions, sum.

    l_it   = lambda * D(p_it, q_it) + (1 - lambda) * CE(y_it, q_it)
    loss_i = sum_t a_it * l_it
    loss   = mean of loss_i over the counted samples of the whole optimiser step

D is the criterion's divergence, CE the cross-entropy with the text, a_it the coefficient of the policy.

Shapes: B batch, T positions, V classes, D hidden.
"""

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from selkd.maths.chunked import chunked_loss, compute_dtype, wide
from selkd.maths.finite import FiniteCheck, require_all_finite
from selkd.maths.head import Head, NarrowHead
from selkd.plugins import Policy
from selkd.recipe.choices import CriterionOptions, PositionOptions
from selkd.selection.host import on_host, to_device, valid_index
from selkd.selection.position_scores import PositionScores, choose_positions, chosen_index, score_positions
from selkd.selection.positions import StepContext, counts_at, eligible
from selkd.selection.two_stage import Estimator, score_in_two_stages
from selkd.teacher.targets import Batch, TeacherTargets
from selkd.training.criterion import Comparison

PLACED = ("scores", "coefficients", "values")  # outputs of the shape [B, T]; the others but the loss are sums
AGREEMENT_EVERY = 50  # optimiser steps between two comparisons of two-stage with exact selection


@dataclass(frozen=True)
class Objective:
    """The loss that a recipe describes. One instance serves a whole run.

    Attributes:
        criterion: how teacher and student are compared.
        positions: which positions count, and how much.
        seed: the run's seed.
        classes_by_frequency: class ids [V], the most frequent of the training text first; two-stage scoring needs them.
        narrow: keeps the head in the dtype of the products from one micro-batch of a step to the next, until its owner
            has it forget it; None: each makes its own.
    """

    criterion: CriterionOptions
    positions: PositionOptions
    seed: int
    classes_by_frequency: np.ndarray | None = None
    narrow: NarrowHead | None = None

    @property
    def needs_teacher(self) -> bool:
        """Whether the teacher is asked for anything: with ``kd_weight: 0`` the text alone teaches."""
        return self.criterion.kd_weight > 0 or self.positions.needs_teacher

    def normaliser(self, batch: Batch, context: StepContext) -> int:
        """A batch's share in what divides the loss of a whole optimiser step, known before the forward pass: its number
        of samples that have an eligible position, or of positions to select.
        """
        n_valid = eligible(self.positions, on_host(batch)).sum(dim=-1)
        if self.positions.reduction == "per_sample":
            return int((n_valid > 0).sum())
        return int(counts_at(context, n_valid).sum())

    def __call__(
        self,
        hidden_states: Tensor,
        head: Head,
        batch: Batch,
        teacher: TeacherTargets,
        *,
        context: StepContext,
        normaliser: Tensor | float,
    ) -> dict[str, Any]:
        """The part of one micro-batch in the loss of its optimiser step, and the sums that are logged.

        Args:
            hidden_states: the student's, [B, T, D], with gradient.
            head: the student's head over the classes that it shares with the teacher.
            batch: a batch of ``selkd.data.collate.collate``.
            teacher: the teacher's targets for that batch.
            context: where in the run the step is.
            normaliser: the sum of ``normaliser`` over all the step's micro-batches and ranks.

        Returns:
            ``loss``, a scalar with gradient; detached [B, T], 0 elsewhere, ``scores`` at the valid positions, and
            ``coefficients`` and ``values`` (nats) at the selected ones; ``checks``, whether the logits were finite,
            which the caller reads before the update; and detached sums for logging: ``positions_selected``; over the
            selected positions ``divergence_nats``, ``cross_entropy_nats`` (if the criterion has it) and
            ``selected_score``; over the valid positions ``valid_score`` (if scoring is exact); the same two of the
            student's entropy, ``selected_entropy_nats`` and ``valid_entropy_nats``, if the metric uses it; on some
            steps of two-stage scoring ``agreeing_positions`` and ``compared_positions``.
        """
        valid_mask, valid = batch["valid_mask"], valid_index(batch)
        checks: list[FiniteCheck] = []
        when = f"of the student's or the teacher's logits at optimiser step {context.step}, before its update"
        dtype = compute_dtype(hidden_states)
        narrow = self.narrow if self.narrow is not None and torch.is_grad_enabled() else NarrowHead()
        with torch.no_grad():
            compute_head = narrow.of(head, dtype, context.step)

        # Score every valid position.
        scored = self.score(hidden_states.detach(), compute_head, batch, teacher, context)
        if scored.statistics:
            statistics = torch.stack([values.flatten()[valid] for values in scored.statistics.values()])
            source = f"positions.metric: {self.positions.metric}, {when}"
            checks.append(FiniteCheck.of(statistics.sum(dim=0), valid, batch, source))
            if Policy.find(self.positions.policy).is_own:  # a user's function must not get what is not finite
                require_all_finite(checks)

        # Select the positions that count.
        coefficients = choose_positions(self.positions, scored.values, batch, context, seed=self.seed)
        selected = chosen_index(self.positions, coefficients, batch, context)
        weights = coefficients.flatten()[selected]
        if self.positions.reduction == "per_position":
            weights = torch.ones_like(weights)
        weights = weights / (normaliser.clamp(min=1) if isinstance(normaliser, Tensor) else max(1, normaliser))

        # Compare teacher and student there, and sum.
        sample_of = selected // valid_mask.shape[1]
        targets = batch["targets"].flatten()[selected]
        comparison = Comparison(self.criterion, teacher.at(selected), targets, sample_of, head.vocab_size)
        hidden = hidden_states.flatten(0, 1)[selected]
        loss, values = chunked_loss(hidden, head, weights, comparison, compute_head=compute_head)
        source = f"criterion.name: {self.criterion.name}, {when}"
        checks += [*teacher.checks, FiniteCheck.of(values, selected, batch, source)]

        sums = {"positions_selected": torch.full((), len(selected), device=values.device), **comparison.sums}
        sums |= self._score_sums(scored, selected, valid)
        if self.positions.scoring == "two_stage" and loss.requires_grad and context.step % AGREEMENT_EVERY == 0:
            sums |= self.agreement(hidden_states.detach(), head, batch, context)
        placed = {
            "coefficients": coefficients,
            "values": values.new_zeros(valid_mask.numel()).index_copy(0, selected, values).view(valid_mask.shape),
        }
        return {"loss": loss, "scores": scored.values, "checks": checks, **placed, **sums}

    def score(
        self, hidden_states: Tensor, head: Head, batch: Batch, teacher: TeacherTargets | None, context: StepContext
    ) -> PositionScores:
        """The scores of a batch, in the dtype of ``head``."""
        options = self.positions
        if options.scoring == "two_stage":
            assert self.classes_by_frequency is not None, "two-stage scoring needs classes_by_frequency"
            ordered = to_device(torch.as_tensor(self.classes_by_frequency), hidden_states.device)
            return score_in_two_stages(Estimator(options, ordered, self.seed), hidden_states, head, batch, context)
        side = None
        if teacher is not None and options.needs_teacher:
            side = teacher.at(valid_index(batch)).scored_by()
        return score_positions(options.metric, hidden_states, head, batch, side, (self.seed, context.step))

    def _score_sums(self, scored: PositionScores, selected: Tensor, valid: Tensor) -> dict[str, Tensor]:
        """The sums of the scores over the selected positions and, if scoring is exact, over the valid ones."""
        logged = {"score": scored.values} if scored.statistics else {}
        if "student_entropy" in scored.statistics:
            logged["entropy_nats"] = scored.statistics["student_entropy"]
        sums = {}
        for name, values in logged.items():
            sums[f"selected_{name}"] = values.flatten()[selected].sum()
            if self.positions.scoring == "exact":  # two-stage scoring only estimates most of the others
                sums[f"valid_{name}"] = values.flatten()[valid].sum()
        return sums

    @torch.no_grad()
    def agreement(self, hidden_states: Tensor, head: Head, batch: Batch, context: StepContext) -> dict[str, Tensor]:
        """How far two-stage selection agrees with exact selection at the hidden states [B, T, D].

        Both compute in float32, so that rounding makes no difference.

        Returns:
            ``compared_positions``, how many positions exact selection takes, and ``agreeing_positions``, how many of
            these two-stage selection takes, too.
        """
        hidden = wide(hidden_states)
        wide_head = head.to(hidden.dtype)
        two_stage, exact = (
            choose_positions(self.positions, scored.values, batch, context, seed=self.seed) > 0
            for scored in (
                self.score(hidden, wide_head, batch, None, context),
                score_positions(self.positions.metric, hidden, wide_head, batch, None),
            )
        )
        return {"agreeing_positions": (two_stage & exact).sum(), "compared_positions": exact.sum()}
