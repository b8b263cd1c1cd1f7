"""The order in which samples are trained on: a function of seed and epoch alone, in which every batch is full."""

from collections.abc import Callable, Iterator

import torch
from torch.utils.data import Dataset, Sampler

from selkd.data.samples import EMPTY_SAMPLE, Sample, SampleDataset


class FilledDataset(Dataset[Sample]):
    """A data set with one more item, at the index ``len(dataset)``: the filler, a sample without a valid position."""

    def __init__(self, samples: SampleDataset) -> None:
        self.samples = samples

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, index: int) -> Sample:
        return EMPTY_SAMPLE if index == len(self.samples) else self.samples[index]


class FilledSampler(Sampler[int]):
    """The samples' indices in the order of an epoch, then the filler's index up to a multiple of ``multiple``.

    Accelerate would fill the last batch with repeated samples, which would count twice; a filler counts nowhere.

    Args:
        n_samples: how many samples the data set has.
        multiple: how many samples a micro-batch has over all ranks.
        seed: shuffles the samples anew each epoch; None: the data set's order.
        epoch: returns the current epoch. A resumed training wraps the sampler, where ``set_epoch`` would not reach it.
        drop_last: leave out the last micro-batch if it is not full, instead of filling it.
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
