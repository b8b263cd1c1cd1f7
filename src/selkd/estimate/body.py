"""The memory of a model's body, found by running it on fake tensors: every operation, no number.

The very modules run that a real step runs, so an architecture needs no formula of its own. PyTorch's tracker tells what
is alive when.
"""

import logging
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from transformers import AutoModelForCausalLM

from selkd.estimate.architecture import Architecture
from selkd.models.head import hidden_states

_logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class BodyMemory:
    """Bytes beside the weights.

    Attributes:
        activations: alive once the forward pass is through, kept for the backward pass (or its result alone).
        peak: at the worst moment of forward and backward, gradients included.
        is_exact: found by running, not by the rule of thumb.
    """

    activations: int
    peak: int
    is_exact: bool


def body_memory(
    architecture: Architecture, batch: int, length: int, dtype: torch.dtype, *, train: bool, checkpointing: bool = False
) -> BodyMemory:
    """Of one micro-batch [B, T].

    Args:
        dtype: of the products: under autocast over float32 weights when ``train``, else the weights' own.
        checkpointing: layers run again in the backward pass instead of keeping their activations.
    """
    try:
        return _run(architecture.config, batch, length, dtype, train, checkpointing)
    except Exception as error:  # noqa: BLE001  families differ in what they do to a tensor; none is worth failing for
        _logger.debug("no fake run of %s: %s", type(architecture.config).__name__, error)
        return _rule_of_thumb(architecture, batch * length, dtype, train, checkpointing)


def _run(config: Any, batch: int, length: int, dtype: torch.dtype, train: bool, checkpointing: bool) -> BodyMemory:
    # Late and guarded by the caller: the tracker lives in a package of PyTorch's that has no promise of staying.
    from torch._subclasses.fake_tensor import FakeTensorMode
    from torch.distributed._tools.mem_tracker import MemTracker

    weights = torch.float32 if train else dtype
    with FakeTensorMode(allow_non_fake_inputs=True):
        model = AutoModelForCausalLM.from_config(config, dtype=weights, trust_remote_code=False).train(train)
        if checkpointing:
            # Transformers 6 will know the new name alone.
            enable = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
            enable({"use_reentrant": False})
        ids = torch.zeros(batch, length, dtype=torch.long)
        positions = torch.arange(length)[None].expand(batch, length)
        tracker = MemTracker()
        tracker.track_external(model)
        with tracker, torch.set_grad_enabled(train):
            with torch.autocast("cpu", dtype=dtype, enabled=train and dtype != torch.float32):
                hidden = hidden_states(model, ids, positions)
            after_forward = _total(tracker, "current")
            if train:
                hidden.float().sum().backward()
        own = sum(p.numel() * p.element_size() for p in model.parameters())
        own += sum(b.numel() * b.element_size() for b in model.buffers())
        return BodyMemory(max(0, after_forward - own), max(0, _total(tracker, "peak") - own), is_exact=True)


def _total(tracker: Any, moment: str) -> int:
    return sum(int(by_kind["Total"]) for by_kind in tracker.get_tracker_snapshot(moment).values())


def _rule_of_thumb(
    architecture: Architecture, tokens: int, dtype: torch.dtype, train: bool, checkpointing: bool
) -> BodyMemory:
    """Llama's layers by count: about 24 D + 12 F bytes a token and layer in bfloat16 (F: width of the MLP)."""
    text = architecture.config.get_text_config(decoder=True)
    width = getattr(text, "intermediate_size", None) or 4 * architecture.hidden
    layer = tokens * (24 * architecture.hidden + 12 * int(width)) * (1 if dtype != torch.float32 else 1.6)
    one_result = tokens * architecture.hidden * 4
    if not train:
        return BodyMemory(one_result, int(layer / 2) + one_result, is_exact=False)
    kept = architecture.layers * one_result + layer if checkpointing else architecture.layers * layer
    return BodyMemory(int(kept), int(kept + layer), is_exact=False)


@cache
def optimiser_bytes_per_parameter(
    optimiser: type[torch.optim.Optimizer], options: tuple[tuple[str, Any], ...]
) -> float:
    """What the optimiser keeps a parameter, found by one step of it on a small matrix."""
    side = 256
    weight = torch.nn.Parameter(torch.zeros(side, side))
    weight.grad = torch.zeros_like(weight)
    try:
        made = optimiser([weight], **dict(options))
        made.step()
        state = made.state[weight].values()
    except Exception as error:  # noqa: BLE001  some run on an accelerator alone
        _logger.debug("no step of %s here: %s", optimiser.__name__, error)
        return 2.0 if "8bit" in optimiser.__name__.lower() else 8.0
    kept = sum(v.numel() * v.element_size() for v in state if isinstance(v, torch.Tensor) and v.numel() > 1)
    return kept / weight.numel()
