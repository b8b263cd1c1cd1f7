"""A teacher model in memory. Training, the builder of a cache and its recheck all draw from its distribution here.

Shapes: B batch, T positions, N selected positions, n positions of a chunk, V classes, D hidden, C distinct classes,
u uniforms a position.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import cached_property

import torch
from torch import Tensor
from transformers import PreTrainedModel

from selkd.maths.chunked import ChunkedLogits, chunk_size, chunks, wide
from selkd.maths.finite import FiniteCheck, require_all_finite
from selkd.maths.head import Head
from selkd.maths.importance import statistics
from selkd.models.head import head_of, hidden_states, input_device
from selkd.recipe.choices import ClassOptions
from selkd.selection.classes import ClassSampler, Drawn, class_sampler
from selkd.selection.host import on_host, to_device, valid_index
from selkd.selection.randomness import position_uniforms
from selkd.teacher.targets import Batch, DrawnClasses, FullDistribution, Target, TruncatedDistribution


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
    has_kl = True

    def __init__(
        self, model: PreTrainedModel, classes: ClassOptions, temperature: float, seed: int, vocab_size: int
    ) -> None:
        self.model = model
        self.sampler = None if classes.sampler == "all" else class_sampler(classes)
        self.temperature = temperature
        self.seed = seed
        self.head = head_of(model).slice_vocab(vocab_size)

    @torch.no_grad()
    def targets(self, batch: Batch, step: int, *, for_loss: bool = True) -> "LiveTargets":
        """The targets of a batch at an optimiser step.

        Args:
            for_loss: whether classes will be drawn; False if the whole distributions are measured.
        """
        return self._targets(batch, self._uniforms(batch, "classes", step) if for_loss else None)

    @torch.inference_mode()
    def draws_to_store(self, batch: Batch, *, with_scalars: bool) -> list[tuple[DrawnClasses, Tensor | None]]:
        """What a cache stores for a batch, one entry a chunk: the draws, with integer counts, and the scalars if asked
        for, at the valid positions in order.

        The draws are a function of the seed and of the content of each sample. The scalars, [n, 2] or [n, 4], are H(p)
        and -log p(y) at temperature 1 and, where it is another, at the draws' temperature.

        Raises:
            RunError: a logit is not finite.
        """
        assert self.sampler is not None, "a cache holds drawn classes"
        valid = valid_index(batch)
        # The size of the chunks may change how logits are rounded, so it is fixed: a rebuilt cache is the same.
        size = max(1, chunk_size(self.head.vocab_size, self.head.weight.device) // 2)
        picked = self._targets(batch, self._uniforms(batch, "cache"), size).at(valid)
        targets, stored = batch["targets"].flatten()[valid], []
        for rows in chunks(len(valid), size):
            logits = picked.logits(rows)
            source = "the teacher's logits, for its cache"
            drawn = picked.drawing(logits, picked.index[rows], self.sampler.integers, source)
            stored.append((drawn, self._scalars(logits, targets[rows]) if with_scalars else None))
        require_all_finite(picked.checks)
        return stored

    def _scalars(self, logits: Tensor, targets: Tensor) -> Tensor:
        names, temperatures = ("teacher_entropy", "teacher_ce"), dict.fromkeys((1.0, self.temperature))
        least = torch.finfo(logits.dtype).min  # a class that the teacher rules out by -inf adds nothing to the entropy
        parts = [statistics(names, logits, (logits / each).clamp_(min=least), targets) for each in temperatures]
        return torch.cat(parts, dim=-1)

    def _uniforms(self, batch: Batch, *stream: int | str) -> Tensor | None:
        return class_uniforms(self.sampler, batch, self.seed, *stream)

    def _targets(self, batch: Batch, uniforms: Tensor | None, chunk: int | None = None) -> "LiveTargets":
        with torch.autocast(input_device(self.model).type, enabled=False):
            hidden = hidden_states(self.model, batch["input_ids"], batch["position_ids"])
        everywhere = torch.arange(batch["input_ids"].numel(), device=batch["input_ids"].device)
        drawing = Drawing(self.sampler, self.temperature, batch, uniforms)
        return LiveTargets(drawing, everywhere, self.head, hidden.flatten(0, 1), chunk)


def class_uniforms(sampler: ClassSampler | None, batch: Batch, seed: int, *stream: int | str) -> Tensor | None:
    """The random numbers that a sampler draws with at a batch's positions, float64 [B * T, u]; None without one."""
    return None if sampler is None else draw_uniforms_of(batch, seed, sampler.n_uniforms, *stream)


def draw_uniforms_of(batch: Batch, seed: int, count: int, *stream: int | str) -> Tensor:
    """``count`` random numbers for each of a batch's positions, float64 [B * T, count]; 0 where not valid."""
    host = on_host(batch)
    ids, valid = host["sample_ids"].numpy(), host["valid_mask"].numpy()
    noise = position_uniforms(seed, ids, valid, *stream, draws=count)
    return to_device(torch.from_numpy(noise).flatten(0, 1), batch["valid_mask"].device)


@dataclass(frozen=True)
class Drawing:
    """How classes are drawn from a teacher's distribution at the positions of a batch.

    Attributes:
        sampler: None: the whole distribution is the target.
        temperature: the criterion's; draws come from the distribution at this temperature.
        batch: names sample and position in errors.
        uniforms: float64 [B * T, u], or None if nothing will be drawn.
        checks: whether the distributions were finite that classes were drawn from.
    """

    sampler: ClassSampler | None
    temperature: float
    batch: Batch
    uniforms: Tensor | None
    checks: list[FiniteCheck] = field(default_factory=list)

    def __call__(
        self, logits: Tensor, index: Tensor, draw: Callable[[Tensor, Tensor], Drawn], source: str
    ) -> DrawnClasses:
        """The classes that ``draw`` takes from probabilities [n, V] by uniforms [n, u]; ``checks`` get one more.

        Args:
            logits: the teacher's, [n, V].
            index: their positions, int64 [n], in the flat batch.
            source: the logits' name in errors.
        """
        assert self.uniforms is not None, "targets were made with for_loss=False"
        probabilities = torch.softmax(logits / self.temperature, dim=-1)
        self.checks.append(FiniteCheck.of(probabilities.sum(dim=-1), index, self.batch, source))
        if self.sampler is not None and self.sampler.is_own:  # a user's function must not get what is not finite
            require_all_finite(self.checks)
        class_ids, counts = draw(probabilities, self.uniforms[index])
        return DrawnClasses(class_ids, counts, _entropy(logits, probabilities) if self.knows_entropy else None)

    @property
    def knows_entropy(self) -> bool:
        """Whether the draws are unbiased ones at temperature 1, so that with H(p) they give KL(p || q)."""
        return self.sampler is not None and self.sampler.is_unbiased and self.temperature == 1.0


def _entropy(logits: Tensor, probabilities: Tensor) -> Tensor:
    """H(p) in nats, [n], of logits [n, V] and their softmax; no logarithm of all classes is taken again."""
    highest, at = probabilities.max(dim=-1, keepdim=True)
    # A class that is ruled out by -inf gives NaN here and counts as 0; `Drawing` checks for other NaN.
    mean_log_p = (logits - logits.gather(-1, at)).mul_(probabilities).nansum(dim=-1) + highest.squeeze(-1).log()
    return mean_log_p.neg_().clamp_(min=0)


@dataclass(frozen=True)
class WholeTargets(ABC):
    """A teacher's targets at some positions of a batch, where its whole distribution can be computed.

    Attributes:
        index: int64 [N], the positions in the flat batch [B * T].
    """

    drawing: Drawing
    index: Tensor

    @property
    def checks(self) -> list[FiniteCheck]:
        return self.drawing.checks

    @abstractmethod
    def at(self, index: Tensor) -> "WholeTargets":
        """The targets at some of these positions, int64 [n]."""

    @abstractmethod
    def logits(self, rows: slice) -> Tensor:
        """The teacher's logits [n, V] at some of the positions, which the caller may overwrite."""

    @property
    def knows_kl(self) -> bool:
        return self.drawing.sampler is None or self.drawing.knows_entropy

    def scored_by(self) -> Callable[[slice], Tensor]:
        return self.logits

    def chunk(self, rows: slice) -> Target:
        sampler = self.drawing.sampler
        if sampler is None:
            return FullDistribution(self.logits(rows))
        drawn = self.drawing(self.logits(rows), self.index[rows], sampler, "the teacher's logits")
        return TruncatedDistribution(drawn.class_ids, drawn.counts.log()) if sampler.keeps_tail else drawn


@dataclass(frozen=True)
class LiveTargets(WholeTargets):
    """The targets of a teacher's hidden states. Its head runs a chunk of positions at a time.

    Attributes:
        hidden_states: [N, D], on the teacher's device.
        chunk_positions: the positions of one product with the head; None: as many as memory allows.
    """

    head: Head
    hidden_states: Tensor
    chunk_positions: int | None = None

    def at(self, index: Tensor) -> "LiveTargets":
        hidden = self.hidden_states[index.to(self.hidden_states.device)]
        return replace(self, index=self.index[index], hidden_states=hidden)

    def logits(self, rows: slice) -> Tensor:
        return self._logits(rows).to(self.index.device)

    @cached_property
    def _logits(self) -> ChunkedLogits:
        return ChunkedLogits(self.hidden_states, self.head, self.chunk_positions)


@dataclass(frozen=True)
class LogitsTargets(WholeTargets):
    """The targets of a teacher whose logits are all in memory.

    Attributes:
        all_logits: [B * T, V], in any dtype and on any device.
    """

    all_logits: Tensor

    def at(self, index: Tensor) -> "LogitsTargets":
        return replace(self, index=self.index[index])

    def logits(self, rows: slice) -> Tensor:
        picked = self.index[rows]
        return wide(self.all_logits[picked.to(self.all_logits.device)]).to(picked.device)
