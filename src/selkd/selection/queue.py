"""The queue of recent scores from which global-level selection (gls) takes its threshold."""

import numpy as np


class ScoreQueue:
    """First in, first out: the last ``capacity`` scores that were pushed."""

    def __init__(self, capacity: int) -> None:
        self.capacity = capacity
        self.scores = np.zeros(0)  # float64, oldest first

    def push(self, scores: np.ndarray) -> None:
        """Append ``scores`` [n] in their order; the oldest are dropped."""
        self.scores = np.concatenate([self.scores, scores.astype(np.float64)])[-self.capacity :]

    def threshold(self, fraction: float) -> float | None:
        """The (1 - fraction) quantile of the queue, linearly interpolated; None until a tenth of it is filled."""
        if len(self.scores) * 10 < self.capacity:
            return None
        return float(np.quantile(self.scores, 1 - fraction))
