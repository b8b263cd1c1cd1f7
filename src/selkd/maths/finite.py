"""Errors about numbers that are not finite, raised before such a number reaches the optimiser or the disk."""

from collections.abc import Mapping

import torch
from torch import Tensor

from selkd.errors import RunError


def not_finite(what: str, value: float) -> RunError:
    """The error that ``what`` of a model is ``value``, which is not finite."""
    return RunError(
        f"{what}: expected a finite number, got {value}. The model's weights are damaged, its training diverged, or "
        "its precision is too narrow: measure it in float32, or take weights from before they went wrong."
    )


def require_finite(values: Tensor, index: Tensor, batch: Mapping[str, Tensor], what: str) -> None:
    """Raises RunError, which names sample and position, if one of ``values`` [n] is not finite.

    Args:
        index: the position of each value in the flat batch [B * T].
        batch: from ``selkd.data.collate.collate``; without ``sample_ids`` the row's number names the sample.
        what: the logits that the values come from, and when: "the teacher's logits, at optimiser step 3".
    """
    bad = (~torch.isfinite(values)).nonzero().flatten()
    if len(bad):
        row, position = divmod(int(index[bad[0]]), batch["valid_mask"].shape[1])
        sample = f"row {row} of the batch"
        if "sample_ids" in batch:
            sample = f"sample {batch['sample_ids'][row].cpu().numpy().tobytes().hex()}"
        raise RunError(
            f"position {position} of {sample} gives {values[bad[0]].item()} from {what}. What was finished "
            "is kept; lower training.learning_rate, or use float32."
        )
