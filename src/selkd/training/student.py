"""The student's forward with the loss inside it, so that DDP, FSDP2 and autocast apply to the loss, too."""

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
    """Give ``model.forward`` one more argument: ``distillation``, a function of hidden states and head.

    ``model(input_ids, position_ids, distillation=f)`` runs the body and returns ``f(hidden_states, head)``, and never
    computes the full logits. Without the argument the forward is the model's own, so ``generate``, PEFT and saving work
    as before, and parameters keep their names.

    The forward reaches the model through ``self`` only, so that a copy of the model (an average of weights, the best
    student so far, a frozen reference) computes with its own weights.

    Args:
        vocab_size: how many classes the student shares with the teacher; the head passed to ``f`` has only these.
    """
    setattr(model, _VOCAB_SIZE, vocab_size)
    own = vars(model).get("forward")  # the object's own: Accelerate's hooks have replaced its class's forward
    if _is_bound(own):
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

    # Accelerate unwraps a forward until one has no `__wrapped__`; it must stop at this one.
    forward.__signature__ = inspect.signature(replaced)  # type: ignore[attr-defined]
    del forward.__wrapped__
    setattr(forward, _MARK, True)
    model.forward = MethodType(forward, model)


def _is_bound(forward: Any) -> bool:
    """Whether ``bind_distillation`` made this forward, which may be wrapped. Unpickled models have lost it."""
    function = getattr(forward, "__func__", forward)
    while function is not None and not getattr(function, _MARK, False):
        function = getattr(function, "__wrapped__", None)
    return function is not None


def check_student(model: nn.Module, student: PreTrainedModel, precision: torch.dtype, is_packed: bool) -> None:
    """Repeat ``check_head`` and ``check_packing`` on the student as it trains: on its device, wrapped, in autocast.

    Args:
        model: ``student``, prepared and perhaps wrapped by Accelerate.
        precision: the dtype of its products.
        is_packed: whether samples hold several documents.

    Raises:
        InputError: the student's body and head don't give its logits, or packed documents see each other.
    """
    name, (ids, positions) = type(student).__name__, probe(student)
    with evaluating(model), torch.autocast(ids.device.type, dtype=precision, enabled=precision != torch.float32):
        actual = model(input_ids=ids, position_ids=positions, distillation=_hidden_and_logits)["logits"]
        expected = model(input_ids=ids, position_ids=positions, use_cache=False).logits[..., : actual.shape[-1]]
        require_same_logits(name, actual.to(expected.dtype), expected, precision)
        if is_packed:
            packed, positions = packed_probe(student)
            require_apart(
                name, model(input_ids=packed, position_ids=positions, distillation=_hidden_and_logits)["hidden"]
            )


def _hidden_and_logits(hidden: Tensor, head: Head) -> dict[str, Tensor]:
    return {"hidden": hidden, "logits": head.logits(hidden)}
