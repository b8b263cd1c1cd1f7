"""A student pruned from a teacher: the layers that change the hidden states least are removed.

Block influence of a layer: 1 - the mean cosine between its input and its output ("ShortGPT", arXiv 2403.03853).

Shapes: B batch, T positions, D hidden.
"""

import copy
from collections.abc import Iterable, Mapping, Sequence
from contextlib import ExitStack
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.initialization import no_init_weights

from selkd.errors import InputError
from selkd.models.head import body_of, disagreement, evaluating, hidden_states, probe


def prune(
    model: PreTrainedModel, n_keep: int, batches: Iterable[Mapping[str, torch.Tensor]]
) -> tuple[PreTrainedModel, list[int], list[float]]:
    """Make a model of the ``n_keep`` layers with the most block influence; of equals, the earlier layer is kept.

    Returns:
        The pruned model, the indices of the kept layers in ascending order, and the influence of every layer.

    Raises:
        InputError: as ``require_fewer_layers``, ``block_influence`` and ``keep_layers``.
    """
    n_layers = len(_layers(model)[1])
    require_fewer_layers(n_keep, n_layers)
    influence = block_influence(model, batches)
    strongest = sorted(range(n_layers), key=lambda layer: (-influence[layer], layer))
    kept = sorted(strongest[:n_keep])
    return keep_layers(model, kept), kept, influence


def require_fewer_layers(n_keep: int, n_layers: int) -> None:
    """Raises InputError unless ``n_keep`` of a teacher's ``n_layers`` layers make a smaller model."""
    if not 1 <= n_keep < n_layers:
        raise InputError(
            f"student.prune_from_teacher.layers is {n_keep}: the teacher has {n_layers} layers, so 1 to "
            f"{n_layers - 1} can be kept."
        )


def block_influence(model: PreTrainedModel, batches: Iterable[Mapping[str, torch.Tensor]]) -> list[float]:
    """For each layer, 1 - the mean cosine between its input and its output over the valid positions.

    Args:
        batches: mappings with input_ids and position_ids (int64) and valid_mask (bool), all [B, T].

    Raises:
        InputError: ``batches`` have no valid position.
    """
    _, layers = _layers(model)
    cosines = torch.zeros(len(layers), dtype=torch.float64)
    positions = 0
    with evaluating(model):
        for batch in batches:
            mask = batch["valid_mask"].to(model.device)
            with ExitStack() as hooks:
                for index, layer in enumerate(layers):
                    hook = _cosine_hook(cosines, index, mask)
                    hooks.enter_context(layer.register_forward_hook(hook, with_kwargs=True))
                hidden_states(model, batch["input_ids"], batch["position_ids"])
            positions += int(mask.sum())
    if positions == 0:
        raise InputError("the text for measuring block influence has no valid position; give longer text.")
    return (1.0 - cosines / positions).tolist()


def keep_layers(model: PreTrainedModel, kept: Sequence[int]) -> PreTrainedModel:
    """A new model of the same class with only the layers ``kept``, in eval mode, which shares no memory with ``model``.

    Embeddings, final norm and head stay; tied weights stay tied; dtypes and device are the original's.

    Raises:
        InputError: ``kept`` are not ascending layer numbers, or the family's layers depend on their number, so that a
            shorter model computes something else. Both models are run on a few tokens to find out.
    """
    prefix, layers = _layers(model)
    if not kept or list(kept) != sorted(set(kept)) or kept[0] < 0 or kept[-1] >= len(layers):
        raise InputError(f"layers to keep are {list(kept)}: expected ascending numbers from 0 to {len(layers) - 1}.")
    refusal = f"{type(model).__name__} can't be cut to layers {list(kept)}"
    try:
        with no_init_weights():
            pruned = type(model)._from_config(
                cut_config(model.config, kept),
                dtype=model.dtype,
                attn_implementation=model.config._attn_implementation,
                experts_implementation=model.config._experts_implementation,
            )
        # assign keeps each weight's own dtype (some families hold routers in float32).
        pruned.load_state_dict(_cut_state(model.state_dict(), prefix, kept), strict=True, assign=True)
    except (ValueError, IndexError, KeyError, RuntimeError) as error:
        raise InputError(f"{refusal}: {error}") from error
    pruned.tie_weights()
    pruned.generation_config = copy.deepcopy(model.generation_config)
    pruned = pruned.to(model.device).eval()
    if difference := _difference_from_skipping(model, pruned, kept):
        raise InputError(
            f"{refusal}: its layers depend on their number. Against the original with the other layers skipped, "
            f"{difference}. Keep other layers, or give the student as a model of its own (student.model)."
        )
    return pruned


def _layers(model: PreTrainedModel) -> tuple[str, nn.ModuleList]:
    """The name in the model and the modules of its list of layers: the only list as long as the configuration says."""
    body = body_of(model)
    n_layers = model.config.get_text_config(decoder=True).num_hidden_layers
    lists: dict[str, nn.ModuleList] = {}
    for name, module in body.named_modules():
        inside = any(name.startswith(f"{outer}.") for outer in lists)  # a layer's experts may be as many
        if isinstance(module, nn.ModuleList) and len(module) == n_layers and not inside:
            lists[name] = module
    if len(lists) != 1:
        raise InputError(
            f"{type(model).__name__}: expected one list of {n_layers} layers, found {sorted(lists) or 'none'}. "
            "This family can't be pruned."
        )
    (layers,) = lists.values()
    return next(name for name, module in model.named_modules() if module is layers), layers


def cut_config(config: Any, kept: Sequence[int]) -> Any:
    """The configuration of the shorter model: its number of layers, and every setting that lists or counts layers."""
    content, text = config.to_dict(), config.get_text_config(decoder=True)
    cut = content
    if text is not config:
        cut = next(content[name] for name in config.sub_configs if getattr(config, name) is text)
    n_layers = text.num_hidden_layers
    changes: dict[str, Any] = {"num_hidden_layers": len(kept)}
    for name, value in text.to_dict().items():
        if name == "mlp_only_layers" and value is not None:  # numbers of the dense layers (Qwen's mixtures of experts)
            changes[name] = [new for new, old in enumerate(kept) if old in value]
        elif name == "first_k_dense_replace" and value is not None:  # how many layers are dense at first (DeepSeek)
            changes[name] = sum(old < value for old in kept)
        elif isinstance(value, list) and len(value) == n_layers and not name.endswith(("token_id", "token_ids")):
            changes[name] = [value[old] for old in kept]
    cut.update({text.attribute_map.get(name, name): value for name, value in changes.items()})
    # Made from the dictionary as from a file, so that the model in memory is the model on disk.
    return type(config).from_dict(content)


def _cut_state(state: Mapping[str, torch.Tensor], prefix: str, kept: Sequence[int]) -> dict[str, torch.Tensor]:
    """Copies of the weights that stay, with the layers renumbered."""
    number = {str(old): str(new) for new, old in enumerate(kept)}
    cut: dict[str, torch.Tensor] = {}
    for name, tensor in state.items():
        if name.startswith(f"{prefix}."):
            old, _, rest = name.removeprefix(f"{prefix}.").partition(".")
            if old not in number:
                continue
            name = f"{prefix}.{number[old]}.{rest}"
        cut[name] = tensor.detach().clone()
    return cut


def _difference_from_skipping(model: PreTrainedModel, pruned: PreTrainedModel, kept: Sequence[int]) -> str | None:
    ids, positions = probe(model)
    _, layers = _layers(model)
    with evaluating(model), ExitStack() as hooks:
        for index in set(range(len(layers))) - set(kept):
            hooks.enter_context(layers[index].register_forward_hook(_skip_hook, with_kwargs=True))
        expected = hidden_states(model, ids, positions)
        actual = hidden_states(pruned, ids, positions)
    return disagreement(actual, expected)


def _layer_input(args: tuple[Any, ...], kwargs: dict[str, Any]) -> torch.Tensor:
    return args[0] if args else kwargs["hidden_states"]


def _skip_hook(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Any:
    """Makes a layer return its input."""
    before = _layer_input(args, kwargs)
    return (before, *output[1:]) if isinstance(output, tuple) else before


def _cosine_hook(cosines: torch.Tensor, index: int, mask: torch.Tensor) -> Any:
    """Adds to ``cosines[index]`` the cosines between a layer's input and output at the positions of ``mask`` [B, T]."""

    def hook(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        before = _layer_input(args, kwargs)
        after = output[0] if isinstance(output, tuple) else output
        cosine = nn.functional.cosine_similarity(before[mask].float(), after[mask].float(), dim=-1)
        cosines[index] += cosine.sum().item()

    return hook
