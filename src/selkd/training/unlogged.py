"""What the steps since the last logged one will add to the next line of the log. Part of every checkpoint."""

from typing import Any

from accelerate import PartialState
from accelerate.utils import gather_object
from torch import Tensor
from transformers import TrainerCallback
from transformers.trainer_callback import ExportableState

from selkd.training.selection_log import SelectionLog


class Unlogged(TrainerCallback, ExportableState):
    """Sums since the last logged step, so that a training that goes on between two logged steps logs the same.

    Attributes:
        losses: of each process the sum of its losses.
        sums: those of the ``SelectionLog``.
        last_logged: the last logged step.
    """

    def __init__(self) -> None:
        self.losses: list[float] = []
        self.sums: dict[str, float] = {}
        self.last_logged = 0

    def state(self) -> dict[str, Any]:
        return {"args": {}, "attributes": dict(vars(self))}

    def keep(self, loss: Tensor, log: SelectionLog, last_logged: int) -> None:
        """Take the sums as they are now; all processes call it."""
        own = loss.item()
        self.losses = gather_object([own]) if PartialState().num_processes > 1 else [own]
        self.sums, self.last_logged = dict(log.sums), last_logged

    def restore(self, loss: Tensor, log: SelectionLog) -> None:
        """Put the sums back where they were. With another number of processes each takes the mean loss of all."""
        state, processes = PartialState(), len(self.losses)
        if processes == state.num_processes:
            loss += self.losses[state.process_index]
        else:  # the logged loss is a mean over the processes
            loss += sum(self.losses) / processes
        log.sums = dict(self.sums)
