"""One optimiser step without an optimiser: its loss and gradients, cut into micro-batches as one likes."""

from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from selkd.data.collate import collate
from selkd.data.samples import Sample
from selkd.models.head import head_of
from selkd.recipe.choices import ClassOptions, CriterionOptions, PositionOptions
from selkd.selection.positions import step_context
from selkd.teacher.live import LiveTeacher
from selkd.training.objective import Objective
from selkd.training.student import bind_distillation

SEED = 11


def own_logits(model: PreTrainedModel, batch: dict[str, Tensor]) -> Tensor:
    """What the model's own forward pass gives; a key-value cache would join packed documents."""
    return model(input_ids=batch["input_ids"], position_ids=batch["position_ids"], use_cache=False).logits


def gradients_of(model: nn.Module) -> dict[str, Tensor]:
    """Zeros where a parameter had no part."""
    return {
        name: torch.zeros_like(p) if p.grad is None else p.grad.detach().clone() for name, p in model.named_parameters()
    }


def assert_gradients(actual: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    """Equal, in each parameter, to what float32 sums keep of its largest value."""
    assert actual.keys() == expected.keys()
    for name, gradient in expected.items():
        tolerance = 2e-5 * gradient.abs().max().item() + 1e-7
        torch.testing.assert_close(
            actual[name], gradient, rtol=0, atol=tolerance, msg=lambda m, name=name: f"{name}: {m}"
        )


def take_step(
    student: PreTrainedModel,
    teacher: PreTrainedModel,
    micro_batches: Sequence[Sequence[Sample]],
    recipe: dict[str, Any],
    **collated: Any,
) -> float:
    """The loss of the step of ``micro_batches``; its gradients are left in ``student``.

    Args:
        collated: how each micro-batch is padded, as for ``collate``; a sequence gives each its own.
    """
    objective = Objective(
        CriterionOptions.model_validate(recipe.get("criterion", {})),
        PositionOptions.model_validate(recipe.get("positions", {})),
        SEED,
    )
    vocab_size = min(head_of(student).vocab_size, head_of(teacher).vocab_size)
    live = LiveTeacher(teacher, ClassOptions.model_validate({}), objective.criterion.temperature, SEED, vocab_size)
    if "forward" not in vars(student):
        bind_distillation(student, vocab_size)
    batches = [
        collate(samples, **{name: v[i] if isinstance(v, list) else v for name, v in collated.items()})
        for i, samples in enumerate(micro_batches)
    ]
    context = step_context(objective.positions, 0, 1)
    normaliser = sum(objective.normaliser(batch, context) for batch in batches)
    student.zero_grad(set_to_none=True)
    total = 0.0
    for batch in batches:
        loss = partial(
            objective,
            batch=batch,
            teacher=live.targets(batch, 0),
            context=context,
            normaliser=normaliser,
        )
        share = student(input_ids=batch["input_ids"], position_ids=batch["position_ids"], distillation=loss)["loss"]
        share.backward()
        total += share.item()
    return total
