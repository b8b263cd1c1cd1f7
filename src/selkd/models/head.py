"""A causal language model seen as two halves: the body makes hidden states, the head makes logits of them.

With two halves, logits can be computed for some positions only. Model families differ in what lies between the halves
(softcapping, scales, biases), so the halves are checked against the model's own forward pass.

Terms that a family adds to its own loss are in no loss of selkd. The load-balancing loss of a mixture of experts
(``output_router_logits``, ``router_aux_loss_coef``) is never added: routers learn from the teacher's distribution
alone, and nothing keeps the experts evenly used. Dropout, if a student's configuration has it, is on in training as in
the model's own forward pass, and its noise depends on how a step is divided into batches.

Shapes: B batch, T positions, V classes, D hidden.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from selkd.errors import InputError
from selkd.maths.head import Head

# The greatest difference that rounding explains, relative to the greatest value.
_TOLERANCE = {torch.float64: 1e-9, torch.float32: 1e-4, torch.bfloat16: 2e-2, torch.float16: 1e-2}
_PROBE_TOKENS = 16


def body_of(model: PreTrainedModel) -> nn.Module:
    """The part that makes hidden states of token ids, final norm included. Raises InputError if the model has none."""
    body = model.get_decoder()
    if body is model:
        raise InputError(f"{type(model).__name__} has no body apart from its head; a causal language model is needed.")
    return body


def hidden_states(model: PreTrainedModel, input_ids: torch.Tensor, position_ids: torch.Tensor) -> torch.Tensor:
    """The hidden states that the head reads, [B, T, D] in the model's dtype, with gradient if it is enabled.

    Args:
        input_ids: [B, T] int64, which are moved to the model's device.
        position_ids: [B, T] int64, from 0 in each document. There is no attention mask, because Transformers keeps
            packed documents apart by their positions only without one.
    """
    body, device = body_of(model), input_device(model)
    return body(
        input_ids=input_ids.to(device), position_ids=position_ids.to(device), attention_mask=None, use_cache=False
    ).last_hidden_state


def input_device(model: PreTrainedModel) -> torch.device:
    """The device that the model takes its token ids on: that of its embeddings. If the embeddings are offloaded,
    Accelerate's hook knows the device."""
    embeddings = model.get_input_embeddings()
    where = getattr(getattr(embeddings, "_hf_hook", None), "execution_device", None)
    return model.device if where is None else torch.device(where)


def head_of(model: PreTrainedModel) -> Head:
    """The head as a view of the model's parameters, without a copy, so that gradients reach them.

    ``model(...).logits == head_of(model).logits(hidden_states(model, ...))``; see ``check_head``.

    Raises:
        InputError: the head is missing, quantised, has an adapter or is otherwise no plain linear layer, or a
            ``device_map`` offloads it.
    """
    layer = _trained_copy(model.get_output_embeddings())
    if not isinstance(layer, nn.Linear) or not layer.weight.is_floating_point() or layer.weight.ndim != 2:
        raise InputError(
            f"the head of {type(model).__name__} is a {type(layer).__name__}; a plain linear layer is needed. "
            "Load it unquantised, and leave the head out of the adapter's target modules."
        )
    if layer.weight.is_meta:
        raise InputError(
            f"the head of {type(model).__name__} is offloaded by its device_map, and the loss reads it in every step. "
            "Map the head (and the embeddings, where both are one) to a device; the layers may stay offloaded."
        )
    config = model.config.get_text_config(decoder=True)
    softcap = getattr(config, "final_logit_softcapping", None)
    return Head(layer.weight, layer.bias, _scale(config), None if softcap is None else float(softcap))


def _trained_copy(layer: Any) -> Any:
    """The copy of a layer that PEFT's ``modules_to_save`` trains in its place while adapters are on, or the layer."""
    if getattr(layer, "disable_adapters", False):
        return layer.original_module
    copies, active = getattr(layer, "modules_to_save", None), getattr(layer, "active_adapters", None)
    return copies[active[0]] if copies and active and active[0] in copies else layer


def _scale(config: Any) -> float:
    """The factor on the logits. Cohere and Falcon-H1 multiply by their setting, Granite divides, and HyperCLOVA X
    multiplies by a setting of Granite's name."""
    scale = 1.0
    for name in ("logit_scale", "lm_head_multiplier"):
        factor = getattr(config, name, None)
        scale *= 1.0 if factor is None else float(factor)
    divisor = getattr(config, "logits_scaling", None)
    if divisor is not None:
        scale *= float(divisor) if config.model_type == "hyperclovax" else 1.0 / float(divisor)
    return scale


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Within the block, the model is in evaluation mode without gradient; then every module gets its mode back."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        for module, mode in modes:
            module.training = mode


def probe(model: PreTrainedModel) -> tuple[torch.Tensor, torch.Tensor]:
    """A few token ids spread over the vocabulary and their position ids, both [1, 16], on the model's device."""
    rows = model.get_input_embeddings().weight.shape[0]
    positions = torch.arange(_PROBE_TOKENS, device=input_device(model))[None]
    return positions * max(rows // _PROBE_TOKENS, 1) % rows, positions


def disagreement(actual: torch.Tensor, expected: torch.Tensor, precision: torch.dtype | None = None) -> str | None:
    """The greatest difference in words, or None if rounding in ``precision`` explains it; None: in their own dtype."""
    if actual.shape != expected.shape:
        return f"shapes {list(actual.shape)} and {list(expected.shape)}"
    difference = (actual.cpu().double() - expected.cpu().double()).abs().max().item()
    largest = expected.cpu().double().abs().max().item()
    # With a NaN the comparison is False, so a NaN is a disagreement.
    if difference <= _TOLERANCE[precision or expected.dtype] * largest:
        return None
    return f"max abs difference {difference:.3g} where the largest value is {largest:.3g}"


def check_head(model: PreTrainedModel) -> None:
    """Raises InputError unless body and head reproduce the model's own logits on a few tokens.

    It is called once when a model is loaded: with a scale, a softcap or an adapter that the halves don't know, the
    student would be trained on wrong logits.
    """
    ids, positions = probe(model)
    with evaluating(model):
        expected = model(input_ids=ids, position_ids=positions, use_cache=False).logits
        actual = head_of(model).logits(hidden_states(model, ids, positions))
    require_same_logits(type(model).__name__, actual.to(expected.dtype), expected)


def require_same_logits(
    name: str, actual: torch.Tensor, expected: torch.Tensor, precision: torch.dtype | None = None
) -> None:
    """Raises InputError if the halves' logits are not the model's own; for ``precision`` see ``disagreement``."""
    if expected.isnan().any():
        raise InputError(
            f"{name}: expected numbers as logits, got nan on a few tokens. Its weights are damaged, or "
            f"{str(expected.dtype).removeprefix('torch.')} is too narrow for them: save them anew, or use float32."
        )
    if difference := disagreement(actual, expected, precision):
        raise InputError(
            f"{name} computes its logits in a way that selkd does not know: hidden states x head against the model's "
            f"own logits, {difference}. This model can't be used."
        )


def check_packing(model: PreTrainedModel) -> None:
    """Raises InputError if a packed document sees the one before it, so that samples must not be packed.

    That is so for models that read no position ids (ALiBi), that carry a state (Mamba, linear attention), or whose
    attention recognises packed documents only in batches of one sample.
    """
    packed, positions = packed_probe(model)
    with evaluating(model):
        require_apart(type(model).__name__, hidden_states(model, packed, positions))


def packed_probe(model: PreTrainedModel) -> tuple[torch.Tensor, torch.Tensor]:
    """Token and position ids, both [2, 16], of two samples whose first documents differ and whose second documents are
    equal."""
    ids, positions = probe(model)
    half = ids.shape[1] // 2
    firsts = torch.cat([ids[:, :half], ids[:, half:]])
    packed = torch.cat([firsts, ids[:, half:].flip(1).expand(2, -1)], dim=1)
    return packed, (positions % half).expand(2, -1)


def require_apart(name: str, hidden: torch.Tensor) -> None:
    """Raises InputError if the hidden states [2, 16, D] of ``packed_probe`` differ in the second document."""
    first, second = hidden[:, hidden.shape[1] // 2 :].cpu().double()
    share = ((first - second).norm() / first.norm()).item()
    if not share <= _TOLERANCE[torch.float32]:
        raise InputError(
            f"{name} does not keep packed documents apart: a document's hidden states move by {share:.1%} with the "
            "document before it. Set data.packing to false, and give samples of one document."
        )
