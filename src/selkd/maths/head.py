"""The language-model head, which turns hidden states into logits, as a plain view.

Shapes: V classes, D hidden.
"""

from dataclasses import dataclass, replace

import torch


@dataclass(frozen=True)
class Head:
    """A view of a model's output projection: ``logits = softcap(scale * (h @ weight.T + bias))``.

    Attributes:
        weight: [V, D], the projection (a parameter of the model, or a cast of one).
        bias: [V] or None.
        scale: factor on the logits (Cohere's ``logit_scale``, one over Granite's ``logits_scaling``).
        softcap: c in ``c * tanh(logits / c)`` (Gemma's final softcapping), or None.
    """

    weight: torch.Tensor
    bias: torch.Tensor | None = None
    scale: float = 1.0
    softcap: float | None = None

    @property
    def vocab_size(self) -> int:
        return self.weight.shape[0]

    def logits(self, hidden_states: torch.Tensor, out: torch.Tensor | None = None) -> torch.Tensor:
        """Logits [..., V] of hidden states [..., D], in the dtype of the product.

        Args:
            out: a tensor [n, V] to write them to, for hidden states [n, D] and without gradient.
        """
        if out is not None:
            weight = self.weight.T
            if self.bias is None:
                torch.mm(hidden_states, weight, out=out)
            else:
                torch.addmm(self.bias, hidden_states, weight, out=out)
            if self.scale != 1.0:
                out.mul_(self.scale)
            return out if self.softcap is None else out.div_(self.softcap).tanh_().mul_(self.softcap)
        logits = torch.nn.functional.linear(hidden_states, self.weight, self.bias)
        if self.scale != 1.0:
            logits = logits * self.scale
        if self.softcap is not None:
            logits = self.softcap * torch.tanh(logits / self.softcap)
        return logits

    def to(self, dtype: torch.dtype) -> "Head":
        """The same head with weight and bias cast. Callers cast once a step, not once a chunk."""
        bias = None if self.bias is None else self.bias.to(dtype)
        return replace(self, weight=self.weight.to(dtype), bias=bias)

    def rows(self, class_ids: torch.Tensor) -> "Head":
        """A copy of the head for the classes ``class_ids`` int64 [n]; its ``logits`` are [..., n], in their order."""
        bias = None if self.bias is None else self.bias[class_ids]
        return replace(self, weight=self.weight[class_ids], bias=bias)

    def slice_vocab(self, vocab_size: int) -> "Head":
        """The head of the first ``vocab_size`` classes. Model families pad their vocabularies with unused rows."""
        if vocab_size == self.vocab_size:
            return self
        bias = None if self.bias is None else self.bias[:vocab_size]
        return replace(self, weight=self.weight[:vocab_size], bias=bias)


class NarrowHead:
    """A head in the dtype of the products, made once for all micro-batches of an optimiser step.

    It is made anew when the step, the dtype, or the weights' place or version is another. A version alone would not do:
    optimisers that write through ``.data`` or by kernels of their own leave it as it was.
    """

    def __init__(self) -> None:
        self._kept: Head | None = None
        self._key: tuple[object, ...] = ()

    def of(self, head: Head, dtype: torch.dtype, step: int) -> Head:
        """``head.to(dtype)`` at an optimiser step; a head in that dtype is given back as it is."""
        if head.weight.dtype == dtype:
            return head
        tensors = [tensor for tensor in (head.weight, head.bias) if tensor is not None]
        key = (step, dtype, *((tensor.data_ptr(), tensor._version, tensor.shape) for tensor in tensors))
        if self._kept is None or key != self._key:
            self.forget()  # before the next is made: two are never in memory
            self._kept, self._key = head.to(dtype), key
        return replace(head, weight=self._kept.weight, bias=self._kept.bias)

    def forget(self) -> None:
        """Give the memory back, as after a step."""
        self._kept = None
