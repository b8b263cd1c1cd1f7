"""The product of hidden states and head, a chunk of positions at a time, so that [N, V] is never in memory.

Shapes: N positions, D hidden, V classes.
"""

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from selkd.maths.divergence import ValueAndGradient, entropy
from selkd.maths.head import Head

# Memory of the logits of one chunk in 16 bits; wider ones are of the same positions. Larger chunks read the head, and
# add to its gradient, less often: in float32, 341 positions take a fifth less time each than 170 do.
CHUNK_BYTES = {"cpu": 32 << 20, "accelerator": 128 << 20}
# Memory of the float32 logits of one piece of a chunk; a criterion holds a handful of such tensors. On a CPU it is the
# share of each thread, small enough to stay in the core's own cache: entropy and forward KL take 0.6 of the time that
# they take with 2 MiB.
PIECE_BYTES = {"cpu": 512 << 10, "accelerator": 128 << 20}

Compare = Callable[[Tensor, slice], ValueAndGradient]


def chunk_size(vocab_size: int, device: torch.device) -> int:
    """Positions of one chunk: as many as keep their logits in 16 bits within ``CHUNK_BYTES``, at least 1."""
    return max(1, _budget(CHUNK_BYTES, device) // (2 * vocab_size))


def piece_size(vocab_size: int, device: torch.device) -> int:
    """Positions of one piece of a chunk: as many as keep their float32 logits within ``PIECE_BYTES``, at least 1."""
    threads = torch.get_num_threads() if device.type == "cpu" else 1
    return max(1, threads * _budget(PIECE_BYTES, device) // (4 * vocab_size))


def _budget(budgets: dict[str, int], device: torch.device) -> int:
    return budgets["cpu" if device.type == "cpu" else "accelerator"]


def chunks(n: int, size: int) -> list[slice]:
    """``n`` positions cut into slices of ``size``, the last one shorter."""
    return [slice(start, min(start + size, n)) for start in range(0, n, size)]


def even_size(n: int, size: int) -> int:
    """The size of the fewest chunks of at most ``size`` that ``n`` positions take, when they are as equal as can be.

    A short last chunk reads the whole head, and adds to its whole gradient, for a few positions.
    """
    return -(-n // -(-n // size)) if n > size else size


def wide(logits: Tensor) -> Tensor:
    """Logits in the dtype of reductions: float64 if they are float64, else float32."""
    return logits if logits.dtype == torch.float64 else logits.float()


def _chunked_logits(hidden_states: Tensor, head: Head, chunk: int) -> Iterator[tuple[slice, Tensor]]:
    """The positions and the logits [n, V] of one chunk after the other, in a buffer that the next chunk overwrites."""
    chunk = even_size(len(hidden_states), chunk)
    buffer = hidden_states.new_empty(min(chunk, len(hidden_states)), head.vocab_size)
    for rows in chunks(len(hidden_states), chunk):
        yield rows, head.logits(hidden_states[rows], out=buffer[: rows.stop - rows.start])


def _pieces(rows: slice, vocab_size: int, device: torch.device) -> Iterator[tuple[slice, slice]]:
    """The pieces of the chunk ``rows``: the slice of each among all positions, and its slice within the chunk."""
    for within in chunks(rows.stop - rows.start, piece_size(vocab_size, device)):
        yield slice(rows.start + within.start, rows.start + within.stop), within


class ChunkedLogits:
    """Logits at hidden states [N, D], in float32 and a few positions at a time.

    When the first positions of a chunk are asked for, the product is made for the whole chunk: the head is read once.

    Args:
        chunk: positions of one product; by default as many as ``CHUNK_BYTES`` allows.
    """

    def __init__(self, hidden_states: Tensor, head: Head, chunk: int | None = None) -> None:
        self.hidden_states = hidden_states.to(
            head.weight.device, head.weight.dtype
        )  # a model may be spread over devices
        self.head = head
        chunk = chunk or chunk_size(head.vocab_size, head.weight.device)
        self.chunk = even_size(len(self.hidden_states), chunk)
        self._start = self._stop = 0
        self._logits = self.hidden_states.new_empty(0, head.vocab_size)

    @torch.no_grad()
    def __call__(self, rows: slice) -> Tensor:
        """Logits [n, V] of ``rows``, float32 or float64, which the caller may overwrite."""
        device = self.hidden_states.device
        if not self._start <= rows.start <= rows.stop <= self._stop or self._start == self._stop:
            size = max(self.chunk, rows.stop - rows.start)
            self._start, self._stop = rows.start, min(rows.start + size, len(self.hidden_states))
            n = self._stop - self._start
            if n > len(self._logits):
                self._logits = self.hidden_states.new_empty(n, self.head.vocab_size)
            with torch.autocast(device.type, enabled=False):
                self.head.logits(self.hidden_states[self._start : self._stop], out=self._logits[:n])
        logits = self._logits[rows.start - self._start : rows.stop - self._start]
        return wide(logits) if logits.dtype in (torch.bfloat16, torch.float16) else logits.clone()


@torch.no_grad()
def chunked_statistics(
    hidden_states: Tensor,
    head: Head,
    compute: Callable[[Tensor, slice], Tensor],
    chunk: int | None = None,
    *,
    n_statistics: int = 1,
) -> Tensor:
    """m numbers for each position, [N, m], computed from the logits at hidden states [N, D], without gradient.

    Dense expression: ``compute(head.logits(hidden_states), slice(None))``.

    Args:
        compute: maps student logits [n, V], which it may overwrite, and the slice of positions to [n, m].
        chunk: positions of one product; by default as many as ``CHUNK_BYTES`` allows.
        n_statistics: m, needed where N is 0.
    """
    device = hidden_states.device
    chunk = chunk or chunk_size(head.vocab_size, device)
    hidden_states = hidden_states.to(head.weight.dtype)
    parts = []
    with torch.autocast(device.type, enabled=False):
        for rows, logits in _chunked_logits(hidden_states, head, chunk):
            for piece, within in _pieces(rows, head.vocab_size, device):
                parts.append(compute(wide(logits[within]), piece).clone())  # a view of the logits would be written over
    return torch.cat(parts) if parts else wide(hidden_states.new_zeros(0, n_statistics))


def chunked_entropy(hidden_states: Tensor, head: Head, chunk: int | None = None) -> Tensor:
    """Entropy in nats, [N], of the distributions at hidden states [N, D], without gradient.

    Dense expression: ``Categorical(logits=head.logits(hidden_states)).entropy()``.
    """
    return chunked_statistics(hidden_states, head, lambda logits, _: entropy(logits).unsqueeze(-1), chunk).squeeze(-1)


def chunked_loss(
    hidden_states: Tensor,
    head: Head,
    coefficients: Tensor,
    compare: Compare,
    *,
    compute_head: Head | None = None,
    chunk: int | None = None,
) -> tuple[Tensor, Tensor]:
    """The weighted sum of a criterion over positions, and the criterion's values.

    Dense expression: ``values, _ = compare(head.logits(hidden_states), slice(None)); (coefficients * values).sum()``.

    The gradients of ``hidden_states`` and the head are computed in the forward pass, chunk by chunk, so only [N, D] and
    [V, D] are kept for the backward pass. They are returned through autograd (and multiplied by ``grad_output``), so
    hooks of DDP and FSDP see them and tied embeddings add up.

    Args:
        hidden_states: [N, D]; may require gradient.
        head: its weight and bias may require gradient.
        coefficients: [N], detached.
        compare: maps student logits [n, V], which it may overwrite, and the slice of positions to values [n] in nats
            and the gradient of their sum [n, V].
        compute_head: ``head`` in the dtype of the products, for callers that need it more than once a step.
        chunk: positions of one product; by default as many as ``CHUNK_BYTES`` allows.

    Returns:
        The scalar sum (float32 or float64), and the values [N], detached.
    """
    if compute_head is None:
        with torch.no_grad():
            compute_head = head.to(compute_dtype(hidden_states))
    chunk = chunk or chunk_size(head.vocab_size, hidden_states.device)
    with_gradient = torch.is_grad_enabled()
    return _ChunkedLoss.apply(
        hidden_states, head.weight, head.bias, compute_head, coefficients.detach(), compare, chunk, with_gradient
    )


def compute_dtype(tensor: Tensor) -> torch.dtype:
    """The dtype in which products with ``tensor`` run: that of autocast where it is on, else that of the tensor."""
    device = tensor.device.type
    return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else tensor.dtype


class _ChunkedLoss(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden_states: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        head: Head,
        coefficients: Tensor,
        compare: Compare,
        chunk: int,
        with_gradient: bool,
    ) -> tuple[Tensor, Tensor]:
        with torch.autocast(hidden_states.device.type, enabled=False):
            need_hidden, need_weight, need_bias = (needed and with_gradient for needed in ctx.needs_input_grad[:3])
            dtype = head.weight.dtype
            wide_dtype = torch.float64 if dtype == torch.float64 else torch.float32
            narrow_hidden = hidden_states.to(dtype)
            values = hidden_states.new_zeros(len(hidden_states), dtype=wide_dtype)
            grad_hidden = torch.zeros_like(narrow_hidden) if need_hidden else None
            grad_weight = torch.empty_like(weight, dtype=wide_dtype) if need_weight else None
            grad_bias = torch.zeros_like(bias, dtype=wide_dtype) if bias is not None and need_bias else None
            if grad_weight is not None and len(hidden_states) == 0:
                grad_weight.zero_()
            for rows, logits in _chunked_logits(narrow_hidden, head, chunk):
                for piece, within in _pieces(rows, head.vocab_size, logits.device):
                    student_logits = wide(logits[within])
                    output = student_logits.clone() if head.softcap is not None else None
                    values[piece], gradient = compare(student_logits, piece)
                    if not (need_hidden or need_weight or need_bias):
                        continue
                    gradient.mul_(coefficients[piece, None])
                    gradient = _through_transform(gradient, output, head)
                    if grad_bias is not None:
                        grad_bias += gradient.sum(dim=0)
                    logits[within] = gradient  # takes the logits' place in the buffer
                if grad_hidden is not None:
                    torch.mm(logits, head.weight, out=grad_hidden[rows])
                if grad_weight is not None:
                    _add_product_(grad_weight, logits, narrow_hidden[rows], is_first=rows.start == 0)
            ctx.gradients = (grad_hidden, grad_weight, grad_bias)
            ctx.dtypes = (hidden_states.dtype, weight.dtype, None if bias is None else bias.dtype)
            loss = torch.linalg.vecdot(coefficients.to(wide_dtype), values)
            ctx.mark_non_differentiable(values)
            return loss, values

    @staticmethod
    def backward(ctx: Any, grad_loss: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
        assert ctx.gradients is not None, "chunked_loss keeps its gradients for one backward pass only"
        # Multiplying [V, D] by 1 is left out. On an accelerator, reading the number would make the CPU wait.
        is_one = grad_loss.device.type == "cpu" and grad_loss.item() == 1
        scaled = [
            None if gradient is None else (gradient if is_one else gradient.mul_(grad_loss)).to(dtype)
            for gradient, dtype in zip(ctx.gradients, ctx.dtypes, strict=True)
        ]
        ctx.gradients = None
        return (*scaled, None, None, None, None, None)


def _add_product_(total: Tensor, left: Tensor, right: Tensor, is_first: bool) -> None:
    """``total`` [V, D] += ``left`` [n, V].T @ ``right`` [n, D], or = if ``is_first``.

    A product in the dtype of ``total`` adds to it by itself. A narrower one takes some classes at a time, so that no
    second [V, D] is in memory.
    """
    if left.dtype == total.dtype:
        torch.addmm(total, left.T, right, beta=0 if is_first else 1, out=total)
        return
    for classes in chunks(len(total), max(1, chunk_size(total.shape[1], total.device) // 8)):
        product = left[:, classes].T @ right
        if is_first:
            total[classes] = product
        else:
            total[classes] += product


def _through_transform(gradient: Tensor, output: Tensor | None, head: Head) -> Tensor:
    """The chain rule through ``scale`` and ``softcap``; ``output``, the head's logits, is needed for a softcap only."""
    if output is not None and head.softcap is not None:
        gradient = gradient * (1 - (output / head.softcap).square())
    return gradient * head.scale if head.scale != 1.0 else gradient
