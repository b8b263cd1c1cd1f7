"""Scoring: one pass of the frozen initial student over all samples, one number each.

Shapes: B batch, T positions, D hidden.
"""

from functools import partial

import numpy as np
import torch
from accelerate import PartialState
from accelerate.utils import gather_object
from tqdm import tqdm
from transformers import PreTrainedModel

from selkd.data.batching import collate
from selkd.data.grouping import group_by_tokens
from selkd.data.samples import Sample, SampleDataset
from selkd.maths.chunked import chunked_entropy
from selkd.maths.head import Head
from selkd.models.head import head_of, hidden_states
from selkd.selection.noise import sample_generator

TOKENS_AT_ONCE = 4096


def score_samples(
    metric: str,
    samples: SampleDataset,
    student: PreTrainedModel,
    dtype: torch.dtype,
    pad_token_id: int,
    n_classes: int,
    seed: int,
) -> np.ndarray:
    """The score of every sample, float64 [N]: the mean over its valid positions of ``metric``.

    ``student_entropy``: H(q_t) in nats, exact. ``random``: uniform noise of (seed, sample id). A sample without a
    valid position scores 0. Several processes share the work; each returns all scores.

    Args:
        student: the initial student; read under autocast to ``dtype``, not changed.
        n_classes: how many classes it shares with the teacher.
    """
    if metric == "random":
        return np.array([sample_generator(seed, sample_id, "samples").random() for sample_id in samples.ids])
    state = PartialState()
    groups = group_by_tokens(samples.lengths, TOKENS_AT_ONCE)
    mine = groups[state.process_index :: state.num_processes]
    head = head_of(student).narrowed(n_classes).to(dtype)
    score = partial(_mean_entropies, student.eval(), head, dtype, pad_token_id)
    found: list[tuple[int, float]] = []
    with tqdm(total=sum(map(len, mine)), desc="scoring", unit=" samples", disable=not state.is_main_process) as bar:
        for group in mine:
            found += zip(group, score([samples[index] for index in group]), strict=True)
            bar.update(len(group))
    scores = np.zeros(len(samples))
    for index, value in gather_object(found) if state.num_processes > 1 else found:
        scores[index] = value
    return scores


@torch.inference_mode()
def _mean_entropies(
    student: PreTrainedModel, head: Head, dtype: torch.dtype, pad_token_id: int, group: list[Sample]
) -> list[float]:
    batch = {name: tensor.to(student.device) for name, tensor in collate(group, pad_token_id).items()}
    valid_mask = batch["valid_mask"]
    device = valid_mask.device.type
    with torch.autocast(device, dtype=dtype, enabled=dtype != torch.float32):
        hidden = hidden_states(student, batch["input_ids"], batch["position_ids"])
    entropies = chunked_entropy(hidden[valid_mask], head)
    sums = entropies.new_zeros(len(group)).index_add_(0, valid_mask.nonzero()[:, 0], entropies)
    return (sums / valid_mask.sum(dim=-1).clamp(min=1)).tolist()
