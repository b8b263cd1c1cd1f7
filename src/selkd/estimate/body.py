"""The memory of a model's body, counted from the sizes of its linear layers and norms.

What PyTorch keeps for the backward pass and holds at once, written down for the usual decoder (attention, then an MLP,
gated or not, with norms around them) and compared with measurements of several families (docs/results/estimate.md).

Shapes: B batch, T positions, D hidden, Q features of all queries, K of all keys, F of the MLP.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from selkd.estimate.architecture import Architecture

# More results [B, T, F] that an activation keeps where it is written out step by step.
_STEPS_OF_ACTIVATION = {"gelu_new": 3, "gelu_fast": 3, "quick_gelu": 1}


@dataclass(frozen=True)
class BodyMemory:
    """Bytes beside the weights.

    Attributes:
        activations: alive once the forward pass is through, kept for the backward pass.
        peak: at the worst moment of forward and backward, gradients included.
    """

    activations: int
    peak: int


def training_memory(
    architecture: Architecture, batch: int, length: int, dtype: torch.dtype, *, checkpointing: bool = False
) -> BodyMemory:
    """Of one micro-batch [B, T]: float32 weights under autocast to ``dtype``.

    Args:
        checkpointing: blocks run again in the backward pass instead of keeping their activations.
    """
    tokens, pairs, d = batch * length, batch * length**2, architecture.hidden
    attention = _Attention(architecture)
    blocks = [_Block(block, architecture, attention, dtype.itemsize) for block in architecture.blocks]
    kept = [tokens * block.token_bytes + pairs * attention.pair_bytes(dtype) + block.weight_bytes for block in blocks]
    largest = max(kept, default=0)
    # The last norm with its result; cosines and sines of the positions; the token ids.
    activations = tokens * ((_norm_bytes(architecture.model) + 4) * d + 8 * attention.head_size + 8)
    if checkpointing or attention.is_eager:
        activations += attention.mask_bytes(torch.float32) * pairs
    activations += 4 * d * tokens * len(blocks) if checkpointing else sum(kept)
    # Gradients of a block's results while its MLP goes backward.
    passing = tokens * (8 * d + dtype.itemsize * max((block.mlp for block in blocks), default=0))
    passing += 4 * attention.heads * pairs if attention.keeps_probabilities else 0
    embedding = 4 * architecture.classes * d
    # The head's gradient is the loss's, unless it is the embedding's, too.
    gradients = 4 * architecture.parameters - (0 if architecture.head_is_tied else embedding)
    peak = max(
        activations + passing + (largest if checkpointing else 0),  # as the backward pass begins
        gradients - embedding - 4 * architecture.largest_block + largest + passing,  # in the first block
        gradients + 8 * d * tokens,  # in the embedding
    )
    return BodyMemory(round(activations), round(peak))


def inference_peak(architecture: Architecture, batch: int, length: int, dtype: torch.dtype) -> int:
    """Bytes beside the weights at the worst moment of a forward pass over [B, T] without gradient, in ``dtype``."""
    attention, d, width = _Attention(architecture), architecture.hidden, dtype.itemsize
    blocks = [_Block(block, architecture, attention, width) for block in architecture.blocks]
    query, key, rotary = attention.query, attention.key, 2 * attention.head_size
    attending = 3 * d + 2 * query + 2 * key + (2 * query if key < query else 0) + rotary
    mlp = 4 * d + max((block.at_once for block in blocks), default=0) + rotary
    # Probabilities of all pairs of positions, or the mask as numbers.
    of_pair = attention.heads * (8 if dtype == torch.float32 else 10) if attention.is_eager else width
    of_token = max(attending * width + of_pair * length, mlp * width)
    return round(batch * length * (of_token + attention.mask_bytes(dtype) * length))


def why_rough(architecture: Architecture) -> str | None:
    """Why memory may be farther from the count than 10%; None for a dense decoder that keeps no probabilities."""
    if not architecture.blocks:
        return "its blocks were not found"
    if any(map(_has_experts, architecture.blocks)):
        return "it is a mixture of experts"
    if _Attention(architecture).keeps_probabilities:
        return "its attention keeps the probabilities of all pairs of positions"
    return None


class _Attention:
    """How a model attends, by its configuration."""

    def __init__(self, architecture: Architecture) -> None:
        text = architecture.config
        self.heads = int(_first(text, "num_attention_heads") or 1)
        self.head_size = int(_first(text, "head_dim") or architecture.hidden // self.heads)
        self.query = self.heads * self.head_size
        self.key = int(_first(text, "num_key_value_heads") or self.heads) * self.head_size
        self.is_eager = architecture.model.config._attn_implementation == "eager"
        self.keeps_probabilities = self.is_eager or bool(_first(text, "attention_dropout", "attn_pdrop"))
        self._softcaps = bool(_first(text, "attn_logit_softcapping"))
        self._kinds = len(set(_first(text, "layer_types") or ["full_attention"]))

    def pair_bytes(self, dtype: torch.dtype) -> int:
        """What a block keeps of each pair of a sample's positions."""
        if self.is_eager:
            narrow = 2 if dtype != torch.float32 else 0
            return self.heads * (4 + narrow + (dtype.itemsize if self._softcaps else 0))
        return 12 * self.heads if self.keeps_probabilities else dtype.itemsize  # the mask as numbers

    def mask_bytes(self, dtype: torch.dtype) -> int:
        """Masks of a pair, one for each kind of attention: truth values, or numbers where attention is eager."""
        return self._kinds * (dtype.itemsize if self.is_eager else 1)


class _Block:
    """What one block needs, read off its linear layers: attention's and the MLP's last write D features, others read D.

    Attributes:
        token_bytes: what it keeps of a token for the backward pass.
        weight_bytes: its linear layers' weights as autocast has copied them.
        mlp: F.
        at_once: features of a token that are alive together while the MLP runs forward.
    """

    def __init__(self, block: nn.Module, architecture: Architecture, attention: _Attention, width: int) -> None:
        d, query, text = architecture.hidden, attention.query, architecture.config
        linear = [module for module in block.modules() if isinstance(module, nn.Linear | Conv1D)]
        # Conv1D, which GPT-2 has, stores its weight the other way round.
        shapes = [m.weight.shape if isinstance(m, nn.Linear) else m.weight.shape[::-1] for m in linear]
        written, read = (sum(shape[side] for shape in shapes) for side in (0, 1))
        last = 1 if read == (len(linear) - 1) * d + query else 2  # 1: no dense MLP
        readers = max(0, len(linear) - last)
        self.mlp = max(0, read - readers * d - query)
        gate = min(self.mlp, max(0, written - last * d - query - 2 * attention.key - self.mlp))
        of_attention = readers - (2 if gate else 1)  # 3, unless one layer makes all of them, or gate and up together
        results = self.mlp * (2 + _STEPS_OF_ACTIVATION.get(str(_first(text, *_ACTIVATION)), 0))
        routes = int(_first(text, "num_experts_per_tok") or 0) if _has_experts(block) else 0
        experts = routes * int(_first(text, "moe_intermediate_size", "intermediate_size") or 0)
        norms = [
            parameter.numel()
            for module in block.modules()
            if "Norm" in type(module).__name__
            for name, parameter in module.named_parameters(recurse=False)
            if name == "weight"
        ]
        of_norm, heads_normed = _norm_bytes(block), any(size < d for size in norms)

        # Linear layers after a norm share its result in float32; under autocast each has its own copy.
        self.token_bytes = 2 * d * readers if width < 4 else 4 * d * last
        self.token_bytes += of_norm * sum(size for size in norms if size >= d) + 4 * attention.heads
        self.token_bytes += (of_norm - 4 + width) * (query + attention.key) if heads_normed else 0
        # Queries, keys and values, repeated for every head, and attention's result. Values cut from what one layer made
        # keep all of it.
        self.token_bytes += width * query * (6 if of_attention < 2 and attention.key == query else 4)
        self.token_bytes += width * (results + 2 * gate) + 4 * (4 * experts + 2 * d * routes)
        self.weight_bytes = width * sum(module.weight.numel() for module in linear) if width < 4 else 0
        self.at_once = results + (gate if of_attention in (1, 3) else 2 * gate) + 3 * experts + 2 * d * routes


_ACTIVATION = ("hidden_activation", "hidden_act", "activation_function")


def _norm_bytes(part: nn.Module) -> int:
    """Of one feature: a norm's input in float32 and, if it is an RMSNorm, what it makes of it before the weight."""
    return 8 if any("RMSNorm" in type(module).__name__ for module in part.modules()) else 4


def _has_experts(block: nn.Module) -> bool:
    return any(parameter.ndim == 3 for parameter in block.parameters())


def _first(text: Any, *names: str) -> Any:
    """The first of these keys of a configuration that has a value."""
    return next((value for name in names if (value := getattr(text, name, None))), None)
