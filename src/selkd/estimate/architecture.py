"""A model's architecture from its configuration alone: no weights are read or fetched."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM

from selkd.errors import InputError
from selkd.models.demo import DEMO
from selkd.models.loading import read_config
from selkd.models.pruning import cut_config, require_fewer_layers
from selkd.models.sources import WITHOUT_WEIGHTS, ModelSource, downloaded, locate
from selkd.recipe.recipe import Recipe


@dataclass(frozen=True)
class Architecture:
    """V classes, D hidden, and the parameters of a model; tied ones count once.

    Attributes:
        config: the Transformers configuration.
        head_is_tied: whether the head is the embedding.
        largest_layer: parameters of the largest block, which FSDP gathers at once.
    """

    config: Any
    parameters: int
    layers: int
    hidden: int
    classes: int
    head_is_tied: bool
    largest_layer: int


def find(model: str, cache_dir: Path) -> ModelSource:
    """The files of ``model`` less the weights, if it is on the hub; its fingerprint is then unknown.

    Raises:
        InputError: no such model.
    """
    if model == DEMO or Path(model).expanduser().is_dir():
        return locate(model, cache_dir)
    return ModelSource(model, downloaded(model, WITHOUT_WEIGHTS), "")


def student_config(recipe: Recipe, teacher: Any, cache_dir: Path) -> Any:
    """The student's configuration: its own, or the teacher's cut to as many layers (which ones makes no difference).

    Raises:
        InputError: no such model, or more layers kept than there are.
    """
    if recipe.student.model is not None:
        return read_config(find(recipe.student.model, cache_dir))
    assert recipe.student.prune_from_teacher is not None, "a student has exactly one source"
    keep = recipe.student.prune_from_teacher.layers
    require_fewer_layers(keep, teacher.get_text_config(decoder=True).num_hidden_layers)
    return cut_config(teacher, list(range(keep)))


def describe(config: Any) -> Architecture:
    """Counts from a model on the meta device, which has shapes and no memory.

    Raises:
        InputError: not a causal language model.
    """
    try:
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(config, trust_remote_code=False)
    except ValueError as error:
        raise InputError(f"{type(config).__name__} is no causal language model: {error}") from error
    text = config.get_text_config(decoder=True)
    head, embedding = model.get_output_embeddings(), model.get_input_embeddings()
    blocks = [
        sum(parameter.numel() for parameter in block.parameters())
        for module in model.modules()
        if isinstance(module, torch.nn.ModuleList) and len(module) == text.num_hidden_layers
        for block in module
    ]
    return Architecture(
        config=config,
        parameters=sum(parameter.numel() for parameter in model.parameters()),
        layers=int(text.num_hidden_layers),
        hidden=int(text.hidden_size),
        classes=int(text.vocab_size),
        head_is_tied=head is not None and head.weight is embedding.weight,
        largest_layer=max(blocks, default=0),
    )
