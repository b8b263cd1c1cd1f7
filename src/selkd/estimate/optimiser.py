"""The memory of an optimiser's state."""

import logging
from functools import cache
from typing import Any

import torch
from transformers import Trainer

from selkd.estimate.architecture import Architecture
from selkd.training.arguments import DistillArguments

_logger = logging.getLogger(__name__)

# Numbers kept a parameter, by how an optimiser's name in Transformers begins; others keep two, as Adam does.
_STATES = {"sgd": 0, "lion": 1, "rmsprop": 1, "adagrad": 1, "ademamix": 3}
# Bits of a number -> how many share one float32 scale, in bitsandbytes and torchao.
_SHARING = {8: 256, 4: 128}


def optimiser_bytes(arguments: DistillArguments, student: Architecture) -> tuple[int, str | None]:
    """Bytes of the whole state, and a note where it could not be tried here.

    An optimiser of 8 or 4 bits is counted, as it runs on an accelerator: a number of so many bits and its share of a
    scale. Transformers keeps the embedding's state in float32 where bitsandbytes has 8 bits. Others make a step.
    """
    name = str(getattr(arguments.optim, "value", arguments.optim))
    bits = next((bits for bits in _SHARING if f"{bits}bit" in name), None)
    if bits is None:
        try:
            made, options = Trainer.get_optimizer_cls_and_kwargs(arguments)
        except (ImportError, ValueError, RuntimeError) as error:
            note = f"optimiser: {name} can't be made here ({error}); float32 state is assumed"
            return 4 * _states(name) * student.parameters, note
        each = optimiser_bytes_per_parameter(made, tuple(options.items()))
        if each is None:
            note = f"optimiser: no step of {name} can be made here; float32 state is assumed"
            return 4 * _states(name) * student.parameters, note
        return round(each * student.parameters), None
    whole = 0 if "torch" in name or bits != 8 else student.classes * student.hidden
    narrow = _states(name) * (bits / 8 + 4 / _SHARING[bits]) * (student.parameters - whole)
    return round(narrow) + 4 * _states(name) * whole, None


def _states(name: str) -> int:
    return next((n for begin, n in _STATES.items() if name.removeprefix("paged_").startswith(begin)), 2)


@cache
def optimiser_bytes_per_parameter(
    optimiser: type[torch.optim.Optimizer], options: tuple[tuple[str, Any], ...]
) -> float | None:
    """What the optimiser keeps a parameter, found by one step of it on a small matrix; None where it makes none."""
    side = 256
    weight = torch.nn.Parameter(torch.zeros(side, side))
    weight.grad = torch.zeros_like(weight)
    try:
        made = optimiser([weight], **dict(options))
        made.step()
        state = made.state[weight].values()
    except Exception as error:  # noqa: BLE001  some run on an accelerator alone
        _logger.debug("no step of %s here: %s", optimiser.__name__, error)
        return None
    kept = sum(v.numel() * v.element_size() for v in state if isinstance(v, torch.Tensor) and v.numel() > 1)
    return kept / weight.numel()
