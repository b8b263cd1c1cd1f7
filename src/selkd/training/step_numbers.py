"""The numbers of an optimiser step that the host needs, read from the device all at once, before the update.

To read one is to wait until the device has done all that was queued before. So the loss leaves what it counts on the
device: sums for the log, whether logits were finite, the scores that gls keeps.
"""

from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor

from selkd.maths.finite import FiniteCheck
from selkd.selection.host import to_device


class StepNumbers:
    """What the micro-batches of one optimiser step leave to be read.

    Attributes:
        counts: the host's own numbers of this process, by name.
    """

    def __init__(self) -> None:
        self.counts: dict[str, float] = {}
        self._sums: dict[str, Tensor] = {}
        self._checks: list[FiniteCheck] = []
        self._scores: list[Tensor] = []

    def add(self, sums: Mapping[str, Tensor], checks: Sequence[FiniteCheck], scores: Tensor | None) -> None:
        """Add a micro-batch's sums and its checks, and note its scores [n]."""
        for name, value in sums.items():
            self._sums[name] = self._sums.get(name, 0) + value.detach().double()
        self._checks += checks
        if scores is not None:
            self._scores.append(scores)

    def read(
        self, device: torch.device, over_processes: Callable[[Tensor], Tensor]
    ) -> tuple[dict[str, float], list[Tensor]]:
        """The sums and counts of all processes together, and the scores of this one's micro-batches, float64.

        Raises:
            RunError: a logit was not finite; the message names the sample and the position.
        """
        names = sorted(self._sums)
        counts = to_device(torch.tensor([*self.counts.values()], dtype=torch.float64), device)
        shared = over_processes(torch.cat([*(self._sums[name][None] for name in names), counts]))
        parts = [shared, *(check.report for check in self._checks), *(scores.double() for scores in self._scores)]
        read = torch.cat(parts).cpu().split([len(part) for part in parts])
        for check, report in zip(self._checks, read[1:], strict=False):
            check.require(report.tolist())
        return dict(zip([*names, *self.counts], read[0].tolist(), strict=True)), list(read[1 + len(self._checks) :])
