"""A teacher model in memory. Training, the builder of a cache and its recheck all draw from its distribution here.

Shapes: B batch, T positions, N selected positions, n positions of a chunk, V classes, D hidden, C distinct classes,
u uniforms a position.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cached_property

import torch
from torch import Tensor
from transformers import PreTrainedModel

from selkd.maths.chunked import ChunkedLogits, chunk_size, chunks
from selkd.maths.finite import require_finite
from selkd.models.head import head_of, hidden_states, input_device
from selkd.recipe.choices import ClassOptions
from selkd.selection.classes import Drawn, class_sampler
from selkd.selection.randomness import position_uniforms
from selkd.teacher.targets import Batch, DrawnClasses, FullDistribution, Target


class LiveTeacher:
    """A teacher model in memory. With a class sampler, it draws anew at every optimiser step.

    Args:
        model: in evaluation mode, on any device; its logits are moved to the batch's device.
        classes: which classes are compared: all, or those that a sampler draws.
        temperature: the criterion's; draws come from the distribution at this temperature.
        seed: the run's.
        vocab_size: the number of classes that teacher and student share.
    """

    is_live = True

    def __init__(
        self, model: PreTrainedModel, classes: ClassOptions, temperature: float, seed: int, vocab_size: int
    ) -> None:
        self.model = model
        self.sampler = None if classes.sampler == "all" else class_sampler(classes)
        self.temperature = temperature
        self.seed = seed
        self.head = head_of(model).slice_vocab(vocab_size)

    @torch.no_grad()
    def targets(self, batch: Batch, step: int, *, draws: bool = True) -> "LiveTargets":
        """The targets of a batch at an optimiser step.

        Args:
            draws: whether classes will be drawn; False if only ``logits`` will be called.
        """
        return self._targets(batch, self._uniforms(batch, "classes", step) if draws else None)

    @torch.inference_mode()
    def draws_to_store(self, batch: Batch) -> list[DrawnClasses]:
        """The draws that a cache stores for a batch: integer counts at the valid positions in order, one entry a chunk.

        They are a function of the seed and of the content of each sample. Raises RunError if a logit is not finite.
        """
        assert self.sampler is not None, "a cache holds drawn classes"
        valid = batch["valid_mask"].flatten().nonzero().flatten()
        # The size of the chunks may change how logits are rounded, so it is fixed: a rebuilt cache is the same.
        size = chunk_size(self.head.vocab_size, self.head.weight.device)
        picked = self._targets(batch, self._uniforms(batch, "cache"), size).at(valid)
        source = "the teacher's logits, for its cache"
        return [picked.drawn(rows, self.sampler.integers, source) for rows in chunks(len(valid), size)]

    def _uniforms(self, batch: Batch, *stream: int | str) -> Tensor | None:
        """The random numbers that the sampler draws with, float64 [B * T, u]; None without a sampler."""
        if self.sampler is None:
            return None
        ids, valid = batch["sample_ids"].cpu().numpy(), batch["valid_mask"].cpu().numpy()
        noise = position_uniforms(self.seed, ids, valid, *stream, draws=self.sampler.n_uniforms)
        return torch.from_numpy(noise).flatten(0, 1).to(batch["input_ids"].device)

    def _targets(self, batch: Batch, uniforms: Tensor | None, chunk: int | None = None) -> "LiveTargets":
        with torch.autocast(input_device(self.model).type, enabled=False):
            hidden = hidden_states(self.model, batch["input_ids"], batch["position_ids"])
        everywhere = torch.arange(batch["input_ids"].numel(), device=batch["input_ids"].device)
        return LiveTargets(self, batch, everywhere, hidden.flatten(0, 1), uniforms, chunk)


@dataclass(frozen=True)
class LiveTargets:
    """A live teacher's targets at some positions of a batch. Its head runs a chunk of positions at a time.

    Attributes:
        index: int64 [N], the positions in the flat batch [B * T].
        hidden_states: [N, D], on the teacher's device.
        uniforms: float64 [N, u], or None if nothing will be drawn.
        chunk_positions: the positions of one product with the head; None: as many as memory allows.
    """

    teacher: LiveTeacher
    batch: Batch
    index: Tensor
    hidden_states: Tensor
    uniforms: Tensor | None
    chunk_positions: int | None

    def at(self, index: Tensor) -> "LiveTargets":
        return replace(
            self,
            index=self.index[index],
            hidden_states=self.hidden_states[index.to(self.hidden_states.device)],
            uniforms=None if self.uniforms is None else self.uniforms[index],
        )

    def logits(self, rows: slice) -> Tensor:
        return self._logits(rows).to(self.index.device)

    def chunk(self, rows: slice) -> Target:
        sampler = self.teacher.sampler
        return FullDistribution(self.logits(rows)) if sampler is None else self.drawn(rows, sampler)

    def drawn(
        self, rows: slice, draw: Callable[[Tensor, Tensor], Drawn], source: str = "the teacher's logits"
    ) -> DrawnClasses:
        """The classes that ``draw`` takes from probabilities [n, V], at the teacher's temperature, by uniforms [n, u].

        Raises RunError if a probability is not finite; the message names ``source``.
        """
        assert self.uniforms is not None, "targets were made with draws=False"
        probabilities = torch.softmax(self.logits(rows) / self.teacher.temperature, dim=-1)
        require_finite(probabilities.sum(dim=-1), self.index[rows], self.batch, source)
        return DrawnClasses(*draw(probabilities, self.uniforms[rows]))

    @cached_property
    def _logits(self) -> ChunkedLogits:
        return ChunkedLogits(self.hidden_states, self.teacher.head, self.chunk_positions)
