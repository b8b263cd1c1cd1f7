"""What the processes of one run tell each other when one ends early, through the store of their process group."""

import json
import sys
import time
from dataclasses import asdict, dataclass
from typing import Any

_ROLL_SECONDS = 3.0  # in which a process that lives answers the roll


@dataclass(frozen=True)
class Ended:
    """How a process ended before the run was done.

    Attributes:
        rank: which process.
        code: its exit code.
        words: why.
    """

    rank: int
    code: int
    words: str

    @property
    def message(self) -> str:
        """What the other processes say."""
        return f"rank {self.rank} ended the run: {self.words}"


class Others:
    """The other processes of this run.

    Args:
        number: of the run among those of this process group; what was told in one is not heard in the next.

    Attributes:
        rank: the number of this process.
    """

    def __init__(self, store: Any, rank: int, count: int, number: int) -> None:
        self.rank, self.count = rank, count
        self._store, self._prefix = store, f"selkd/{number}/"
        self._is_store_lost = False

    @classmethod
    def find(cls, number: int) -> "Others | None":
        """The others in run ``number``; None while there is no process group, or this process is alone in it."""
        if "torch" not in sys.modules:
            return None
        from torch import distributed
        from torch.distributed import distributed_c10d

        if not distributed.is_available() or not distributed.is_initialized() or distributed.get_world_size() == 1:
            return None
        # A connection of its own: one that the main thread waits on answers nobody else.
        store: Any = distributed_c10d._get_default_store()
        return cls(store.clone(), distributed.get_rank(), distributed.get_world_size(), number)

    def tell(self, ended: Ended) -> None:
        """Tell that this process ends, and why. The first word stays: what follows from it says less."""
        if not self._has("ended"):
            self._set("ended", json.dumps(asdict(ended)))

    def told(self) -> Ended | None:
        """How the first process ended; None: none has told so."""
        told = self._get("ended")
        return None if told is None else Ended(**json.loads(told))

    def ask(self, why: str) -> None:
        """Ask all processes to end."""
        self._set("asked", why)

    def look(self) -> tuple[str | None, Ended | None]:
        """Why all are asked to end, if they are, and how the first one ended; and answer the roll if it is called."""
        if self._has("roll"):
            self._set(f"here/{self.rank}", "")
        return self._get("asked"), self.told()

    def call_roll(self) -> Ended | None:
        """The first process that does not answer, as it was killed or its machine was lost; None: all live."""
        self._set("roll", "")
        self._set(f"here/{self.rank}", "")
        until = time.monotonic() + _ROLL_SECONDS
        missing = [rank for rank in range(self.count) if rank != self.rank]
        while missing and not self._is_store_lost and time.monotonic() < until:
            time.sleep(0.1)
            missing = [rank for rank in missing if not self._has(f"here/{rank}")]
        if self._is_store_lost:
            missing = missing or [0]
        if not missing:
            return None
        # One that ended in words after it was asked for them.
        ended = self.told()
        return ended or Ended(missing[0], 1, "it ended without a word: it was killed, or its machine was lost")

    def _get(self, name: str) -> str | None:
        try:
            value: str | None = self._store.get(self._prefix + name).decode() if self._has(name) else None
            return value
        except RuntimeError:  # lost between the two
            self._is_store_lost = True
            return None

    def _has(self, name: str) -> bool:
        """Whether the store has a value; it is lost when the process that keeps it has ended."""
        try:
            return not self._is_store_lost and bool(self._store.check([self._prefix + name]))
        except RuntimeError:
            self._is_store_lost = True
            return False

    def _set(self, name: str, value: str) -> None:
        try:
            self._store.set(self._prefix + name, value)
        except RuntimeError:
            self._is_store_lost = True
