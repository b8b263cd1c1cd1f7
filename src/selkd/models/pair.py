"""The two models of a distillation, with their common tokenizer, vocabulary, padding and dtype of products.

Shapes: B batch, T positions, V classes, D hidden.
"""

import gc
from collections.abc import Callable, Mapping

import torch
import torch.distributed as dist
from accelerate import PartialState
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from selkd.maths.chunked import ChunkedLogits
from selkd.maths.head import Head
from selkd.models.head import head_of, hidden_states

Measure = Callable[[Tensor, Head], dict[str, Tensor]]
"""Makes tensors of a batch's hidden states [B, T, D] and the student's head."""
Load = Callable[[], PreTrainedModel]
"""Loads a model. It is called on first use, and again on the next use after the model's memory was freed."""


class ModelPair:
    """A student and its teacher over one vocabulary.

    Args:
        student: loads the small model, with float32 weights.
        teacher: loads the large model; None if nothing uses it.
        tokenizer: the tokenizer that both share.
        vocab_size: V, the number of classes that both share; families pad their vocabularies with unused rows.
        dtype: the dtype of the student's products, which run under autocast. The teacher's run in its weights' dtype.
    """

    def __init__(
        self,
        student: Load,
        teacher: Load | None,
        tokenizer: PreTrainedTokenizerBase,
        vocab_size: int,
        dtype: torch.dtype,
    ) -> None:
        self._student = ModelSlot(student)
        self._teacher = None if teacher is None else ModelSlot(teacher)
        self.tokenizer = tokenizer
        self.vocab_size = vocab_size
        self.dtype = dtype

    @property
    def student(self) -> PreTrainedModel:
        return self._student.model

    @property
    def teacher(self) -> PreTrainedModel:
        assert self._teacher is not None, "made without a teacher"
        return self._teacher.model

    @property
    def pad_token_id(self) -> int:
        return 0 if self.tokenizer.pad_token_id is None else int(self.tokenizer.pad_token_id)

    @property
    def student_head(self) -> Head:
        """The student's head over the shared classes, in the dtype of its products."""
        return head_of(self.student).slice_vocab(self.vocab_size).to(self.dtype)

    @property
    def teacher_head(self) -> Head:
        """The teacher's head over the shared classes, in its own dtype."""
        return head_of(self.teacher).slice_vocab(self.vocab_size)

    def student_hidden(self, batch: Mapping[str, Tensor]) -> Tensor:
        """The student's hidden states [B, T, D] of a batch of ``selkd.data.collate.collate``, under autocast."""
        device = self.student.device.type
        with torch.autocast(device, dtype=self.dtype, enabled=self.dtype != torch.float32):
            return hidden_states(self.student, batch["input_ids"], batch["position_ids"])

    @property
    def is_sharded(self) -> bool:
        """Whether FSDP2 shards the student: then each of its forwards needs all processes."""
        if not (dist.is_available() and dist.is_initialized()):
            return False
        from torch.distributed.fsdp import FSDPModule  # slow to import

        return isinstance(self.student, FSDPModule)

    @property
    def student_device(self) -> torch.device:
        """Where the student computes; the weights of a sharded one may be elsewhere."""
        return PartialState().device if self.is_sharded else self.student.device

    def through_student(self) -> Callable[[Mapping[str, Tensor], Measure], dict[str, Tensor]]:
        """A function of a batch and a ``Measure``: it runs the student's body and returns what is measured."""
        if self.is_sharded:
            return self._through_shards
        head = self.student_head  # cast once
        return lambda batch, measure: measure(self.student_hidden(batch), head)

    def _through_shards(self, batch: Mapping[str, Tensor], measure: Measure) -> dict[str, Tensor]:
        """The head is whole only within the whole model's forward, which a trainer gave its ``distillation``."""
        device = self.student_device.type

        def outside_autocast(hidden: Tensor, head: Head) -> dict[str, Tensor]:
            with torch.autocast(device, enabled=False):
                return measure(hidden, head.to(self.dtype))

        inputs = {name: batch[name] for name in ("input_ids", "position_ids")}
        with torch.autocast(device, dtype=self.dtype, enabled=self.dtype != torch.float32):
            measured: dict[str, Tensor] = self.student(**inputs, distillation=outside_autocast)
        return measured

    def teacher_hidden(self, batch: Mapping[str, Tensor]) -> Tensor:
        """The teacher's hidden states [B, T, D] of the same batch, on its own device and in its own dtype."""
        return hidden_states(self.teacher, batch["input_ids"], batch["position_ids"])

    def teacher_logits(self, batch: Mapping[str, Tensor]) -> ChunkedLogits:
        """The teacher's logits at the valid positions of the same batch, in the order of its mask. The body runs now,
        the head when logits are read."""
        hidden = self.teacher_hidden(batch)
        return ChunkedLogits(hidden[batch["valid_mask"].to(hidden.device)], self.teacher_head)

    def with_student(self, student: Load) -> "ModelPair":
        """A pair of another student and the same teacher, which is loaded once for both pairs."""
        pair = ModelPair(student, None, self.tokenizer, self.vocab_size, self.dtype)
        pair._teacher = self._teacher
        return pair

    def load_teacher(self) -> None:
        """Load the teacher now, if it is not in memory; nobody but the pair holds it then."""
        _ = self.teacher

    def release_student(self) -> None:
        """Free the student's memory; the next use loads it again."""
        self._student.release()

    def release_teacher(self) -> None:
        """Free the teacher's memory; the next use loads it again."""
        if self._teacher is not None:
            self._teacher.release()


class ModelSlot:
    """A model that is loaded on first use, and whose memory can be freed."""

    def __init__(self, load: Load) -> None:
        self._load = load
        self._model: PreTrainedModel | None = None

    @property
    def model(self) -> PreTrainedModel:
        if self._model is None:
            self._model = self._load()
        return self._model

    def release(self) -> None:
        """Free the model's memory; the next use loads it again."""
        self._model = None
        gc.collect()  # a student refers to itself through its bound loss
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
