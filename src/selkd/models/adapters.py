"""Low-rank adapters of a student: added, and merged into a model that Transformers loads."""

import copy
from typing import TYPE_CHECKING, Any

import torch
from transformers import PreTrainedModel

from selkd.errors import InputError
from selkd.models.head import check_head

if TYPE_CHECKING:
    from selkd.recipe.models import LoraOptions


def with_adapters(model: PreTrainedModel, options: "LoraOptions", seed: int) -> PreTrainedModel:
    """``model`` in PEFT's wrapper, with new adapters, which alone are trained and at first change nothing.

    Raises:
        InputError: the model has no layer of a target's name, or a target is the head or an embedding.
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
    device = model.device  # adapters are drawn on the CPU, where draws are the same on every machine
    try:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            wrapped: Any = get_peft_model(model.to("cpu"), config).to(device)
    except ValueError as error:
        raise InputError(f"student.lora.target_modules: {options.target_modules}: {error}") from error
    targets = options.target_modules if isinstance(options.target_modules, list) else []
    adapted = [name.removesuffix(".lora_A") for name, _ in wrapped.named_modules() if name.endswith(".lora_A")]
    if unknown := [name for name in targets if not any(f".{layer}".endswith(f".{name}") for layer in adapted)]:
        raise InputError(f"student.lora.target_modules: no layer is called {unknown[0]!r}.")
    base = wrapped.get_base_model()
    if base.get_output_embeddings() is not head or base.get_input_embeddings() is not embeddings:
        raise InputError(
            f"student.lora.target_modules: {options.target_modules} includes the head or an embedding, and the loss "
            "reads the head's weight without its adapter. Name other layers."
        )
    check_head(wrapped)
    return wrapped


def has_adapters(model: Any) -> bool:
    return hasattr(model, "merge_and_unload")


def merged(model: PreTrainedModel) -> PreTrainedModel:
    """A copy of the model in main memory with its adapters added to its weights; the model itself if it has none.

    The model is copied because removing merged adapters again would round its weights, and the copy is in main memory
    because the device may have no room for a second student.
    """
    if not has_adapters(model):
        return model
    tensors = [*model.parameters(), *model.buffers()]
    duplicate: PreTrainedModel = copy.deepcopy(model, {id(tensor): _in_main_memory(tensor) for tensor in tensors})
    return duplicate.merge_and_unload()


def _in_main_memory(tensor: torch.Tensor) -> torch.Tensor:
    moved = tensor.detach().to("cpu", copy=True)
    return torch.nn.Parameter(moved, tensor.requires_grad) if isinstance(tensor, torch.nn.Parameter) else moved
