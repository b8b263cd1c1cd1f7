"""The order of the samples in training: shuffled by the seed, every rank's batches full."""

from collections.abc import Iterator

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
    """Indices shuffled anew each epoch, then filled up with the filler's to a multiple of ``multiple``.

    Accelerate would fill the last batch of an epoch by repeating samples, which then count twice; a filler counts
    nowhere.
    """

    def __init__(self, n_samples: int, multiple: int, seed: int) -> None:
        self.n_samples = n_samples
        self.n_indices = -(-n_samples // multiple) * multiple
        self.seed = seed
        self.epoch = 0

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def __len__(self) -> int:
        return self.n_indices

    def __iter__(self) -> Iterator[int]:
        generator = torch.Generator().manual_seed(self.seed + self.epoch)
        yield from torch.randperm(self.n_samples, generator=generator).tolist()
        yield from [self.n_samples] * (self.n_indices - self.n_samples)
