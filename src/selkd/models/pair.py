"""The two models of a distillation, with their common tokenizer, vocabulary, padding and dtype of products.

Shapes: B batch, T positions, V classes, D hidden.
"""

import gc
from collections.abc import Callable, Mapping

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from selkd.maths.chunked import ChunkedLogits
from selkd.maths.head import Head
from selkd.models.head import head_of, hidden_states

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
