"""The logs of selection: sums since the last logged step, and the means that are logged of them."""

from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from selkd.recipe.choices import FractionSchedule, PositionOptions
from selkd.selection.positions import StepContext


class SelectionLog:
    """Sums of one process over the micro-batches since the last logged step."""

    def __init__(self) -> None:
        self.sums: dict[str, Tensor] = {}
        self.positions_valid = 0  # over all processes

    def add(self, outputs: Mapping[str, Tensor]) -> None:
        """Add the sums of one micro-batch, as ``Objective`` returns them."""
        for name, value in outputs.items():
            self.sums[name] = self.sums.get(name, 0) + value.detach()

    def take(
        self, reduce: Callable[[Tensor], Tensor], positions: PositionOptions, context: StepContext
    ) -> dict[str, float]:
        """Means in nats and the selected share, over all processes. The sums start again at zero.

        Args:
            reduce: sums a tensor over the processes.
            positions: the recipe's part.
            context: where in the run the logged step is.
        """
        names = sorted(self.sums)
        totals = reduce(torch.stack([self.sums[name].float() for name in names])).tolist()
        total = dict(zip(names, totals, strict=True))
        selected, valid = max(1, total["positions_selected"]), max(1, self.positions_valid)
        self.sums, self.positions_valid = {}, 0
        logs = {"kd_nats": total["divergence_nats"] / selected, "selected_share": total["positions_selected"] / valid}
        if "cross_entropy_nats" in total:
            logs["ce_nats"] = total["cross_entropy_nats"] / selected
        for name in ("entropy_nats", "score"):
            if f"selected_{name}" in total:
                logs[f"selected_{name}"] = total[f"selected_{name}"] / selected
            if f"valid_{name}" in total:
                logs[f"mean_{name}"] = total[f"valid_{name}"] / valid
        if total.get("compared_positions"):
            logs["selection_agreement"] = total["agreeing_positions"] / total["compared_positions"]
        if isinstance(positions.fraction, FractionSchedule):
            assert context.fraction is not None, "a schedule has a fraction at every step"
            logs["fraction"] = context.fraction
        if context.threshold is not None:
            logs["threshold"] = context.threshold
        return logs
