"""The figures of a run's training: true KL at the selected positions, and what the loss is beside it."""

from typing import Any

import numpy as np

from selkd.reporting.formats import dig
from selkd.reporting.run_files import RunFiles


def true_kl(record: Any) -> tuple[float | None, float | None]:
    """KL to the teacher at the selected positions, in nats, at the first and at the last logged step; None if unknown.

    Where the loss itself is that KL, a run of an earlier version has it as its loss.
    """
    train = dig(record, "train")
    if dig(train, "kl_nats_first") is not None or not loss_is_kl(record):
        return dig(train, "kl_nats_first"), dig(train, "kl_nats_last")
    return dig(train, "loss_first"), dig(train, "loss_last")


def loss_is_kl(record: Any) -> bool:
    """Whether the loss is KL(teacher || student) over the whole distribution at temperature 1, and nothing else."""
    recipe = dig(record, "recipe")
    criterion = dig(recipe, "criterion")
    return (
        dig(recipe, "classes", "sampler") == "all"
        and dig(criterion, "name") == "forward_kl"
        and dig(criterion, "temperature") in (None, 1)
        and dig(criterion, "kd_weight") in (None, 1)
    )


def floor(run: RunFiles) -> float | None:
    """The loss that a student equal to its teacher would have, on average: what drawing adds to KL. None if unknown."""
    criterion = dig(run.record, "recipe", "criterion")
    if dig(criterion, "name") != "forward_kl" or dig(criterion, "temperature") not in (None, 1):
        return None
    pairs = [(line.get("kd_nats"), line.get("kl_nats")) for line in run.metrics]
    added = [drawn - kl for drawn, kl in pairs if drawn is not None and kl is not None]
    return float(np.mean(added)) if added else None


def draws_classes(record: Any) -> bool:
    """Whether the loss saw drawn classes in place of the teacher's whole distribution."""
    return dig(record, "recipe", "classes", "sampler") not in (None, "all")
