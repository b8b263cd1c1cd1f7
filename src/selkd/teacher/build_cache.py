"""Building a teacher cache: the teacher's body once over the kept samples, its head and the draws a chunk at a time.

Draws depend on (seed, sample content) alone and the teacher's batches on the data alone, so a cache built again, or
by several processes, is the same.
"""

from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import numpy as np
from accelerate import PartialState
from accelerate.utils import gather_object
from tqdm import tqdm

from selkd.cache.manifest import Fingerprint
from selkd.cache.writer import CacheWriter, SampleRows
from selkd.data.collate import TOKENS_AT_ONCE, collate, group_by_tokens
from selkd.data.samples import Sample, SampleDataset
from selkd.teacher.live import LiveTeacher

# A shard stores how often each class is drawn: some 30 kB at 50,000 classes, which a small shard would not repay.
SHARD_TOKENS = 2**17


def build_cache(
    directory: Path,
    fingerprint: Fingerprint,
    samples: SampleDataset,
    teacher: Callable[[], LiveTeacher],
    pad_token_id: int,
    *,
    repair: bool = False,
) -> int:
    """Build, or finish, the cache of ``samples`` in ``directory``. Shards that are there and whole are kept.

    Args:
        fingerprint: everything that determines the draws; ``vocabulary`` is how many classes both models share.
        teacher: gives the teacher, with a class sampler; called only if a shard is missing.
        repair: also write a lost or damaged plan anew, where the folder's shards show that it is this cache's.

    Returns:
        The tokens, padding included, that the teacher's body ran on, all processes together.

    Raises:
        InputError: the folder is not such a cache's. RunError: the disk refused; finished shards stay.
    """
    state = PartialState()
    shards = plan_shards(samples)
    with state.main_process_first():  # the first one claims the folder
        shard_ids = [[samples.ids[i] for i in shard] for shard in shards]
        writer = CacheWriter(directory, fingerprint, shard_ids, repair=repair)
    # Each process reads its share; all have looked before any writes.
    missing = writer.missing_shards(range(state.process_index, len(shards), state.num_processes))
    missing = sorted(gather_object(missing)) if state.num_processes > 1 else missing
    mine = missing[state.process_index :: state.num_processes]
    batches = {number: plan_batches(samples, shards[number]) for number in mine}
    if mine:
        writer.require_writable()
        live = teacher()
        _write_all(writer, batches, lambda batch: draw_rows(live, [samples[index] for index in batch], pad_token_id))
    state.wait_for_everyone()
    if state.is_main_process:
        writer.finish()
    state.wait_for_everyone()
    tokens = sum(len(batch) * int(samples.lengths[batch].max()) for shard in batches.values() for batch in shard)
    return sum(gather_object([tokens])) if state.num_processes > 1 else tokens


def plan_shards(samples: SampleDataset) -> list[list[int]]:
    """Indices of the samples of each shard: the data's order, each content once, ``SHARD_TOKENS`` tokens a shard."""
    shards: list[list[int]] = [[]]
    seen: set[bytes] = set()
    tokens = 0
    for index, (sample_id, length) in enumerate(zip(samples.ids, samples.lengths.tolist(), strict=True)):
        if sample_id in seen:
            continue
        seen.add(sample_id)
        if shards[-1] and tokens + length > SHARD_TOKENS:
            shards.append([])
            tokens = 0
        shards[-1].append(index)
        tokens += length
    return shards


def plan_batches(samples: SampleDataset, shard: list[int]) -> list[list[int]]:
    """Indices of the samples of each batch of the teacher that makes a shard: a function of their lengths alone."""
    groups = group_by_tokens(samples.lengths[shard], TOKENS_AT_ONCE)
    return [[shard[place] for place in group] for group in groups]


def draw_rows(teacher: LiveTeacher, samples: list[Sample], pad_token_id: int) -> list[SampleRows]:
    """The rows that a cache stores of the samples of one batch, in their order."""
    batch = {name: tensor.to(teacher.model.device) for name, tensor in collate(samples, pad_token_id).items()}
    lengths, class_ids, counts = [], [], []
    for drawn in teacher.draws_to_store(batch):
        is_drawn = drawn.counts > 0
        lengths.append(is_drawn.sum(dim=-1).cpu().numpy())
        class_ids.append(drawn.class_ids[is_drawn].cpu().numpy())
        counts.append(drawn.counts[is_drawn].cpu().numpy())
    row_lengths = np.concatenate(lengths)
    # Ragged rows of all positions, cut where each sample ends.
    positions = np.cumsum([sample.n_valid for sample in samples])
    entries = np.concatenate([[0], row_lengths.cumsum()])[positions]
    return list(
        zip(
            [sample.id for sample in samples],
            np.split(row_lengths, positions[:-1]),
            np.split(np.concatenate(class_ids), entries[:-1]),
            np.split(np.concatenate(counts), entries[:-1]),
            strict=True,
        )
    )


def _write_all(
    writer: CacheWriter, shards: dict[int, list[list[int]]], draw: Callable[[list[int]], list[SampleRows]]
) -> None:
    """Write these shards, given by their batches of samples.

    Each is written while the teacher goes on to the next, so that coding does not keep an accelerator waiting.
    """
    n_samples = sum(len(batch) for batches in shards.values() for batch in batches)
    bar = tqdm(total=n_samples, desc="caching the teacher", unit=" samples", disable=not PartialState().is_main_process)
    with bar, ThreadPoolExecutor(1) as pool:
        written: Future[None] | None = None
        for number, batches in shards.items():
            rows: dict[int, SampleRows] = {}
            for batch in batches:
                rows.update(zip(batch, draw(batch), strict=True))
                bar.update(len(batch))
            if written is not None:
                written.result()
            # A shard's samples are in the data's order, which is that of their indices.
            written = pool.submit(writer.write_shard, number, [rows[index] for index in sorted(rows)])
        if written is not None:
            written.result()
