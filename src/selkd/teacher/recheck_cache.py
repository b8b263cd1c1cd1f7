"""Stored draws against a teacher that runs again, by its probabilities.

Shapes: n positions, V classes, C distinct drawn classes.
"""

from collections.abc import Callable, Container, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedModel

from selkd.cache.rows import Rows
from selkd.data.collate import TOKENS_AT_ONCE, group_by_tokens
from selkd.data.samples import Sample, SampleDataset
from selkd.errors import InputError
from selkd.recipe.choices import ClassOptions
from selkd.teacher.build_cache import Drawing, plan_shards


@dataclass(frozen=True)
class Again:
    """What a teacher that ran again says of the rows stored of one sample of n positions.

    Attributes:
        is_identical: bool [n], the same seed draws the same classes and counts again.
        squared_error: float64 [n], of the stored counts / total against their mean under the teacher's probabilities.
        expected: float64 [n], what it is on average where the counts were drawn from these probabilities.
    """

    is_identical: np.ndarray
    squared_error: np.ndarray
    expected: np.ndarray


def compare_again(
    model: PreTrainedModel,
    samples: SampleDataset,
    indices: Sequence[int],
    classes: ClassOptions,
    temperature: float,
    seed: int,
    vocab_size: int,
    pad_token_id: int,
    stored: Callable[[bytes], Rows],
) -> dict[int, Again]:
    """Some samples of a cache against the teacher, in the batches in which ``build_cache`` runs it on ``samples``.

    So on the same hardware the draws are the same to the last count, where the cache was built for these samples and no
    others. ``stored`` gives the rows of a sample.
    """
    draw = Drawing(model, classes, temperature, seed, vocab_size, pad_token_id)
    wanted = {samples.ids[index]: index for index in indices}
    found: dict[int, Again] = {}
    for shard in plan_shards(samples):
        if wanted.keys().isdisjoint(samples.ids[index] for index in shard):
            continue
        for group in group_by_tokens(samples.lengths[shard], TOKENS_AT_ONCE):
            members = [samples[shard[place]] for place in group]
            if wanted.keys().isdisjoint(sample.id for sample in members):
                continue
            for sample_id, again in _compared(draw, members, stored, wanted.keys()):
                found[wanted[sample_id]] = again
    return found


def _compared(
    draw: Drawing, members: list[Sample], stored: Callable[[bytes], Rows], wanted: Container[bytes]
) -> Iterator[tuple[bytes, Again]]:
    """The ``wanted`` samples among those of one batch of the teacher."""
    n_valid = [int(sample.valid_mask.sum()) for sample in members]
    rows = [stored(sample.id) if sample.id in wanted else None for sample in members]
    for sample, n, each in zip(members, n_valid, rows, strict=True):
        if each is not None and len(each.row_lengths) != n:
            raise InputError(f"sample {sample.id.hex()} has {len(each.row_lengths)} stored positions, the text {n}")
    class_ids, counts = _padded(rows, n_valid)
    errors, expected, same = [], [], []

    def observe(probabilities: Tensor, drawn: tuple[Tensor, Tensor], at: slice) -> None:
        device = probabilities.device
        ids, weights = class_ids[at].to(device), counts[at].to(device, probabilities.dtype) / draw.sampler.total
        mean, variance = draw.sampler.moments(probabilities, draw.sampler.draws)
        dense = torch.zeros_like(mean).scatter_add_(-1, ids, weights)
        errors.append((dense - mean).square().sum(dim=-1).double().cpu())
        expected.append(variance.double().cpu())
        again = torch.zeros_like(mean).scatter_add_(-1, drawn[0], drawn[1].to(mean.dtype) / draw.sampler.total)
        same.append((again == dense).all(dim=-1).cpu())

    draw.group(members, observe)
    cuts = np.cumsum(n_valid)[:-1]
    columns = (np.split(torch.cat(each).numpy(), cuts) for each in (same, errors, expected))
    for sample, row, *values in zip(members, rows, *columns, strict=True):
        if row is not None:
            yield sample.id, Again(*values)


def _padded(rows: Sequence[Rows | None], n_valid: Sequence[int]) -> tuple[Tensor, Tensor]:
    """Class ids and counts int64 [sum(n_valid), C] of samples one after the other; a None has rows of count 0."""
    lengths = np.concatenate(
        [np.zeros(n) if row is None else row.row_lengths for row, n in zip(rows, n_valid, strict=True)]
    )
    filled = np.arange(int(lengths.max(initial=1))) < lengths[:, None]
    there = [row for row in rows if row is not None]
    padded = []
    for flat in ([row.class_ids for row in there], [row.counts for row in there]):
        values = np.zeros(filled.shape, np.int64)
        values[filled] = np.concatenate(flat)
        padded.append(torch.from_numpy(values))
    return padded[0], padded[1]
