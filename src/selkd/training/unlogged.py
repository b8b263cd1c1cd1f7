"""What the steps since the last logged one will add to the next line of the log. Part of every checkpoint."""

from typing import Any

import torch
from accelerate import PartialState
from accelerate.utils import gather_object
from torch import Tensor
from transformers import TrainerCallback
from transformers.trainer_callback import ExportableState

from selkd.training.selection_log import SelectionLog


class Unlogged(TrainerCallback, ExportableState):
    """Sums since the last logged step, so that a training that goes on between two logged steps logs the same.

    Attributes:
        by_process: of each process the sum of its losses, and the sums of its ``SelectionLog`` with their dtypes.
        positions_valid: the valid positions of all processes together.
        last_logged: the last logged step.
    """

    def __init__(self) -> None:
        self.by_process: list[dict[str, Any]] = []
        self.positions_valid = 0
        self.last_logged = 0

    def state(self) -> dict[str, Any]:
        return {"args": {}, "attributes": dict(vars(self))}

    def keep(self, loss: Tensor, log: SelectionLog, last_logged: int) -> None:
        """Take the sums as they are now, of every process; all of them call it."""
        sums = {name: [value.item(), str(value.dtype).removeprefix("torch.")] for name, value in log.sums.items()}
        own = {"loss": loss.item(), "sums": sums}
        self.by_process = gather_object([own]) if PartialState().num_processes > 1 else [own]
        self.positions_valid, self.last_logged = log.positions_valid, last_logged

    def restore(self, loss: Tensor, log: SelectionLog) -> None:
        """Put the sums back where they were. With another number of processes the first one takes them all."""
        state = PartialState()
        processes = len(self.by_process)
        if processes == state.num_processes:
            parts, scale = [self.by_process[state.process_index]], 1.0
        else:  # the logged loss is a mean over the processes
            parts, scale = (self.by_process if state.is_main_process else []), state.num_processes / max(1, processes)
        for part in parts:
            loss += part["loss"] * scale
            for name, (value, dtype) in part["sums"].items():
                log.sums[name] = log.sums.get(name, 0) + torch.tensor(value, dtype=getattr(torch, dtype))
        log.positions_valid = self.positions_valid
