"""Building a teacher cache: the teacher runs once over the kept samples, and its draws are written shard by shard.

Draws depend on the seed and the sample's content alone, and the teacher's batches on the data alone. So a cache that is
built again, or by several processes, is the same.
"""

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from itertools import chain
from pathlib import Path
from typing import Protocol

import numpy as np
from accelerate import PartialState
from accelerate.utils import gather_object
from tqdm import tqdm

from selkd.data.collate import TOKENS_AT_ONCE, collate, group_by_tokens
from selkd.data.samples import Sample, SampleDataset
from selkd.errors import InputError, Interrupted, RunError
from selkd.interrupts import raise_together, stop_if_asked
from selkd.teacher.live import LiveTeacher
from selkd_cache.fingerprint import Fingerprint, n_scalars
from selkd_cache.writer import CacheWriter, SampleRows

# A shard stores how often each class was drawn, some 30 kB at 50,000 classes: too much for a small shard.
SHARD_TOKENS = 2**17


class RowSource(Protocol):
    """What gives a cache's rows in place of a teacher in memory."""

    def rows(self, samples: Sequence[Sample]) -> list[SampleRows]:
        """The rows that a cache stores for each of the samples, in their order."""


class CacheBuild:
    """The cache of ``samples`` in ``directory``, to be built or finished. Whole shards that are already there are kept.

    Every process makes its own, and all take part in making it and in ``run``.

    Attributes:
        planned_tokens: the tokens, padding included, that the teacher's body runs on for all shards.
        missing_tokens: those for the shards that are missing, by all processes together.
    """

    def __init__(
        self, directory: Path, fingerprint: Fingerprint, samples: SampleDataset, *, repair: bool = False
    ) -> None:
        """Claims the folder and finds what is missing; nothing is written but the plan.

        Args:
            fingerprint: everything that determines the draws; ``vocabulary`` is the number of classes both models
                share.
            repair: read every byte of the shards that are there; else only digests of what was written since the cache
                was complete (other damage is found when it is read, before it is used). And write a lost or damaged
                plan anew if the folder's shards show that it is this cache's.

        Raises:
            InputError: the folder is another cache's, or not a cache's.
            RunError: the disk refused.
        """
        self._state, self._samples, self._with_scalars = PartialState(), samples, n_scalars(fingerprint) > 0
        shards = plan_shards(samples)
        with self._state.main_process_first():  # the first one claims the folder
            shard_ids = [[samples.ids[i] for i in shard] for shard in shards]
            self._writer = CacheWriter(directory, fingerprint, shard_ids, repair=repair)
        # Each process checks its share of the shards; all have checked before any of them writes.
        processes = self._state.num_processes
        own_share = range(self._state.process_index, len(shards), processes)
        missing = self._writer.missing_shards(own_share, blocks=repair)
        self._missing = sorted(gather_object(missing)) if processes > 1 else missing
        self._batches = [plan_batches(samples, shard) for shard in shards]
        tokens = [sum(len(batch) * int(samples.lengths[batch].max()) for batch in shard) for shard in self._batches]
        self.planned_tokens, self.missing_tokens = sum(tokens), sum(tokens[number] for number in self._missing)

    def run(
        self,
        teacher: Callable[[], LiveTeacher | RowSource],
        pad_token_id: int,
        on_shard: Callable[[], None] = lambda: None,
    ) -> None:
        """Write the missing shards and complete the cache.

        Args:
            teacher: loads the teacher, with a class sampler, or what else gives the rows; called only if a shard is
                missing.
            on_shard: called after each shard that this process has written.

        Raises:
            InputError: a teacher's server refused, or answered otherwise than expected; finished shards stay.
            RunError: the disk refused; finished shards stay.
            Interrupted: a process was asked to end; finished shards stay.
        """
        error: InputError | RunError | Interrupted | None = None
        try:
            self._write_own_share(teacher, pad_token_id, on_shard)
        except (InputError, RunError, Interrupted) as raised:
            error = raised  # told to the other processes first, which would wait for this one
        raise_together(error)
        if self._state.is_main_process:
            self._writer.finish()
        self._state.wait_for_everyone()

    def _write_own_share(
        self, teacher: Callable[[], LiveTeacher | RowSource], pad_token_id: int, on_shard: Callable[[], None]
    ) -> None:
        own_share = self._missing[self._state.process_index :: self._state.num_processes]
        if own_share:
            self._writer.require_writable()
            self.write(own_share, teacher(), pad_token_id, on_shard)

    @property
    def missing(self) -> list[int]:
        """The numbers of the shards that were missing at first, in order."""
        return list(self._missing)

    def write(
        self,
        numbers: Sequence[int],
        source: LiveTeacher | RowSource,
        pad_token_id: int,
        on_shard: Callable[[], None] = lambda: None,
    ) -> None:
        """Write these shards, in this process alone. Any process may write any shard: its bytes are the same."""
        samples = self._samples
        batches = {number: self._batches[number] for number in numbers}
        if not isinstance(source, LiveTeacher):  # it makes batches of its own
            batches = {number: [list(chain.from_iterable(shard))] for number, shard in batches.items()}

        def draw(batch: list[int]) -> list[SampleRows]:
            chosen = [samples[index] for index in batch]
            if not isinstance(source, LiveTeacher):
                return source.rows(chosen)
            return draw_rows(source, chosen, pad_token_id, with_scalars=self._with_scalars)

        for _ in _written(self._writer.write_shard, batches, draw):
            on_shard()


def build_cache(
    directory: Path,
    fingerprint: Fingerprint,
    samples: SampleDataset,
    teacher: Callable[[], LiveTeacher | RowSource],
    pad_token_id: int,
    *,
    repair: bool = False,
) -> int:
    """Build, or finish, a cache, as ``CacheBuild`` and its ``run`` say.

    Returns:
        The tokens, padding included, that the teacher's body ran on in all processes together.
    """
    build = CacheBuild(directory, fingerprint, samples, repair=repair)
    build.run(teacher, pad_token_id)
    return build.missing_tokens


def plan_shards(samples: SampleDataset) -> list[list[int]]:
    """Indices of the samples of each shard: the data's order, equal samples once, ``SHARD_TOKENS`` tokens a shard."""
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
    """Indices of the samples of each batch in which the teacher makes a shard: a function of their lengths alone."""
    groups = group_by_tokens(samples.lengths[shard], TOKENS_AT_ONCE)
    return [[shard[place] for place in group] for group in groups]


def draw_rows(
    teacher: LiveTeacher, samples: list[Sample], pad_token_id: int, *, with_scalars: bool
) -> list[SampleRows]:
    """The rows that a cache stores for the samples of one batch, with scalars or without, in their order."""
    batch = {name: tensor.to(teacher.model.device) for name, tensor in collate(samples, pad_token_id).items()}
    lengths, class_ids, counts, scalars = [], [], [], []
    for drawn, of_positions in teacher.draws_to_store(batch, with_scalars=with_scalars):
        is_drawn = drawn.counts > 0
        lengths.append(is_drawn.sum(dim=-1).cpu().numpy())
        class_ids.append(drawn.class_ids[is_drawn].cpu().numpy())
        counts.append(drawn.counts[is_drawn].cpu().numpy())
        if of_positions is not None:
            scalars.append(of_positions.cpu().numpy())
    row_lengths = np.concatenate(lengths)
    # The ragged rows of all positions are cut where each sample ends.
    positions = np.cumsum([sample.n_valid for sample in samples])
    entries = np.concatenate([[0], row_lengths.cumsum()])[positions]
    columns = [
        np.split(row_lengths, positions[:-1]),
        np.split(np.concatenate(class_ids), entries[:-1]),
        np.split(np.concatenate(counts), entries[:-1]),
        *([np.split(np.concatenate(scalars), positions[:-1])] if scalars else []),
    ]
    return [(sample.id, *arrays) for sample, *arrays in zip(samples, *columns, strict=True)]


def _written(
    write: Callable[[int, list[SampleRows]], None],
    shards: dict[int, list[list[int]]],
    draw: Callable[[list[int]], list[SampleRows]],
) -> Iterator[int]:
    """Draw and write these shards: number -> batches of samples. Yields the number of each that is on disk.

    A shard is written while the teacher draws the next one, so that coding does not keep an accelerator waiting.
    """
    n_samples = sum(len(batch) for batches in shards.values() for batch in batches)
    bar = tqdm(total=n_samples, desc="caching the teacher", unit=" samples", disable=not PartialState().is_main_process)
    with bar, ThreadPoolExecutor(1) as pool:
        writing: tuple[int, Future[None]] | None = None
        for number, batches in shards.items():
            rows: dict[int, SampleRows] = {}
            for batch in batches:
                stop_if_asked()
                rows.update(zip(batch, draw(batch), strict=True))
                bar.update(len(batch))
            if writing is not None:
                writing[1].result()
                yield writing[0]
            # The samples of a shard are in the data's order, which is that of their indices.
            ordered = [rows[index] for index in sorted(rows)]
            writing = number, pool.submit(write, number, ordered)
        if writing is not None:
            writing[1].result()
            yield writing[0]
