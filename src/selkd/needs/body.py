"""The memory of a model's body (all but its head), by a formula for dense decoders.

The formula says what PyTorch keeps for the backward pass and holds at once in the usual block: attention, then an MLP,
gated or not, with norms around them. It was compared with measurements of several families (docs/results/estimate.md).

Shapes: B batch, T positions, D hidden, Q features of all queries, K features of all keys, F features within the MLP.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from selkd.needs.architecture import Architecture

# Results [B, T, F] that an activation keeps beyond its input and output where Transformers writes it out in steps.
_EXTRA_RESULTS = {"gelu_new": 3, "gelu_fast": 3, "quick_gelu": 1}


@dataclass(frozen=True)
class BodyMemory:
    """Bytes beside the weights.

    Attributes:
        activations: kept for the backward pass once the forward pass is through.
        peak: at the worst moment of forward and backward pass, gradients included.
    """

    activations: int
    peak: int


def training_memory(
    architecture: Architecture, batch: int, length: int, dtype: torch.dtype, *, checkpointing: bool = False
) -> BodyMemory:
    """The memory of one micro-batch [B, T] with float32 weights under autocast to ``dtype``.

    Args:
        checkpointing: whether blocks run again in the backward pass instead of keeping their activations.
    """
    tokens, pairs, d, body = batch * length, batch * length**2, architecture.hidden_size, _Body(architecture)
    block = body.kept_by_block(tokens, pairs, dtype)
    # The last norm with its result; cosines and sines of the positions; the token ids.
    activations = tokens * ((body.norm_bytes + 4) * d + 8 * body.head_size + 8)
    if checkpointing or body.is_eager:
        activations += body.mask_bytes(torch.float32) * pairs
    activations += len(architecture.blocks) * (4 * d * tokens if checkpointing else block)
    # Gradients of a block's results while its MLP goes backward.
    passing = tokens * (8 * d + dtype.itemsize * body.mlp)
    passing += 4 * body.heads * pairs if body.keeps_probabilities else 0
    embedding = 4 * architecture.vocab_size * d
    # The head's gradient belongs to the loss, unless the embedding has the same weight.
    gradients = 4 * architecture.parameters - (0 if architecture.head_is_tied else embedding)
    peak = max(
        activations + passing + (block if checkpointing else 0),  # as the backward pass begins
        gradients - embedding - 4 * architecture.largest_block + block + passing,  # in the first block
        gradients + 8 * d * tokens,  # in the embedding
    )
    return BodyMemory(activations, peak)


def inference_peak(architecture: Architecture, batch: int, length: int, dtype: torch.dtype) -> int:
    """Bytes beside the weights at the worst moment of a forward pass over [B, T] without gradient, in ``dtype``."""
    d, width, body = architecture.hidden_size, dtype.itemsize, _Body(architecture)
    attention = 3 * d + 2 * body.query + 2 * body.key + (2 * body.query if body.key < body.query else 0)
    mlp = 4 * d + body.mlp_results + body.gate * (2 if body.is_fused else 1) + body.expert_results
    # Probabilities of all pairs of positions, or the mask as numbers.
    pair = body.heads * (8 if dtype == torch.float32 else 10) if body.is_eager else width
    token = max(attention * width + pair * length, mlp * width) + 2 * body.head_size * width
    return batch * length * (token + body.mask_bytes(dtype) * length)


def why_rough(architecture: Architecture) -> str | None:
    """Why memory may be farther from the formula than 10%; None for a dense decoder that keeps no probabilities."""
    if not architecture.blocks:
        return "its blocks were not found"
    body = _Body(architecture)
    if body.has_experts:
        return "it is a mixture of experts"
    if body.keeps_probabilities:
        return "its attention keeps the probabilities of all pairs of positions"
    return None


class _Body:
    """The sizes of a body, read off its configuration and its last block; its blocks are taken to be alike."""

    def __init__(self, architecture: Architecture) -> None:
        text, d = architecture.config, architecture.hidden_size
        block = architecture.blocks[-1] if architecture.blocks else nn.Module()
        linears = [module for module in block.modules() if isinstance(module, nn.Linear | Conv1D)]
        self.hidden, self.layers, self.weights = d, len(linears), sum(m.weight.numel() for m in linears)
        self.heads = int(_first(text, "num_attention_heads") or 1)
        self.head_size = int(_first(text, "head_dim") or d // self.heads)
        self.query = self.heads * self.head_size
        self.key = int(_first(text, "num_key_value_heads") or self.heads) * self.head_size
        self.is_fused = self.layers < 6  # queries, keys and values come from one layer
        self.is_eager = architecture.model.config._attn_implementation == "eager"
        self.keeps_probabilities = self.is_eager or bool(_first(text, "attention_dropout", "attn_pdrop"))
        self._mask_kinds = len(set(_first(text, "layer_types") or ["full_attention"]))

        self.has_experts = any(parameter.ndim == 3 for parameter in block.parameters())
        # The MLP's last layer reads more features than any other. Conv1D, which GPT-2 has, stores [in, out].
        read = [m.weight.shape[1 if isinstance(m, nn.Linear) else 0] for m in linears]
        self.mlp = 0 if self.has_experts else max(read, default=0)
        is_gated = self.weights > 2 * d * (self.query + self.key) + 2.5 * d * self.mlp
        self.gate = self.mlp if is_gated else 0
        activation = _first(text, "hidden_activation", "hidden_act", "activation_function")
        self.mlp_results = self.mlp * (2 + _EXTRA_RESULTS.get(str(activation), 0))
        routes = int(_first(text, "num_experts_per_tok") or 0) if self.has_experts else 0
        experts = routes * int(_first(text, "moe_intermediate_size", "intermediate_size") or 0) if routes else 0
        self.expert_results = 3 * experts + 2 * d * routes
        self._kept_by_experts = 4 * (4 * experts + 2 * d * routes)

        norms = [module for module in block.modules() if "Norm" in type(module).__name__]
        weights = [getattr(module, "weight", None) for module in norms]
        sizes = [weight.numel() for weight in weights if isinstance(weight, torch.Tensor)]
        self._normed = sum(size for size in sizes if size >= d)
        self._norms_heads = any(size < d for size in sizes)
        # A norm keeps its input in float32 and, if it is an RMSNorm, what it makes of it before the weight.
        self.norm_bytes = 8 if any("RMSNorm" in type(module).__name__ for module in norms) else 4

    def kept_by_block(self, tokens: int, pairs: int, dtype: torch.dtype) -> int:
        """Bytes that a block keeps for the backward pass, of all tokens and of all pairs of a sample's positions."""
        width, after_norm = dtype.itemsize, self.layers - (1 if self.has_experts else 2)
        # Linear layers after a norm share its result in float32; autocast copies it for each, and the weights too.
        inputs = 2 * after_norm if width < 4 else 4 * (self.layers - after_norm)
        norms = self.norm_bytes * self._normed
        norms += (self.norm_bytes - 4 + width) * (self.query + self.key) if self._norms_heads else 0
        # Queries, keys and values, repeated for every head, and attention's result. Values cut from what one layer made
        # keep all of it.
        attention = 4 * self.heads + width * self.query * (6 if self.is_fused and self.key == self.query else 4)
        mlp = width * (self.mlp_results + 2 * self.gate) + self._kept_by_experts
        weights = width * self.weights if width < 4 else 0
        pair = self.heads * (6 if self.is_eager else 12) if self.keeps_probabilities else width  # the mask as numbers
        return tokens * (self.hidden * inputs + norms + attention + mlp) + pairs * pair + weights

    def mask_bytes(self, dtype: torch.dtype) -> int:
        """Bytes of a pair in the masks, one for each kind of attention: numbers if it is eager, else truth values."""
        return self._mask_kinds * (dtype.itemsize if self.is_eager else 1)


def _first(text: Any, *names: str) -> Any:
    """The first of these keys of a configuration that has a value."""
    return next((value for name in names if (value := getattr(text, name, None))), None)
