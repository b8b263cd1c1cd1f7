"""Scoring: one pass of the frozen initial student over all samples, one number each.

Shapes: B batch, T positions, N valid positions, V classes.
"""

from collections.abc import Callable

import numpy as np
import torch
from accelerate import PartialState
from accelerate.utils import gather_object
from torch import Tensor
from tqdm import tqdm
from transformers import PreTrainedModel

from selkd.data.collate import collate, group_by_tokens
from selkd.data.samples import Sample, SampleDataset
from selkd.maths.chunked import ChunkedLogits, chunked_statistics
from selkd.maths.finite import require_finite
from selkd.maths.head import Head
from selkd.maths.importance import statistics
from selkd.models.head import head_of, hidden_states
from selkd.plugins import Metric
from selkd.selection.randomness import sample_generator
from selkd.selection.two_stage import Estimator

TOKENS_AT_ONCE = 4096


def score_samples(
    metric: str,
    samples: SampleDataset,
    student: Callable[[], PreTrainedModel],
    teacher: Callable[[], PreTrainedModel],
    dtype: torch.dtype,
    pad_token_id: int,
    vocab_size: int,
    seed: int,
    estimator: Estimator | None = None,
) -> tuple[np.ndarray, int]:
    """The score of every sample, float64 [N], and the tokens that the teacher ran on, padding included.

    ``student_entropy`` and ``kl``: the mean over its valid positions, in nats. ``ce_ratio``: the ratio of the
    sample's mean cross-entropies. ``random``: uniform noise of (seed, sample id). A sample without a valid position
    scores 0. Several processes share the work; each returns all scores.

    Args:
        student, teacher: give the initial student, read under autocast to ``dtype``, and the teacher; called only if
            the metric needs them.
        vocab_size: how many classes they share.
        estimator: estimates ``student_entropy``; None: exact.
    """
    entry = Metric.find(metric)
    if entry.is_noise:
        return np.array([sample_generator(seed, sample_id, "samples").random() for sample_id in samples.ids]), 0
    state = PartialState()
    groups = group_by_tokens(samples.lengths, TOKENS_AT_ONCE)
    mine = groups[state.process_index :: state.num_processes]
    scoring = _Scoring(entry, student(), teacher() if entry.needs_teacher else None, dtype, vocab_size, estimator)
    found: list[tuple[int, float]] = []
    with tqdm(total=sum(map(len, mine)), desc="scoring", unit=" samples", disable=not state.is_main_process) as bar:
        for group in mine:
            found += zip(group, scoring([samples[index] for index in group], pad_token_id), strict=True)
            bar.update(len(group))
    tokens = scoring.teacher_tokens
    if state.num_processes > 1:
        found, tokens = gather_object(found), sum(gather_object([tokens]))
    scores = np.zeros(len(samples))
    for index, value in found:
        scores[index] = value
    return scores, tokens


class _Scoring:
    def __init__(
        self,
        metric: Metric,
        student: PreTrainedModel,
        teacher: PreTrainedModel | None,
        dtype: torch.dtype,
        vocab_size: int,
        estimator: Estimator | None,
    ) -> None:
        assert estimator is None or metric.name == "student_entropy", "an estimate is of the student's entropy"
        self.metric = metric
        self.student, self.teacher = student.eval(), teacher
        self.dtype = dtype
        self.head = head_of(student).slice_vocab(vocab_size).to(dtype)
        self.estimator = estimator
        self.teacher_head: Head | None = None if teacher is None else head_of(teacher).slice_vocab(vocab_size)
        self.teacher_tokens = 0

    @torch.inference_mode()
    def __call__(self, group: list[Sample], pad_token_id: int) -> list[float]:
        """The scores of one batch of samples."""
        device = self.student.device
        batch = {name: tensor.to(device) for name, tensor in collate(group, pad_token_id).items()}
        valid_mask, inputs = batch["valid_mask"], (batch["input_ids"], batch["position_ids"])
        with torch.autocast(device.type, dtype=self.dtype, enabled=self.dtype != torch.float32):
            hidden = hidden_states(self.student, *inputs)
        columns = self._statistics(hidden, batch)
        index = valid_mask.flatten().nonzero().flatten()
        require_finite(columns.sum(dim=-1), index, batch, "the initial student's or the teacher's logits, in scoring")
        sums = columns.new_zeros(len(group), columns.shape[1]).index_add_(0, valid_mask.nonzero()[:, 0], columns)
        means = sums / valid_mask.sum(dim=-1, keepdim=True).clamp(min=1)
        scores = self.metric.combine(dict(zip(self.metric.statistics, means.T, strict=True)), valid_mask.any(dim=-1))
        return scores.tolist()

    def _statistics(self, hidden: Tensor, batch: dict[str, Tensor]) -> Tensor:
        """The metric's statistics at the valid positions, [N, m], of the student's hidden states [B, T, D]."""
        valid_mask = batch["valid_mask"]
        if self.estimator is not None:
            of_samples = [
                self.estimator(row[mask], self.head, "samples") for row, mask in zip(hidden, valid_mask, strict=True)
            ]
            return torch.cat(of_samples).unsqueeze(-1)
        teachers_logits = None
        if self.teacher is not None and self.teacher_head is not None:
            of_teacher = hidden_states(self.teacher, batch["input_ids"], batch["position_ids"])
            teacher_hidden = of_teacher[valid_mask.to(self.teacher.device)]
            teachers_logits = ChunkedLogits(teacher_hidden, self.teacher_head)
            self.teacher_tokens += valid_mask.numel()
        names, targets = self.metric.statistics, batch["targets"][valid_mask]

        def compute(student_logits: Tensor, rows: slice) -> Tensor:
            teacher_logits = None if teachers_logits is None else teachers_logits(rows).to(student_logits.device)
            return statistics(names, student_logits, teacher_logits, targets[rows])

        return chunked_statistics(hidden[valid_mask], self.head, compute, n_statistics=len(names))
