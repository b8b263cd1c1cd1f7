"""The two models of a distillation, with what they share: tokenizer, vocabulary, padding, dtype of the products.

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
"""Loads a model. A pair calls it when the model is first asked for, and again where its memory was freed."""


class ModelPair:
    """A student and its teacher over one vocabulary.

    Args:
        student: loads the small model, float32 weights.
        teacher: loads the large one; None where nothing asks for it.
        tokenizer: the tokenizer that both share.
        vocab_size: V, how many classes both share; families pad their vocabularies with unused rows.
        dtype: of the student's products, which run under autocast. The teacher's are in its own weights' dtype.
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
        """The teacher's logits at the valid positions of the same batch, in the order of its mask: its body runs now,
        its head when they are asked for."""
        hidden = self.teacher_hidden(batch)
        return ChunkedLogits(hidden[batch["valid_mask"].to(hidden.device)], self.teacher_head)

    def with_student(self, student: Load) -> "ModelPair":
        """Another student beside the same teacher, which is loaded once for both pairs."""
        other = ModelPair(student, None, self.tokenizer, self.vocab_size, self.dtype)
        other._teacher = self._teacher
        return other

    def release_student(self) -> None:
        """Free the student's memory; it is loaded anew when it is asked for."""
        self._student.release()

    def release_teacher(self) -> None:
        """Free the teacher's memory; it is loaded anew when it is asked for."""
        if self._teacher is not None:
            self._teacher.release()


class ModelSlot:
    """A model that is loaded when it is first asked for, and whose memory can be freed."""

    def __init__(self, load: Load) -> None:
        self._load = load
        self._model: PreTrainedModel | None = None

    @property
    def model(self) -> PreTrainedModel:
        if self._model is None:
            self._model = self._load()
        return self._model

    def release(self) -> None:
        """Free the model's memory; it is loaded anew when it is asked for."""
        self._model = None
        gc.collect()  # a student holds itself through its bound loss
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
