"""Fidelity: how close the student is to its teacher, and both to the text, on held-out samples.

Legend: S samples, K entropy buckets, N positions of a batch, V classes.
"""

import math
from dataclasses import asdict, dataclass

import torch
from accelerate import PartialState
from accelerate.utils import gather_object
from tqdm import tqdm
from transformers import PreTrainedModel

from selkd.data.collate import collate, group_by_tokens
from selkd.data.samples import Sample, SampleDataset
from selkd.maths.chunked import chunk_size, chunks, wide
from selkd.maths.finite import not_finite
from selkd.maths.head import Head
from selkd.models.head import evaluating, head_of, hidden_states

TOKENS_AT_ONCE = 4096
ENTROPY_EDGES = (0.1, 0.5, 1.0, 2.0, 4.0)
"""Where the buckets of the teacher's entropy end, in nats; the last one is open."""
STATISTICS = ("student_entropy", "teacher_entropy", "student_ce", "teacher_ce", "kl", "reverse_kl")
_POSITIONS, _STUDENT_NLL, _TEACHER_NLL, _KL, _AGREED = range(5)


@dataclass(frozen=True)
class EntropyBucket:
    """Means over the positions at which the teacher's entropy lies in one range.

    Attributes:
        from_nats, to_nats: the range; ``to_nats`` is not in it, None: open.
        positions: how many there are; the means are None where there are none.
        cross_entropy_nats, teacher_cross_entropy_nats, kl_nats, top1_agreement: as in ``Fidelity``, the cross-entropy
            in place of its exponential.
    """

    from_nats: float
    to_nats: float | None
    positions: int
    cross_entropy_nats: float | None
    teacher_cross_entropy_nats: float | None
    kl_nats: float | None
    top1_agreement: float | None


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
        sums: float64 [S, K, 5]: for each sample and bucket the positions, the student's and the teacher's
            cross-entropy, the KL and the agreements, all summed.
        statistics: what position metrics are made of (``STATISTICS``), float32 [positions] each.
        sample_of: the sample of each position, int64 [positions]; those of a sample are in their order.
    """

    perplexity: float
    kl_nats: float
    top1_agreement: float
    teacher_perplexity: float
    positions: int
    teacher_tokens: int
    sums: torch.Tensor
    statistics: dict[str, torch.Tensor]
    sample_of: torch.Tensor

    def by_entropy(self) -> list[dict[str, float | int | None]]:
        """The means by bucket of the teacher's entropy, as plain data: positions are the same for every student."""
        edges = (0.0, *ENTROPY_EDGES)
        buckets = []
        for bucket, (sums, start) in enumerate(zip(self.sums.sum(dim=0).tolist(), edges, strict=True)):
            end = ENTROPY_EDGES[bucket] if bucket < len(ENTROPY_EDGES) else None
            count, *totals = sums
            means = [total / count if count else None for total in totals]
            buckets.append(asdict(EntropyBucket(start, end, int(count), *means)))
        return buckets


def fidelity(
    student: PreTrainedModel,
    teacher: PreTrainedModel,
    samples: SampleDataset,
    dtype: torch.dtype,
    pad_token_id: int,
    vocab_size: int,
    description: str = "evaluating",
) -> Fidelity:
    """Measure ``student`` against ``teacher`` on every valid position of ``samples``.

    The student's products run in ``dtype`` (autocast), the teacher's in its own dtype; sums are float64. Several
    processes share the work; each returns the whole result. ``vocab_size``: how many classes both models share.

    Raises:
        RunError: a figure is not finite.
    """
    state = PartialState()
    groups = group_by_tokens(samples.lengths, TOKENS_AT_ONCE)[state.process_index :: state.num_processes]
    heads = head_of(student).slice_vocab(vocab_size).to(dtype), head_of(teacher).slice_vocab(vocab_size)
    sums = torch.zeros(len(samples), len(ENTROPY_EDGES) + 1, 5, dtype=torch.float64)
    tokens, columns, owners = 0, [torch.zeros(0, len(STATISTICS))], [torch.zeros(0, dtype=torch.int64)]
    with evaluating(student), evaluating(teacher):
        for group in tqdm(groups, desc=description, unit=" batches", disable=not state.is_main_process):
            batch = [samples[index] for index in group]
            sums[group], of_positions, sample_of = _sums(student, teacher, heads, batch, dtype, pad_token_id)
            columns.append(of_positions)
            owners.append(torch.tensor(group)[sample_of])
            tokens += len(batch) * max(len(sample.token_ids) for sample in batch)
    if state.num_processes > 1:
        found = gather_object([(sums, tokens, torch.cat(columns), torch.cat(owners))])
        sums = torch.stack([part for part, *_ in found]).sum(dim=0)
        tokens = sum(count for _, count, *_ in found)
        columns, owners = [part for *_, part, _ in found], [part for *_, part in found]
    positions, student_nll, teacher_nll, kl, agreed = sums.sum(dim=(0, 1)).tolist()
    figures = {
        "perplexity": float(torch.tensor(student_nll / positions, dtype=torch.float64).exp()),
        "kl_nats": kl / positions,
        "top1_agreement": agreed / positions,
        "teacher_perplexity": float(torch.tensor(teacher_nll / positions, dtype=torch.float64).exp()),
    }
    for name, value in figures.items():
        if not math.isfinite(value):
            raise not_finite(f"fidelity, {name}", value)
    return Fidelity(
        **figures,
        positions=int(positions),
        teacher_tokens=tokens,
        sums=sums,
        statistics=dict(zip(STATISTICS, torch.cat(columns).unbind(dim=1), strict=True)),
        sample_of=torch.cat(owners),
    )


def _sums(
    student: PreTrainedModel,
    teacher: PreTrainedModel,
    heads: tuple[Head, Head],
    group: list[Sample],
    dtype: torch.dtype,
    pad_token_id: int,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """``Fidelity.sums`` of one batch, float64 [len(group), K, 5]; statistics [n, 6] and rows [n] of its positions."""
    batch = {name: tensor.to(student.device) for name, tensor in collate(group, pad_token_id).items()}
    valid = batch["valid_mask"]
    with torch.autocast(student.device.type, dtype=dtype, enabled=dtype != torch.float32):
        student_hidden = hidden_states(student, batch["input_ids"], batch["position_ids"])[valid]
    teacher_hidden = hidden_states(teacher, batch["input_ids"], batch["position_ids"])
    teacher_hidden = teacher_hidden[valid.to(teacher_hidden.device)]
    targets, sample_of = batch["targets"][valid], valid.nonzero()[:, 0].cpu()
    edges = torch.tensor(ENTROPY_EDGES, device=targets.device)
    n_buckets = len(ENTROPY_EDGES) + 1
    sums, statistics = torch.zeros(len(group) * n_buckets, 5, dtype=torch.float64), [torch.zeros(0, len(STATISTICS))]
    for rows in chunks(len(targets), chunk_size(heads[0].vocab_size, targets.device)):
        log_q = torch.log_softmax(wide(heads[0].logits(student_hidden[rows].to(dtype))), dim=-1)
        log_p = torch.log_softmax(wide(heads[1].logits(teacher_hidden[rows])).to(targets.device), dim=-1)
        p, q, index = log_p.exp(), log_q.exp(), targets[rows, None]
        parts = {
            _POSITIONS: torch.ones_like(log_p[:, 0]),
            _STUDENT_NLL: -log_q.gather(-1, index)[:, 0],
            _TEACHER_NLL: -log_p.gather(-1, index)[:, 0],
            _KL: torch.linalg.vecdot(p, log_p - log_q),
            _AGREED: log_q.argmax(dim=-1) == log_p.argmax(dim=-1),
        }
        entropy = -torch.linalg.vecdot(p, log_p)
        bucket = torch.bucketize(entropy, edges.to(entropy.dtype), right=True).cpu()
        values = torch.stack([parts[column].double() for column in range(5)], dim=1).cpu()
        sums.index_add_(0, sample_of[rows] * n_buckets + bucket, values)
        of_positions = {
            "student_entropy": -torch.linalg.vecdot(q, log_q),
            "teacher_entropy": entropy,
            "student_ce": parts[_STUDENT_NLL],
            "teacher_ce": parts[_TEACHER_NLL],
            "kl": parts[_KL],
            "reverse_kl": torch.linalg.vecdot(q, log_q - log_p),
        }
        statistics.append(torch.stack([of_positions[name].float() for name in STATISTICS], dim=1).cpu())
    return sums.view(len(group), n_buckets, 5), torch.cat(statistics), sample_of
