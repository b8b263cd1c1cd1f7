"""Errors about numbers that are not finite, raised before such a number reaches the optimiser or the disk."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from selkd.errors import RunError


def not_finite(what: str, value: float) -> RunError:
    """The error that ``what`` of a model is ``value``, which is not finite."""
    return RunError(
        f"{what}: expected a finite number, got {value}. The model's weights are damaged, its training diverged, or "
        "its precision is too narrow: measure it in float32, or take weights from before they went wrong."
    )


@dataclass(frozen=True)
class FiniteCheck:
    """Whether some values were finite. It is found out on their device, and told when the host reads ``report``.

    Attributes:
        report: float64 [2], where in the flat batch [B * T] the first value that is not finite stands, and that value;
            -1 and any value if all are.
        batch: from ``selkd.data.collate.collate``; without ``sample_ids`` the row's number names the sample.
        what: the logits that the values come from, and when: "the teacher's logits, at optimiser step 3".
    """

    report: Tensor
    batch: Mapping[str, Tensor]
    what: str

    @classmethod
    def of(cls, values: Tensor, index: Tensor, batch: Mapping[str, Tensor], what: str) -> "FiniteCheck":
        """The check of ``values`` [n], whose positions in the flat batch are ``index`` int64 [n]."""
        if not len(values):
            return cls(torch.full((2,), -1.0, dtype=torch.float64, device=values.device), batch, what)
        is_bad = ~torch.isfinite(values)
        first = is_bad.to(torch.uint8).argmax(dim=0, keepdim=True)  # of equal ones the first
        place = index.gather(0, first).masked_fill(~is_bad.gather(0, first), -1)
        return cls(torch.cat([place.double(), values.gather(0, first).double()]), batch, what)

    def require(self, report: Sequence[float]) -> None:
        """Raises RunError, which names sample and position, if what was read of ``report`` names one."""
        place, value = report
        if place < 0:
            return
        row, position = divmod(int(place), self.batch["valid_mask"].shape[1])
        sample = f"row {row} of the batch"
        if "sample_ids" in self.batch:
            sample = f"sample {self.batch['sample_ids'][row].cpu().numpy().tobytes().hex()}"
        raise RunError(
            f"position {position} of {sample} gives {value} from {self.what}. What was finished "
            "is kept; lower training.learning_rate, or use float32."
        )


def require_all_finite(checks: Sequence[FiniteCheck]) -> None:
    """Read the reports of some checks together. Raises RunError, which names sample and position, for the first."""
    if checks:
        for check, report in zip(checks, torch.stack([check.report for check in checks]).tolist(), strict=True):
            check.require(report)


def require_finite(values: Tensor, index: Tensor, batch: Mapping[str, Tensor], what: str) -> None:
    """``FiniteCheck.of`` the values, read at once. Raises RunError if one of them is not finite."""
    require_all_finite([FiniteCheck.of(values, index, batch, what)])
