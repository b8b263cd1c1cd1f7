"""The numbers of an optimiser step that the host needs, read from the device all at once, before the update.

To read one is to wait until the device has done all that was queued before. So the loss leaves what it counts on the
device: sums for the log, whether logits were finite, the scores that gls keeps.
"""

from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor

from selkd.errors import RunError
from selkd.interrupts import raise_together
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
            RunError: a logit of any process was not finite, on all of them alike, so that none makes the update; the
                message names the sample and the position.
        """
        names = sorted(self._sums)
        reports = [check.report for check in self._checks]
        counts = to_device(torch.tensor([*self.counts.values()], dtype=torch.float64), device)
        faults = torch.stack([torch.zeros((), dtype=torch.float64, device=device), *((r[0] >= 0) for r in reports)])
        shared = over_processes(torch.cat([*(self._sums[name][None] for name in names), counts, faults.sum()[None]]))
        parts = [shared, *reports, *(scores.double() for scores in self._scores)]
        read = torch.cat(parts).cpu().split([len(part) for part in parts])
        *values, n_faults = read[0].tolist()
        if n_faults:
            raise_together(self._fault(read[1:]))
        return dict(zip([*names, *self.counts], values, strict=True)), list(read[1 + len(reports) :])

    def _fault(self, reports: Sequence[Tensor]) -> RunError | None:
        """The first error of this process's own logits."""
        try:
            for check, report in zip(self._checks, reports, strict=False):
                check.require(report.tolist())
        except RunError as error:
            return error
        return None
