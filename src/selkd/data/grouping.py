"""Which samples go through a model together when nothing is trained: a function of their lengths alone."""

from collections.abc import Sequence

import numpy as np


def group_by_tokens(lengths: Sequence[int] | np.ndarray, max_tokens: int) -> list[list[int]]:
    """Indices in groups of at most ``max_tokens`` tokens, padding included, or of one sample that is longer.

    Samples are taken from the shortest to the longest (equal lengths in their order), so little is padded.
    """
    groups: list[list[int]] = []
    for index in np.argsort(np.asarray(lengths), kind="stable").tolist():
        longest = int(lengths[index])
        if groups and (len(groups[-1]) + 1) * longest <= max_tokens:
            groups[-1].append(index)
        else:
            groups.append([index])
    return groups
