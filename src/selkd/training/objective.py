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

from selkd.finite import require_finite
from selkd.maths.chunked import chunked_loss, compute_dtype
from selkd.maths.head import Head
from selkd.recipe_choices import CriterionOptions, PositionOptions
from selkd.selection.positions import Place, counts_of, eligible
from selkd.selection.scores import choose_positions, score_positions
from selkd.teacher import Batch, TeacherTargets
from selkd.training.comparison import Comparison


class Budget(NamedTuple):
    """What a step counts for: samples with an eligible position, valid positions, and ceil(k*n) summed."""

    samples: int
    valid: int
    selected: int


@dataclass(frozen=True)
class Objective:
    """What a recipe says about the loss. One instance serves a whole run."""

    criterion: CriterionOptions
    positions: PositionOptions
    seed: int

    def budget(self, batch: Batch, place: Place) -> Budget:
        """What a batch counts for, known before the forward pass."""
        n_valid = eligible(self.positions, batch["valid_mask"], batch["position_ids"]).sum(dim=-1)
        selected = n_valid if place.fraction is None else counts_of(place.fraction, n_valid)
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
        place: Place,
        normaliser: Tensor | int,
    ) -> dict[str, Tensor]:
        """The share of one micro-batch in the step's loss, with what was selected.

        Args:
            hidden_states: [B, T, D], the student's, with gradient.
            head: the student's head over the classes that it shares with the teacher.
            batch: of ``selkd.data.batching.collate``.
            teacher: the targets of the same batch.
            place: where in the run the step is.
            normaliser: of the whole step, all its micro-batches and ranks.

        Returns:
            ``loss``, a scalar with gradient; ``scores`` [B, T], detached; and detached sums for logging:
            ``positions_selected``; over the selected positions ``divergence_nats``, ``cross_entropy_nats`` (if it is
            in the criterion) and ``selected_score``, over the valid ones ``valid_score``; the same of the student's
            entropy (``selected_entropy_nats``, ``valid_entropy_nats``) if the metric is made of it.

        Raises:
            RunError: a logit is not finite; the sample and position are named.
        """
        valid_mask = batch["valid_mask"]
        valid = valid_mask.flatten().nonzero().flatten()
        flat_hidden = hidden_states.flatten(0, 1)
        with torch.no_grad():
            narrow_head = head.to(compute_dtype(hidden_states))

        scored = score_positions(
            self.positions.metric, hidden_states.detach(), narrow_head, batch, teacher, seed=self.seed, step=place.step
        )
        if scored.statistics:
            of_all = torch.stack([each.flatten()[valid] for each in scored.statistics.values()])
            what = f"positions.metric: {self.positions.metric}, of the student's or the teacher's logits"
            require_finite(of_all.sum(dim=0), valid, batch, f"{what} {_before(place)}")
        coefficients = choose_positions(self.positions, scored.values, batch, place, seed=self.seed).flatten()
        picked = coefficients.nonzero().flatten()
        weights = coefficients[picked]
        if self.positions.reduction == "per_position":
            weights = torch.ones_like(weights)

        sample_of = picked // valid_mask.shape[1]
        targets = batch["targets"].flatten()[picked]
        comparison = Comparison(self.criterion, teacher.at(picked), targets, sample_of, head.n_classes)
        total, values = chunked_loss(flat_hidden[picked], head, weights, comparison, narrow_head=narrow_head)
        what = f"criterion.name: {self.criterion.name}, of the student's or the teacher's logits"
        require_finite(values, picked, batch, f"{what} {_before(place)}")

        sums = {"positions_selected": torch.tensor(len(picked), device=values.device), **comparison.sums}
        logged = {"score": scored.values} if scored.statistics else {}
        if "student_entropy" in scored.statistics:
            logged["entropy_nats"] = scored.statistics["student_entropy"]
        for name, each in logged.items():
            sums[f"selected_{name}"], sums[f"valid_{name}"] = each.flatten()[picked].sum(), each.flatten()[valid].sum()
        return {"loss": total / max(1, int(normaliser)), "scores": scored.values, **sums}


def _before(place: Place) -> str:
    return f"at optimiser step {place.step}, before its update"
