"""The student's forward with the loss inside it, where DDP, FSDP2 and autocast see it."""

import functools
import inspect
from collections.abc import Callable
from types import MethodType
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from selkd.maths.head import Head
from selkd.models.head import (
    evaluating,
    head_of,
    hidden_states,
    packed_probe,
    probe,
    require_apart,
    require_same_logits,
)

Distillation = Callable[[Tensor, Head], dict[str, Tensor]]

_VOCAB_SIZE, _OWN_FORWARD, _MARK = "_selkd_vocab_size", "_selkd_own_forward", "_selkd_distillation"


def bind_distillation(model: PreTrainedModel, vocab_size: int) -> None:
    """Teach ``model.forward`` one more argument: ``distillation``, a function of hidden states and head.

    ``model(input_ids, position_ids, distillation=f)`` runs the body and returns ``f(hidden_states, head)``, never the
    full logits. Without the argument the forward is what it was, so ``generate``, PEFT and saving are untouched, and
    parameter names stay. ``vocab_size``: how many classes the student shares with the teacher.

    The forward knows the model by its ``self`` alone, so that a copy of the model (an average of weights, the best so
    far, a frozen reference) computes with its own weights.
    """
    setattr(model, _VOCAB_SIZE, vocab_size)
    own = vars(model).get("forward")  # of this object, where Accelerate's hooks have replaced its class's
    if _is_distillations(own):
        return
    setattr(model, _OWN_FORWARD, own)
    replaced = type(model).forward if own is None else getattr(own, "__func__", own)

    @functools.wraps(replaced)
    def forward(self: PreTrainedModel, *args: Any, distillation: Distillation | None = None, **kwargs: Any) -> Any:
        if distillation is None:
            own = vars(self)[_OWN_FORWARD]
            return own(*args, **kwargs) if own is not None else type(self).forward(self, *args, **kwargs)
        hidden = hidden_states(self, kwargs["input_ids"], kwargs["position_ids"])
        return distillation(hidden, head_of(self).slice_vocab(vars(self)[_VOCAB_SIZE]))

    # Accelerate unwraps a forward down to what has no `__wrapped__`: that is this one.
    forward.__signature__ = inspect.signature(replaced)  # type: ignore[attr-defined]
    del forward.__wrapped__
    setattr(forward, _MARK, True)
    model.forward = MethodType(forward, model)


def _is_distillations(forward: Any) -> bool:
    """Whether this is a forward of ``bind_distillation``, as it is or wrapped. A pickle of the model has lost it."""
    function = getattr(forward, "__func__", forward)
    while function is not None and not getattr(function, _MARK, False):
        function = getattr(function, "__wrapped__", None)
    return function is not None


def check_student(model: nn.Module, student: PreTrainedModel, precision: torch.dtype, is_packed: bool) -> None:
    """What ``check_head`` and ``check_packing`` ask, of a student as it trains: on its device, wrapped, in autocast.

    Args:
        model: ``student``, prepared and perhaps wrapped by Accelerate.
        precision: of its products.
        is_packed: whether samples of several documents come.

    Raises:
        InputError: its halves don't give its logits, or packed documents see each other.
    """
    name, (ids, positions) = type(student).__name__, probe(student)
    with evaluating(model), torch.autocast(ids.device.type, dtype=precision, enabled=precision != torch.float32):
        actual = model(input_ids=ids, position_ids=positions, distillation=_whole)["logits"]
        expected = model(input_ids=ids, position_ids=positions, use_cache=False).logits[..., : actual.shape[-1]]
        require_same_logits(name, actual.to(expected.dtype), expected, precision)
        if is_packed:
            packed, positions = packed_probe(student)
            require_apart(name, model(input_ids=packed, position_ids=positions, distillation=_whole)["hidden"])


def _whole(hidden: Tensor, head: Head) -> dict[str, Tensor]:
    return {"hidden": hidden, "logits": head.logits(hidden)}
