"""A model's architecture, read off its configuration alone: no weights are read or downloaded."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import AutoModelForCausalLM, PreTrainedModel

from selkd.errors import InputError
from selkd.models.demo import DEMO
from selkd.models.loading import n_parameters, read_config
from selkd.models.pruning import cut_config, require_fewer_layers
from selkd.models.sources import WITHOUT_WEIGHTS, ModelSource, downloaded, locate
from selkd.recipe.recipe import Recipe


@dataclass(frozen=True)
class Architecture:
    """The sizes of a model.

    Attributes:
        model: the model on the meta device.
        config: the Transformers configuration of its decoder.
        blocks: its transformer blocks.
        parameters: how many it has; tied ones count once.
    """

    model: PreTrainedModel
    config: Any
    blocks: tuple[nn.Module, ...]
    parameters: int
    hidden_size: int
    vocab_size: int
    head_is_tied: bool

    @property
    def largest_block(self) -> int:
        """How many parameters the largest block has: FSDP gathers them at once."""
        return max(map(n_parameters, self.blocks), default=0)

    @property
    def linear_weights(self) -> int:
        """How many weights the linear layers of its blocks have."""
        layers = [module for block in self.blocks for module in block.modules() if isinstance(module, nn.Linear)]
        return sum(layer.weight.numel() for layer in layers)


def find_files(model: str, cache_dir: Path) -> ModelSource:
    """Find the files of ``model``. Weights are not read, so a folder need not have any and the fingerprint is empty.

    The embedded default and a .gguf file are converted; a model on the hub is downloaded without its weights.

    Raises:
        InputError: there is no such model.
    """
    path = Path(model).expanduser()
    if (path / "config.json").is_file():
        return ModelSource(model, path, "")
    if model == DEMO or path.exists():
        return locate(model, cache_dir)
    return ModelSource(model, downloaded(model, WITHOUT_WEIGHTS), "")


def teacher_and_student(
    recipe: Recipe, teacher_source: ModelSource, student_source: ModelSource | None
) -> tuple[Architecture, Architecture]:
    """Describe both models. A student to be cut from its teacher is described by the teacher's first layers.

    Raises:
        InputError: a model is no causal language model, or the recipe keeps more layers than the teacher has.
    """
    teacher = read_config(teacher_source)
    if student_source is not None:
        return describe(teacher), describe(read_config(student_source))
    assert recipe.student.prune_from_teacher is not None, "a student has exactly one source"
    keep = recipe.student.prune_from_teacher.layers
    require_fewer_layers(keep, teacher.get_text_config(decoder=True).num_hidden_layers)
    return describe(teacher), describe(cut_config(teacher, list(range(keep))))


def describe(config: Any) -> Architecture:
    """Build the model on the meta device, where it has shapes and takes no memory, and read off its sizes.

    Raises:
        InputError: the configuration is not that of a causal language model.
    """
    try:
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(config, trust_remote_code=False)
    except ValueError as error:
        raise InputError(f"{type(config).__name__} is no causal language model: {error}") from error
    text = config.get_text_config(decoder=True)
    head, embedding = model.get_output_embeddings(), model.get_input_embeddings()
    stacks = [module for module in model.modules() if isinstance(module, nn.ModuleList)]
    return Architecture(
        model=model,
        config=text,
        blocks=tuple(block for stack in stacks if len(stack) == text.num_hidden_layers for block in stack),
        parameters=n_parameters(model),
        hidden_size=int(text.hidden_size),
        vocab_size=int(text.vocab_size),
        head_is_tied=head is not None and head.weight is embedding.weight,
    )
