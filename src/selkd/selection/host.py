"""What the host knows of a batch by itself, so that it need not wait for the device to ask.

Reading a number from an accelerator takes until all work that was queued before is done, and then the accelerator
idles until more is queued. Masks, positions within documents and sample ids are made on the host; a batch that moves to
a device takes them along as they were.

Shapes: B batch, T positions.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor

Batch = dict[str, Tensor]

KEPT = "on_host"  # the batch's key


@dataclass(frozen=True)
class OnHost:
    """A batch on the CPU. It is no mapping, so that what moves a batch to a device leaves it where it is."""

    batch: Batch


def keep_on_host(batch: Batch, host: Batch | None = None) -> Batch:
    """The batch, taking along what ``on_host`` answers: ``host``, or None: itself, which is on the CPU."""
    return cast(Batch, batch | {KEPT: OnHost(batch if host is None else host)})


def on_host(batch: Batch, names: Sequence[str] = ("valid_mask", "position_ids", "sample_ids")) -> Batch:
    """The batch on the CPU. If it has not kept itself, those of ``names`` that it has are read from its device."""
    kept: Any = batch.get(KEPT)
    if isinstance(kept, OnHost):
        return kept.batch
    return {name: batch[name].cpu() for name in names if name in batch}


@dataclass(frozen=True)
class KeepingCollator:
    """A collator whose batches can be moved to a device without being forgotten on the host.

    Args:
        collate: makes a batch of samples, as ``selkd.data.collate.collate`` does.
    """

    collate: Callable[[Any], Batch]

    def __call__(self, samples: Any) -> Batch:
        return keep_on_host(self.collate(samples))


def to_device(tensor: Tensor, device: torch.device) -> Tensor:
    """A tensor of the host on ``device``. The host does not wait: from pinned memory, the copy runs by itself."""
    if device.type == "cuda" and tensor.device.type == "cpu":
        tensor = tensor.pin_memory()
    return tensor.to(device, non_blocking=True)


def valid_index(batch: Batch) -> Tensor:
    """The valid positions in the flat batch [B * T], in order, int64 [n], on the batch's device."""
    return to_device(on_host(batch)["valid_mask"].flatten().nonzero().flatten(), batch["valid_mask"].device)


def first_marked(marks: Tensor, count: int) -> Tensor:
    """The flat places of the first ``count`` marks of a mask, in order, int64 [count].

    Where it is known how many there are, this is ``marks.flatten().nonzero()`` without waiting for the device.
    """
    return marks.flatten().to(torch.uint8).argsort(descending=True, stable=True)[:count]
