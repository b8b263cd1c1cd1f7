"""Scoring: one pass of the frozen initial student over all samples gives each sample one number."""

import numpy as np
from torch import Tensor

from selkd.data.samples import SampleDataset
from selkd.evaluation.statistics_pass import Instead, over_samples
from selkd.models.pair import ModelPair
from selkd.plugins import Metric
from selkd.selection.randomness import sample_generator
from selkd.selection.two_stage import Estimator


def score_samples(
    metric: str, samples: SampleDataset, models: ModelPair, seed: int, instead: Instead | None = None
) -> tuple[np.ndarray, int]:
    """The score of every sample, float64 [N], and the number of tokens that the teacher ran on, padding included.

    ``student_entropy`` and ``kl`` are means over the sample's valid positions, in nats. ``ce_ratio`` is the ratio of
    the sample's mean cross-entropies. ``random`` is uniform noise drawn from seed and sample id. A sample without a
    valid position scores 0. Several processes share the work, and each returns all scores.

    Args:
        models: the initial student and the teacher; each is loaded only if the metric needs it.
        instead: what estimates ``student_entropy``, or a cached teacher in place of the teacher; None: neither.

    Raises:
        RunError: a statistic is not finite; the message names sample and position.
    """
    entry = Metric.find(metric)
    if entry.is_noise:
        return np.array([sample_generator(seed, sample_id, "samples").random() for sample_id in samples.ids]), 0
    assert not isinstance(instead, Estimator) or metric == "student_entropy", "an estimate is of the student's entropy"

    def batch_scores(group: list[int], valid_mask: Tensor, statistics: dict[str, Tensor]) -> dict[int, float]:
        counts, row_of = valid_mask.sum(dim=-1).clamp(min=1), valid_mask.nonzero()[:, 0]
        means = {
            name: values.new_zeros(len(group)).index_add_(0, row_of, values) / counts
            for name, values in statistics.items()
        }
        return dict(zip(group, entry.combine(means, valid_mask.any(dim=-1)).tolist(), strict=True))

    parts, tokens = over_samples(entry.statistics, samples, models, batch_scores, "scoring", instead)
    scores = np.zeros(len(samples))
    for part in parts:
        scores[list(part)] = list(part.values())
    return scores, tokens
