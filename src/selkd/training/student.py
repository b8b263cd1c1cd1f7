"""The student's forward with the loss inside it, where DDP, FSDP2 and autocast see it."""

import functools
from collections.abc import Callable
from types import MethodType
from typing import Any

from torch import Tensor
from transformers import PreTrainedModel

from selkd.maths.head import Head
from selkd.models.head import head_of, hidden_states

Distillation = Callable[[Tensor, Head], dict[str, Tensor]]


def bind_distillation(model: PreTrainedModel, n_classes: int) -> None:
    """Teach ``model.forward`` one more argument: ``distillation``, a function of hidden states and head.

    ``model(input_ids, position_ids, distillation=f)`` runs the body and returns ``f(hidden_states, head)``, never the
    full logits. Without the argument the forward is what it was, so ``generate``, PEFT and saving are untouched, and
    parameter names stay. ``n_classes``: how many classes the student shares with the teacher.
    """
    original = model.forward

    @functools.wraps(original)
    def forward(self: PreTrainedModel, *args: Any, distillation: Distillation | None = None, **kwargs: Any) -> Any:
        if distillation is None:
            return original(*args, **kwargs)
        hidden = hidden_states(self, kwargs["input_ids"], kwargs["position_ids"])
        return distillation(hidden, head_of(self).narrowed(n_classes))

    model.forward = MethodType(forward, model)
