"""What a checkpoint of ``DistillTrainer`` holds beside the Trainer's own state, and from which one training resumes."""

import base64
import json
from pathlib import Path
from typing import Any

import numpy as np
from transformers import TrainerCallback
from transformers.trainer_callback import ExportableState

from selkd.errors import InputError
from selkd.recipe.choices import ClassOptions, PositionOptions
from selkd.recipe.part import Part
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


class ScheduleKept(TrainerCallback, ExportableState):
    """What the steps of a training see and learn; a resumed training must agree with it. Part of every checkpoint.

    Args:
        stored: ``data``, the digest of the samples in their order; ``teacher_cache``, that of the cache's fingerprint
            (None: the teacher is live); ``samples_per_step``, over all micro-batches and processes;
            ``samples_per_epoch``, fewer than the data set's where its last ones are dropped; ``order_seed``, which
            shuffles the samples (None: the data's order); ``seed``, of all other randomness; the recipe's parts that
            decide the loss, as plain data; ``precision`` of products; ``sharding``, how FSDP writes checkpoints (None:
            nothing is sharded); ``cut``, how a step is cut into micro-batches (None where it decides nothing, as the
            student's forward draws no random numbers); ``processes``, whose number may change; ``is_sealed``, whether
            the checkpoint is complete only with its digests.
    """

    def __init__(self, stored: dict[str, Any] | None = None) -> None:
        self.stored = stored or {}

    def state(self) -> dict[str, Any]:
        return {"args": {}, "attributes": {"stored": self.stored}}

    def require_same(self, checkpoint: Path) -> None:
        """Raises InputError where the training of ``checkpoint`` had another schedule; one without any passes."""
        earlier = stored_schedule(checkpoint)
        for name, current in self.stored.items():
            # An earlier version did not keep all of them.
            if earlier is not None and name not in _FREE and earlier.get(name, current) != current:
                advice = _ADVICE.get(name, "set it to what it was")
                raise InputError(
                    f"{checkpoint}: its training has {name} = {earlier[name]!r}, this one {current!r}: the steps to "
                    f"come would differ. To continue it, {advice}; nothing was changed."
                )


_FREE = ("processes", "is_sealed")  # may differ
_ADVICE = {
    "data": "give the data that it began with",
    "teacher_cache": "give the cache, or the live teacher, that it began with",
    "samples_per_step": "start as many processes as then, or set per_device_train_batch_size and "
    "gradient_accumulation_steps so that their product with the number of processes is what it was",
    "samples_per_epoch": "set dataloader_drop_last, per_device_train_batch_size and the number of processes to what "
    "they were",
    "order_seed": "set seed, data_seed and train_sampling_strategy to what they were",
    "precision": "set bf16, or the launcher's mixed precision, to what it was",
    "sharding": "launch it with or without FSDP, and with the fsdp_state_dict_type, as it was",
    "cut": "set these to what they were, as its dropout draws for each micro-batch",
}


def stored_schedule(checkpoint: Path) -> dict[str, Any] | None:
    """``ScheduleKept.stored`` of a checkpoint; None if another Trainer wrote the checkpoint.

    Raises:
        OSError, ValueError: its ``trainer_state.json`` can't be read.
    """
    state = json.loads((checkpoint / "trainer_state.json").read_text(encoding="utf-8"))
    try:
        kept = state.get("stateful_callbacks", {}).get(ScheduleKept.__name__)
        if kept is None:
            return None
        stored = dict(kept["attributes"]["stored"])
    except (AttributeError, KeyError, TypeError):
        raise ValueError(f"{checkpoint / 'trainer_state.json'}: not what a trainer writes") from None
    parts: dict[str, type[Part]] = {"positions": PositionOptions, "classes": ClassOptions}
    for name, part in parts.items():
        if stored.get(name) is not None:  # the checkpoint may be older than a key, or than its name
            stored[name] = part.model_validate(part.with_current_names(stored[name])).model_dump()
    return stored


def random_states(processes: int) -> list[str]:
    """The names of the files in which the processes of a training keep their random states."""
    return ["rng_state.pth"] if processes == 1 else [f"rng_state_{rank}.pth" for rank in range(processes)]
