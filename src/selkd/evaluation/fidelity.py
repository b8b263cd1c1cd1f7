"""Fidelity: how close the student is to its teacher, and both to the text, on held-out samples."""

from dataclasses import dataclass

import torch
from accelerate import PartialState
from accelerate.utils import gather_object
from tqdm import tqdm
from transformers import PreTrainedModel

from selkd.data.batching import collate
from selkd.data.grouping import group_by_tokens
from selkd.data.samples import Sample, SampleDataset
from selkd.maths.chunked import chunk_size, chunks, wide
from selkd.maths.head import Head
from selkd.models.head import evaluating, head_of, hidden_states

TOKENS_AT_ONCE = 4096


@dataclass(frozen=True)
class Fidelity:
    """Means over ``positions`` held-out positions.

    Attributes:
        perplexity: exp of the student's mean cross-entropy with the text.
        kl_nats: mean KL(p || q) of teacher and student, temperature 1.
        top1_agreement: share of positions at which both rank the same class first.
        teacher_perplexity: the teacher's own.
        positions: how many positions were measured.
        teacher_tokens: tokens that the teacher ran on, padding included.
    """

    perplexity: float
    kl_nats: float
    top1_agreement: float
    teacher_perplexity: float
    positions: int
    teacher_tokens: int


def fidelity(
    student: PreTrainedModel,
    teacher: PreTrainedModel,
    samples: SampleDataset,
    dtype: torch.dtype,
    pad_token_id: int,
    n_classes: int,
    description: str = "evaluating",
) -> Fidelity:
    """Measure ``student`` against ``teacher`` on every valid position of ``samples``.

    The student's products run in ``dtype`` (autocast), the teacher's in its own dtype; sums are float64. Several
    processes share the work; each returns the whole result. ``n_classes``: how many classes both models share.
    """
    state = PartialState()
    groups = group_by_tokens(samples.lengths, TOKENS_AT_ONCE)[state.process_index :: state.num_processes]
    heads = head_of(student).narrowed(n_classes).to(dtype), head_of(teacher).narrowed(n_classes)
    sums = torch.zeros(6, dtype=torch.float64)
    with evaluating(student), evaluating(teacher):
        for group in tqdm(groups, desc=description, unit=" batches", disable=not state.is_main_process):
            sums += _sums(student, teacher, heads, [samples[index] for index in group], dtype, pad_token_id)
    if state.num_processes > 1:
        sums = torch.tensor(gather_object([sums.tolist()]), dtype=torch.float64).sum(dim=0)
    student_nll, teacher_nll, kl, agreed, positions, tokens = sums.tolist()
    return Fidelity(
        perplexity=float(torch.tensor(student_nll / positions, dtype=torch.float64).exp()),
        kl_nats=kl / positions,
        top1_agreement=agreed / positions,
        teacher_perplexity=float(torch.tensor(teacher_nll / positions, dtype=torch.float64).exp()),
        positions=int(positions),
        teacher_tokens=int(tokens),
    )


def _sums(
    student: PreTrainedModel,
    teacher: PreTrainedModel,
    heads: tuple[Head, Head],
    group: list[Sample],
    dtype: torch.dtype,
    pad_token_id: int,
) -> torch.Tensor:
    """Over one batch: student and teacher nll, KL, agreements, positions, tokens; float64 [6]."""
    batch = {name: tensor.to(student.device) for name, tensor in collate(group, pad_token_id).items()}
    valid = batch["valid_mask"]
    with torch.autocast(student.device.type, dtype=dtype, enabled=dtype != torch.float32):
        student_hidden = hidden_states(student, batch["input_ids"], batch["position_ids"])[valid]
    teacher_hidden = hidden_states(teacher, batch["input_ids"], batch["position_ids"])[valid]
    targets = batch["targets"][valid]
    sums = torch.zeros(4, dtype=torch.float64)
    for rows in chunks(len(targets), chunk_size(heads[0].n_classes, targets.device)):
        log_q = torch.log_softmax(wide(heads[0].logits(student_hidden[rows].to(dtype))), dim=-1)
        log_p = torch.log_softmax(wide(heads[1].logits(teacher_hidden[rows])), dim=-1)
        index = targets[rows, None]
        parts = [
            -log_q.gather(-1, index).sum(),
            -log_p.gather(-1, index).sum(),
            torch.linalg.vecdot(log_p.exp(), log_p - log_q).sum(),
            (log_q.argmax(dim=-1) == log_p.argmax(dim=-1)).sum(),
        ]
        sums += torch.stack([part.double().cpu() for part in parts])
    return torch.cat([sums, torch.tensor([len(targets), valid.numel()], dtype=torch.float64)])
