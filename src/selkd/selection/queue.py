"""The queue of recent scores behind global-level selection (gls)."""

import numpy as np


class ScoreQueue:
    """First in, first out: the last ``capacity`` valid scores that were pushed.

    Until a tenth of the capacity has been seen there is no threshold.
    """

    def __init__(self, capacity: int) -> None:
        self.capacity = capacity
        self.scores = np.zeros(0)  # float64, oldest first

    def push(self, scores: np.ndarray) -> None:
        """Append ``scores`` [n] in their order; the oldest leave."""
        self.scores = np.concatenate([self.scores, scores.astype(np.float64)])[-self.capacity :]

    def threshold(self, fraction: float) -> float | None:
        """The (1 - fraction) quantile of the queue, by linear interpolation; None while too few were seen."""
        if len(self.scores) * 10 < self.capacity:
            return None
        return float(np.quantile(self.scores, 1 - fraction))
