"""What a checkpoint of ``DistillTrainer`` holds besides the Trainer's own, and which one training resumes from."""

import base64
import json
import re
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from transformers import TrainerCallback
from transformers.trainer_callback import ExportableState

from selkd.errors import InputError
from selkd.selection.queue import ScoreQueue


class Totals(TrainerCallback, ExportableState):
    """Sums over the optimiser steps so far, all ranks together. Part of every checkpoint."""

    def __init__(self) -> None:
        self.positions_valid = 0
        self.positions_selected = 0
        self.teacher_tokens = 0

    def state(self) -> dict[str, Any]:
        return {"args": {}, "attributes": dict(vars(self))}


class Queue(TrainerCallback, ExportableState):
    """The queue of global-level selection. Part of every checkpoint, as little-endian float64 in base64."""

    def __init__(self, capacity: int) -> None:
        self.scores = ScoreQueue(capacity)

    def state(self) -> dict[str, Any]:
        return {"args": {"capacity": self.scores.capacity}, "attributes": {"encoded": self.encoded}}

    @property
    def encoded(self) -> str:
        return base64.b64encode(self.scores.scores.astype("<f8").tobytes()).decode()

    @encoded.setter
    def encoded(self, text: str) -> None:
        self.scores.scores = np.frombuffer(base64.b64decode(text), dtype="<f8").astype(np.float64)


@dataclass(frozen=True)
class Schedule:
    """What the steps of a training see and learn: a training that goes on has the schedule that it began with.

    Attributes:
        data: a digest of the samples and their order in the data set.
        samples_per_step: of an optimiser step, over all micro-batches and processes.
        samples_per_epoch: less than the data set's, where the last of them are dropped.
        order_seed: shuffles the samples; None: they come in the data's order.
        seed: of every random draw.
        criterion, positions, classes, on_policy: the recipe's parts.
        processes: that trained; another number may go on.
    """

    data: str
    samples_per_step: int
    samples_per_epoch: int
    order_seed: int | None
    seed: int
    criterion: dict[str, Any] | None
    positions: dict[str, Any] | None
    classes: dict[str, Any] | None
    on_policy: dict[str, Any] | None
    processes: int

    def require_same(self, checkpoint: Path) -> None:
        """Raises InputError where the training of ``checkpoint`` had another schedule; one without any passes."""
        stored = stored_schedule(checkpoint)
        for name, advice in _ADVICE.items():
            mine = getattr(self, name)
            if stored is not None and stored[name] != mine:
                raise InputError(
                    f"{checkpoint}: its training has {name} = {stored[name]!r}, this one {mine!r}: the steps to come "
                    f"would differ. To continue it, {advice}; nothing was changed."
                )


_ADVICE = {
    "data": "give the data that it began with",
    "samples_per_step": "set per_device_train_batch_size and gradient_accumulation_steps so that their product with "
    "the number of processes is what it was",
    "samples_per_epoch": "set dataloader_drop_last, per_device_train_batch_size and the number of processes to what "
    "they were",
    "order_seed": "set seed, data_seed and train_sampling_strategy to what they were",
    "seed": "set it to what it was",
    "criterion": "set it to what it was",
    "positions": "set it to what it was",
    "classes": "set it to what it was",
    "on_policy": "set it to what it was",
}


def stored_schedule(checkpoint: Path) -> dict[str, Any] | None:
    """The fields of ``Schedule`` that a checkpoint holds, None where another Trainer wrote it.

    Raises:
        OSError, ValueError: its ``trainer_state.json`` can't be read.
    """
    state = json.loads((checkpoint / "trainer_state.json").read_text(encoding="utf-8"))
    kept = state.get("stateful_callbacks", {}).get(ScheduleKept.__name__)
    return None if kept is None else dict(kept["attributes"]["stored"])


class ScheduleKept(TrainerCallback, ExportableState):
    """The ``Schedule`` of a training. Part of every checkpoint."""

    def __init__(self) -> None:
        self.stored: dict[str, Any] = {}

    @classmethod
    def of(cls, schedule: Schedule) -> "ScheduleKept":
        kept = cls()
        kept.stored = asdict(schedule)
        return kept

    def state(self) -> dict[str, Any]:
        return {"args": {}, "attributes": {"stored": self.stored}}


def last_whole_checkpoint(folder: Path) -> Path | None:
    """The latest checkpoint in ``folder`` that was written to its end, or None.

    The first process writes ``trainer_state.json`` last; a checkpoint without it, or with half of it, was interrupted.
    It does not wait for the others' random states, so these are looked for, too.
    """
    found = {
        int(m[1]): path for path in folder.glob("checkpoint-*") if (m := re.fullmatch(r"checkpoint-(\d+)", path.name))
    }
    for _, path in sorted(found.items(), reverse=True):
        try:
            schedule = stored_schedule(path)
        except (OSError, ValueError):
            continue
        if schedule is None or _has_random_states(path, schedule["processes"]):
            return path
    return None


def _has_random_states(checkpoint: Path, processes: int) -> bool:
    """Whether every process left its random state; of a model saved alone (``save_only_model``) there is none."""
    if not any(checkpoint.glob("optimizer*")):
        return True
    names = ["rng_state.pth"] if processes == 1 else [f"rng_state_{rank}.pth" for rank in range(processes)]
    return all((checkpoint / name).is_file() for name in names)
