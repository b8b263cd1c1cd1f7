"""How far metrics agree on what to select: the share of one metric's selection that another selects, too.

Shapes: S samples, T positions of the longest, N positions, M metrics.
"""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from selkd.plugins import Metric
from selkd.recipe.choices import PositionOptions
from selkd.selection.positions import StepContext, select
from selkd.selection.samples import highest

FEWEST_SAMPLES = 10  # with fewer, a filter keeps a handful of samples, and their overlap is chance


def overlaps(
    statistics: Mapping[str, Tensor], sample_of: Tensor, position_fraction: float, sample_fraction: float
) -> dict[str, Any]:
    """Overlaps as plain data: for ``positions`` and ``samples``, ``metrics`` [M] and ``overlap`` [M][M] in 0 to 1.

    Position metrics select by ``top_k`` within each sample. Sample metrics select the highest mean scores; their
    overlaps are None if there are fewer than ``FEWEST_SAMPLES`` samples.

    Args:
        statistics: as ``Fidelity.statistics``.
        sample_of: as ``Fidelity.sample_of``.
    """
    order = sample_of.argsort(stable=True)
    sizes = sample_of[order].unique_consecutive(return_counts=True)[1]  # samples without positions are left out

    def padded(values: Tensor) -> Tensor:  # [S, T], 0 after a sample's end
        return pad_sequence(list(values[order].split(sizes.tolist())), batch_first=True)

    by_sample = {name: padded(values) for name, values in statistics.items()}
    valid_mask = padded(torch.ones_like(order, dtype=torch.bool))
    context = StepContext(0, position_fraction, 0.0, None)
    options = PositionOptions.model_validate({"policy": "top_k", "fraction": position_fraction})
    chosen = {
        name: (select(options, metric.combine(by_sample, valid_mask), valid_mask, context) > 0).flatten()
        for name, metric in Metric.builtin().items()
        if not metric.is_noise
    }
    sample_overlaps = None
    if len(sizes) >= FEWEST_SAMPLES:
        means = {name: values.sum(-1) / sizes for name, values in by_sample.items()}
        kept = {}
        for name, metric in Metric.of_samples().items():
            if not metric.is_noise:
                scores = metric.combine(means, valid_mask.any(dim=-1))
                kept[name] = torch.zeros(len(sizes), dtype=torch.bool)
                kept[name][torch.from_numpy(highest(scores.numpy(), sample_fraction))] = True
        sample_overlaps = _matrix(kept) | {"fraction": sample_fraction}
    return {"positions": _matrix(chosen) | {"fraction": position_fraction}, "samples": sample_overlaps}


def _matrix(chosen: Mapping[str, Tensor]) -> dict[str, Any]:
    sets = list(chosen.values())
    return {
        "metrics": list(chosen),
        "overlap": [[round(float((a & b).sum() / a.sum().clamp(min=1)), 4) for b in sets] for a in sets],
    }
