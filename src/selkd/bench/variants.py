"""The variants of a step: each runs forward and backward over the same batch and keeps no gradient.

Shapes: B batch, T positions, N selected positions, V classes.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from selkd.bench.measure import Step
from selkd.bench.subject import BenchSubject
from selkd.maths.chunked import chunked_loss, chunks, compute_dtype, piece_size, wide
from selkd.maths.divergence import ValueAndGradient, cross_entropy, entropy
from selkd.maths.head import Head
from selkd.models.documents import documents_known
from selkd.models.head import hidden_states
from selkd.recipe.choices import ClassOptions, CriterionOptions, PositionOptions
from selkd.selection.host import on_host
from selkd.selection.position_scores import LogitsOf, choose_positions, chosen_index
from selkd.selection.positions import StepContext, select, step_context
from selkd.teacher.targets import FullDistribution, Teacher, TeacherTargets
from selkd.training.objective import Objective

DENSE_STUDENT = ("se_kd_dense_heads", "se_kd_dense_student_head")
DENSE_TEACHER = ("se_kd_dense_heads", "se_kd_dense_teacher_head")
SE_KD = {"metric": "student_entropy", "policy": "top_k", "fraction": 0.2}
EVERY_CLASS = ClassOptions.model_validate({"sampler": "all"})


def positions_of(name: str, subject: BenchSubject) -> PositionOptions | None:
    """The options by which a variant selects positions; None for those that select nothing."""
    if name in ("floor", "full_kd_plain", "cross_entropy_plain"):
        return None
    if name == "recipe":
        return subject.recipe.positions
    changes = {"full_kd": {"policy": "all"}, "se_kd_two_stage": {**SE_KD, "scoring": "two_stage"}}
    return PositionOptions.model_validate(changes.get(name, SE_KD))


def objective_of(
    subject: BenchSubject, positions: PositionOptions, criterion: CriterionOptions | None = None
) -> Objective:
    """The objective of a variant; forward KL unless ``criterion`` is given."""
    ordered = subject.classes_by_frequency if positions.scoring == "two_stage" else None
    return Objective(criterion or CriterionOptions(), positions, subject.recipe.seed, ordered)


def last_step(positions: PositionOptions) -> StepContext:
    """The run's last step, where a schedule has reached its end and no agreement is measured."""
    return step_context(positions, 1, 1)


def step_of(name: str, subject: BenchSubject) -> Step:
    """Load what the variant ``name`` needs, and return its step. No body asks the device about documents."""
    step, position_ids = _step_of(name, subject), on_host(subject.batch)["position_ids"]

    def known() -> None:
        with documents_known(position_ids):
            step()

    return known


def _step_of(name: str, subject: BenchSubject) -> Step:
    positions = positions_of(name, subject)
    inputs, student, teacher = subject.inputs, subject.student, subject.teacher

    def backward(loss: Tensor) -> None:
        loss.backward()
        student.zero_grad(set_to_none=True)

    def floor() -> None:
        with torch.no_grad():
            hidden_states(teacher, **inputs)
        with subject.autocast():
            loss = hidden_states(student, **inputs).float().mean()
        backward(loss)

    if name == "floor":
        return floor
    if name == "full_kd_plain":
        return lambda: backward(plain_loss(subject))
    if name == "cross_entropy_plain":
        return lambda: backward(plain_cross_entropy(subject))
    assert positions is not None
    is_recipe = name == "recipe"
    classes = subject.recipe.classes if is_recipe else EVERY_CLASS
    if name == "cross_entropy_chunked":
        return _on_text(subject, positions, backward)
    if name == "se_kd_cached" or (is_recipe and subject.recipe.cache is not None):
        supervision = subject.cached_teacher(classes)
    else:
        supervision = DenseTeacher(subject) if name in DENSE_TEACHER else subject.live_teacher(classes)
    if name in DENSE_STUDENT:
        return lambda: backward(_dense_student_loss(subject, positions, supervision))

    objective = objective_of(subject, positions, subject.recipe.criterion if is_recipe else None)
    context, batch = last_step(positions), subject.batch
    normaliser = objective.normaliser(batch, context)

    def selkd_step() -> None:
        targets = supervision.targets(batch, context.step)
        loss = partial(objective, batch=batch, teacher=targets, context=context, normaliser=normaliser)
        with subject.autocast():
            outputs = student(**inputs, distillation=loss)
        backward(outputs["loss"])

    return selkd_step


def plain_loss(subject: BenchSubject) -> Tensor:
    """The loss of most scripts: KL in float32 over both models' full logits at all positions."""
    vocab_size, inputs = subject.work.vocab_size, subject.inputs
    with torch.no_grad():
        teacher_logits = subject.teacher(**inputs, use_cache=False).logits[..., :vocab_size]
    with subject.autocast():
        student_logits = subject.student(**inputs, use_cache=False).logits[..., :vocab_size]
    return plain_kl(student_logits, teacher_logits)[subject.batch["valid_mask"]].mean()


def plain_cross_entropy(subject: BenchSubject) -> Tensor:
    """The loss of any training on text: cross-entropy in float32 over the student's full logits at all positions."""
    labels = subject.batch["targets"].masked_fill(~subject.batch["valid_mask"], -100)
    with subject.autocast():
        logits = subject.student(**subject.inputs, use_cache=False).logits[..., : subject.work.vocab_size]
    return torch.nn.functional.cross_entropy(logits.float().flatten(0, 1), labels.flatten())


def _on_text(subject: BenchSubject, positions: PositionOptions, backward: Callable[[Tensor], None]) -> Step:
    """``Objective`` with the text's tokens in place of a teacher: same scores, same positions, same chunks."""
    objective, context, batch = objective_of(subject, positions), last_step(positions), subject.batch
    normaliser = objective.normaliser(batch, context)

    def loss(hidden: Tensor, head: Head) -> dict[str, Tensor]:
        with torch.no_grad():
            narrow = head.to(compute_dtype(hidden))
        scores = objective.score(hidden.detach(), narrow, batch, None, context).values
        coefficients = choose_positions(positions, scores, batch, context, seed=objective.seed)
        selected = chosen_index(positions, coefficients, batch, context)
        targets = batch["targets"].flatten()[selected]

        def compare(logits: Tensor, rows: slice) -> ValueAndGradient:
            return cross_entropy(logits, targets[rows])

        weights = coefficients.flatten()[selected] / normaliser
        picked = hidden.flatten(0, 1)[selected]
        return {"loss": chunked_loss(picked, head, weights, compare, compute_head=narrow)[0]}

    def step() -> None:
        with subject.autocast():
            outputs = subject.student(**subject.inputs, distillation=loss)
        backward(outputs["loss"])

    return step


def plain_kl(student_logits: Tensor, teacher_logits: Tensor) -> Tensor:
    """Forward KL in nats, in float32, of logits [..., V] by plain torch: [...]."""
    log_q = torch.log_softmax(student_logits.float(), dim=-1)
    p = torch.softmax(teacher_logits.float(), dim=-1)
    return torch.nn.functional.kl_div(log_q, p, reduction="none").sum(dim=-1)


def _dense_student_loss(subject: BenchSubject, positions: PositionOptions, supervision: Teacher) -> Tensor:
    """Selection as in SE-KD, but from the student's full logits, which keep their gradient."""
    vocab_size, batch = subject.work.vocab_size, subject.batch
    targets = supervision.targets(batch, 0)
    with subject.autocast():
        student_logits = subject.student(**subject.inputs, use_cache=False).logits[..., :vocab_size]
    flat = student_logits.detach().flatten(0, 1)
    pieces = chunks(len(flat), piece_size(vocab_size, flat.device))
    entropies = [entropy(flat[rows].to(torch.float32, copy=True)) for rows in pieces]  # entropy overwrites its copy
    scores = torch.cat(entropies).view(student_logits.shape[:2])
    picked = select(positions, scores, batch["valid_mask"], last_step(positions)) > 0
    index = picked.flatten().nonzero().flatten()
    of_teacher = targets.at(index).chunk(slice(0, len(index)))
    assert isinstance(of_teacher, FullDistribution), "these variants compare every class"
    return plain_kl(student_logits[picked], of_teacher.logits).mean()


@dataclass(frozen=True)
class DenseTeacher:
    """A live teacher that computes its logits at all positions, and picks the selected positions afterwards."""

    subject: BenchSubject
    is_live = True
    has_kl = True

    @torch.no_grad()
    def targets(self, batch: dict[str, Tensor], step: int, *, for_loss: bool = True) -> TeacherTargets:  # noqa: ARG002
        inputs = {name: batch[name] for name in ("input_ids", "position_ids")}
        logits = self.subject.teacher(**inputs, use_cache=False).logits[..., : self.subject.work.vocab_size]
        return DenseTargets(logits.flatten(0, 1))


@dataclass(frozen=True)
class DenseTargets:
    """The teacher's logits [B * T, V], or [N, V] of the selected positions after ``at``."""

    all_logits: Tensor
    checks: tuple[()] = ()  # no classes are drawn
    knows_kl = True

    def at(self, index: Tensor) -> "DenseTargets":
        return DenseTargets(self.all_logits[index])

    def logits(self, rows: slice) -> Tensor:
        return wide(self.all_logits[rows].clone())

    def scored_by(self) -> LogitsOf:
        return self.logits

    def chunk(self, rows: slice) -> FullDistribution:
        return FullDistribution(self.logits(rows))
