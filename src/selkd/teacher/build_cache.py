"""Building a teacher cache: the teacher's body once over the kept samples, its head and the draws a chunk at a time.

Draws depend on (seed, sample content) alone and the teacher's batches on the data alone, so a cache built again, or
by several processes, is the same.
"""

from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import numpy as np
import torch
from accelerate import PartialState
from accelerate.utils import gather_object
from torch import Tensor
from tqdm import tqdm
from transformers import PreTrainedModel

from selkd.cache.manifest import Fingerprint
from selkd.cache.writer import CacheWriter, SampleRows
from selkd.data.collate import TOKENS_AT_ONCE, collate, group_by_tokens
from selkd.data.samples import Sample, SampleDataset
from selkd.maths.chunked import chunk_size, chunks
from selkd.maths.finite import require_finite
from selkd.maths.head import Head
from selkd.models.head import head_of, hidden_states
from selkd.recipe.choices import ClassOptions
from selkd.selection.classes import class_sampler
from selkd.selection.randomness import position_uniforms
from selkd.teacher.targets import head_logits

# A shard stores how often each class is drawn: some 30 kB at 50,000 classes, which a small shard would not repay.
SHARD_TOKENS = 2**17

# Probabilities [n, V], the class ids and counts [n, C] drawn from them, and where the n positions are in the batch.
Observe = Callable[[Tensor, tuple[Tensor, Tensor], slice], None]


def build_cache(
    directory: Path,
    fingerprint: Fingerprint,
    samples: SampleDataset,
    teacher: Callable[[], PreTrainedModel],
    classes: ClassOptions,
    temperature: float,
    seed: int,
    pad_token_id: int,
    *,
    repair: bool = False,
) -> int:
    """Build, or finish, the cache of ``samples`` in ``directory``. Shards that are there and whole are kept.

    Args:
        fingerprint: everything that determines the draws; ``vocabulary`` is how many classes both models share.
        teacher: gives the model; called only if a shard is missing.
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
    tokens = 0
    if mine:
        writer.require_writable()
        model = teacher()
        draw = Drawing(model, classes, temperature, seed, int(fingerprint["vocabulary"]), pad_token_id)
        n_samples = sum(len(shards[number]) for number in mine)
        with tqdm(
            total=n_samples, desc="caching the teacher", unit=" samples", disable=not state.is_main_process
        ) as bar:
            _write_all(writer, mine, lambda number: draw.rows([samples[index] for index in shards[number]]), bar)
        tokens = draw.tokens
    state.wait_for_everyone()
    if state.is_main_process:
        writer.finish()
    state.wait_for_everyone()
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


class Drawing:
    """The teacher's draws of batches of samples; ``tokens`` counts what its body ran on, padding included."""

    def __init__(
        self,
        model: PreTrainedModel,
        classes: ClassOptions,
        temperature: float,
        seed: int,
        vocab_size: int,
        pad_token_id: int,
    ) -> None:
        self.model = model
        self.head: Head = head_of(model).slice_vocab(vocab_size)
        self.sampler = class_sampler(classes)
        self.temperature = temperature
        self.seed = seed
        self.pad_token_id = pad_token_id
        self.tokens = 0

    def rows(self, samples: list[Sample]) -> Iterator[SampleRows]:
        """The drawn classes of the samples of one shard, in their order."""
        done: dict[int, SampleRows] = {}
        following = 0
        for group in group_by_tokens([len(sample.token_ids) for sample in samples], TOKENS_AT_ONCE):
            done.update(zip(group, self.group([samples[index] for index in group]), strict=True))
            while following in done:
                yield done.pop(following)
                following += 1

    @torch.inference_mode()
    def group(self, group: list[Sample], observe: Observe | None = None) -> list[SampleRows]:
        """The rows of one batch; ``observe`` is shown each chunk's probabilities and draws, and where they are."""
        batch = collate(group, self.pad_token_id)
        self.tokens += batch["input_ids"].numel()
        ids, valid = batch["sample_ids"].numpy(), batch["valid_mask"].numpy()
        device = self.model.device
        uniforms = torch.from_numpy(
            position_uniforms(self.seed, ids, valid, "cache", draws=self.sampler.n_uniforms)[valid]
        )
        hidden = hidden_states(self.model, batch["input_ids"].to(device), batch["position_ids"].to(device))
        hidden = hidden[batch["valid_mask"].to(device)]
        index = batch["valid_mask"].flatten().nonzero().flatten()
        lengths, class_ids, counts = [], [], []
        for rows in chunks(len(hidden), chunk_size(self.head.vocab_size, device)):
            probabilities = torch.softmax(head_logits(self.head, hidden[rows]) / self.temperature, dim=-1)
            require_finite(probabilities.sum(dim=-1), index[rows], batch, "the teacher's logits, for its cache")
            chunk_ids, chunk_counts = self.sampler.integers(probabilities, uniforms[rows].to(device))
            if observe is not None:
                observe(probabilities, (chunk_ids, chunk_counts), rows)
            drawn = chunk_counts > 0
            lengths.append(drawn.sum(dim=-1).cpu().numpy())
            class_ids.append(chunk_ids[drawn].cpu().numpy())
            counts.append(chunk_counts[drawn].cpu().numpy())
        return _by_sample(
            group, valid.sum(axis=-1), np.concatenate(lengths), np.concatenate(class_ids), np.concatenate(counts)
        )


def _by_sample(
    group: list[Sample], n_valid: np.ndarray, lengths: np.ndarray, class_ids: np.ndarray, counts: np.ndarray
) -> list[SampleRows]:
    """Ragged rows of all positions [n] of a group, cut into those of each sample."""
    positions = np.concatenate([[0], n_valid.cumsum()])
    entries = np.concatenate([[0], lengths.cumsum()])[positions]
    return [
        (
            sample.id,
            lengths[positions[i] : positions[i + 1]],
            class_ids[entries[i] : entries[i + 1]],
            counts[entries[i] : entries[i + 1]],
        )
        for i, sample in enumerate(group)
    ]


def _write_all(writer: CacheWriter, numbers: list[int], rows: Callable[[int], Iterator[SampleRows]], bar: tqdm) -> None:
    """Write these shards, each while the teacher goes on to the next: coding does not keep an accelerator waiting."""
    with ThreadPoolExecutor(1) as pool:
        written: Future[None] | None = None
        for number in numbers:
            found = []
            for row in rows(number):
                found.append(row)
                bar.update(1)
            if written is not None:
                written.result()
            written = pool.submit(writer.write_shard, number, found)
        if written is not None:
            written.result()
