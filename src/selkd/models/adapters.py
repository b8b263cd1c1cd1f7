"""Low-rank adapters on a student: put on, and merged into a model as Transformers loads it."""

import copy
from typing import TYPE_CHECKING, Any

import torch
from transformers import PreTrainedModel

from selkd.errors import InputError
from selkd.models.head import check_head

if TYPE_CHECKING:
    from selkd.recipe.models import LoraOptions


def with_adapters(model: PreTrainedModel, options: "LoraOptions", seed: int) -> PreTrainedModel:
    """``model`` in PEFT's wrapper, whose adapters alone are trained; at first it computes what it did without.

    Raises:
        InputError: no layer of these names, or one of them is the head or an embedding.
    """
    from peft import LoraConfig, get_peft_model

    head, embeddings = model.get_output_embeddings(), model.get_input_embeddings()
    config = LoraConfig(
        r=options.rank,
        lora_alpha=options.alpha,
        lora_dropout=options.dropout,
        target_modules=options.target_modules,
        task_type="CAUSAL_LM",
    )
    device = model.device  # where it goes back to: on the CPU, draws are the same on every machine
    try:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            wrapped: Any = get_peft_model(model.to("cpu"), config).to(device)
    except ValueError as error:
        raise InputError(f"student.lora.target_modules: {options.target_modules}: {error}") from error
    targets = options.target_modules if isinstance(options.target_modules, list) else []
    adapted = [name.removesuffix(".lora_A") for name, _ in wrapped.named_modules() if name.endswith(".lora_A")]
    if without := [name for name in targets if not any(f".{layer}".endswith(f".{name}") for layer in adapted)]:
        raise InputError(f"student.lora.target_modules: no layer is called {without[0]!r}.")
    base = wrapped.get_base_model()
    if base.get_output_embeddings() is not head or base.get_input_embeddings() is not embeddings:
        raise InputError(
            f"student.lora.target_modules: {options.target_modules} takes in the head or an embedding, and the loss "
            "reads the head's weight without its adapter. Name other layers."
        )
    check_head(wrapped)
    return wrapped


def has_adapters(model: Any) -> bool:
    return hasattr(model, "merge_and_unload")


def merged(model: PreTrainedModel) -> PreTrainedModel:
    """The model with its adapters added to its weights, a copy in main memory; itself if it has none.

    The student stays bit for bit what it is: taking merged adapters off again would round its weights. And its device
    is not asked for a second student, which is where memory is short as a run ends.
    """
    if not has_adapters(model):
        return model
    held = [*model.parameters(), *model.buffers()]
    whole: PreTrainedModel = copy.deepcopy(model, {id(tensor): _in_main_memory(tensor) for tensor in held})
    return whole.merge_and_unload()


def _in_main_memory(tensor: torch.Tensor) -> torch.Tensor:
    moved = tensor.detach().to("cpu", copy=True)
    return torch.nn.Parameter(moved, tensor.requires_grad) if isinstance(tensor, torch.nn.Parameter) else moved
