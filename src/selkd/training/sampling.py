"""The order of the samples, a function of seed and epoch alone, every rank's batches full."""

from collections.abc import Callable, Iterator

import torch
from torch.utils.data import Dataset, Sampler

from selkd.data.samples import EMPTY_SAMPLE, Sample, SampleDataset


class FilledDataset(Dataset[Sample]):
    """A data set and, at the index ``len(dataset)``, a filler: a sample without a valid position."""

    def __init__(self, samples: SampleDataset) -> None:
        self.samples = samples

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, index: int) -> Sample:
        return EMPTY_SAMPLE if index == len(self.samples) else self.samples[index]


class FilledSampler(Sampler[int]):
    """Indices in the order of an epoch, then filled up with the filler's to a multiple of ``multiple``.

    Accelerate would fill the last batch by repeating samples, which then count twice; a filler counts nowhere.

    Args:
        n_samples: of the data set.
        multiple: samples of a micro-batch, over all ranks.
        seed: shuffles anew each epoch; None: the data set's order.
        epoch: tells the epoch that begins. It is asked, and never set: a resumed training wraps its sampler, where
            ``set_epoch`` would not reach it.
        drop_last: leave out the samples of a last micro-batch that is not full, instead of filling it.
    """

    def __init__(
        self,
        n_samples: int,
        multiple: int,
        seed: int | None = None,
        epoch: Callable[[], int] = lambda: 0,
        drop_last: bool = False,
    ) -> None:
        self.n_samples = n_samples
        self.n_indices = (n_samples // multiple if drop_last else -(-n_samples // multiple)) * multiple
        self.seed = seed
        self.epoch = epoch

    def __len__(self) -> int:
        return self.n_indices

    def __iter__(self) -> Iterator[int]:
        order = torch.arange(self.n_samples)
        if self.seed is not None:
            order = torch.randperm(self.n_samples, generator=torch.Generator().manual_seed(self.seed + self.epoch()))
        yield from order[: self.n_indices].tolist()
        yield from [self.n_samples] * (self.n_indices - self.n_samples)
