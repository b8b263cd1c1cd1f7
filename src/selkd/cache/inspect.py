"""What was drawn, of the samples of a cache: distinct classes a position and their counts."""

import numpy as np

from selkd.cache.reader import TeacherCache


def contents(cache: TeacherCache, n_samples: int = 1000, seed: int = 0) -> dict[str, int | float]:
    """Figures of random samples of the cache, or of all if there are fewer, over the positions that have a class.

    Returns:
        ``samples_read``; ``classes_p10``, ``_median``, ``_p90`` and ``_max`` of the distinct classes of a position;
        ``drawn_once_share``, of these classes the share that was drawn once.

    Raises:
        InputError: a sample is damaged.
    """
    ids = cache.sample_ids()
    rows = [cache.get(ids[index]) for index in np.random.default_rng(seed).permutation(len(ids))[:n_samples]]
    classes = np.concatenate([sample.row_lengths for sample in rows])
    classes = classes[classes > 0]
    p10, median, p90 = np.quantile(classes, [0.1, 0.5, 0.9]).tolist() if len(classes) else (0.0, 0.0, 0.0)
    return {
        "samples_read": len(rows),
        "classes_p10": p10,
        "classes_median": median,
        "classes_p90": p90,
        "classes_max": int(classes.max(initial=0)),
        "drawn_once_share": sum(int((sample.counts == 1).sum()) for sample in rows) / max(int(classes.sum()), 1),
    }
