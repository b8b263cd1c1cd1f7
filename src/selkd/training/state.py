"""What a checkpoint of ``DistillTrainer`` holds besides the Trainer's own: counts, the queue, the order of samples."""

import base64
import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, ClassVar

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
    """Which samples an optimiser step sees: a training that goes on has the one that it began with.

    Attributes:
        samples_per_step: of an optimiser step, over all micro-batches and processes.
        steps_per_epoch: optimiser steps.
        order_seed: shuffles the samples; None: they come in the data's order.
        data: a digest of the samples and their order in the data set.
    """

    samples_per_step: int
    steps_per_epoch: int
    order_seed: int | None
    data: str

    _ADVICE: ClassVar[dict[str, str]] = {
        "samples_per_step": "set per_device_train_batch_size and gradient_accumulation_steps so that their product "
        "with the number of processes is what it was",
        "steps_per_epoch": "set dataloader_drop_last to what it was",
        "order_seed": "set seed, data_seed and train_sampling_strategy to what they were",
        "data": "give the data that it began with",
    }

    def require_same(self, checkpoint: Path) -> None:
        """Raises InputError where the training of ``checkpoint`` had another schedule; one without any passes."""
        state = json.loads((checkpoint / "trainer_state.json").read_text(encoding="utf-8"))
        found = state.get("stateful_callbacks", {}).get(ScheduleKept.__name__)
        stored = None if found is None else Schedule(**found["attributes"]["stored"])
        for name, advice in Schedule._ADVICE.items():
            if stored is not None and getattr(stored, name) != getattr(self, name):
                raise InputError(
                    f"{checkpoint}: its training has {name} = {getattr(stored, name)!r}, this one "
                    f"{getattr(self, name)!r}: steps to come would see other samples. To continue it, {advice}; "
                    "nothing was changed."
                )


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
