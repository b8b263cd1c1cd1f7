"""The logs of selection: sums since the last logged step, and the means that are logged of them."""

from collections.abc import Mapping

from selkd.recipe.choices import FractionSchedule, PositionOptions
from selkd.selection.positions import StepContext


class SelectionLog:
    """Sums over the optimiser steps since the last logged one, of all processes together.

    Attributes:
        sums: those that ``Objective`` returns, and ``positions_valid``.
    """

    def __init__(self) -> None:
        self.sums: dict[str, float] = {}

    def add(self, sums: Mapping[str, float]) -> None:
        """Add the sums of one step."""
        for name, value in sums.items():
            self.sums[name] = self.sums.get(name, 0.0) + value

    def take(self, positions: PositionOptions, context: StepContext) -> dict[str, float]:
        """Means in nats and the selected share. The sums start again at zero.

        Args:
            positions: the recipe's part.
            context: where in the run the logged step is.
        """
        total, self.sums = self.sums, {}
        selected, valid = max(1, total["positions_selected"]), max(1, total["positions_valid"])
        logs = {"selected_share": total["positions_selected"] / valid}
        if "divergence_nats" in total:
            logs = {"kd_nats": total["divergence_nats"] / selected} | logs
        if total.get("kl_positions"):
            logs["kl_nats"] = total["kl_nats"] / total["kl_positions"]
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
