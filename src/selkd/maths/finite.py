"""Numbers that are not finite: named by sample and position, and raised before they reach the optimiser or a disk."""

from collections.abc import Mapping

import torch
from torch import Tensor

from selkd.errors import RunError


def not_finite(what: str, value: float) -> RunError:
    """The error that a model's ``what`` has no finite value; the caller raises it."""
    return RunError(
        f"{what}: expected a finite number, got {value}. The model's weights are damaged, its training diverged, or "
        "its precision is too narrow: measure it in float32, or take weights from before they went wrong."
    )


def require_finite(values: Tensor, index: Tensor, batch: Mapping[str, Tensor], what: str) -> None:
    """Raises RunError if one of ``values`` [n] is not finite; its sample and position are named.

    Args:
        index: flat positions [n] into the batch's [B * T].
        batch: of ``selkd.data.collate.collate``.
        what: whose logits gave the values, and when: "the teacher's logits, at optimiser step 3".
    """
    bad = (~torch.isfinite(values)).nonzero().flatten()
    if len(bad):
        row, position = divmod(int(index[bad[0]]), batch["valid_mask"].shape[1])
        sample_id = batch["sample_ids"][row].cpu().numpy().tobytes().hex()
        raise RunError(
            f"position {position} of sample {sample_id} gives {values[bad[0]].item()} from {what}. What was finished "
            "is kept; lower training.learning_rate, or use float32."
        )
