"""How far metrics agree on what to select: the share of one's top choice that another picks too.

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

FEWEST_SAMPLES = 10  # of fewer, the top share is a handful of samples, and their overlap chance


def overlaps(
    statistics: Mapping[str, Tensor], sample_of: Tensor, position_fraction: float, sample_fraction: float
) -> dict[str, Any]:
    """Overlaps as plain data: ``positions`` and ``samples``, each ``metrics`` [M] and ``overlap`` [M][M] in 0 to 1.

    ``positions``: ``top_k`` of each position metric within each sample. ``samples``: the highest mean scores; None
    where there are too few samples to tell.

    Args:
        statistics: name -> values [N], as ``Fidelity.statistics``.
        sample_of: int64 [N].
    """
    order = sample_of.argsort(stable=True)
    sizes = sample_of[order].unique_consecutive(return_counts=True)[1]  # a sample without a position is left out

    def of_samples(values: Tensor) -> Tensor:  # [S, T], 0 where a sample has ended
        return pad_sequence(list(values[order].split(sizes.tolist())), batch_first=True)

    placed = {name: of_samples(values) for name, values in statistics.items()}
    valid_mask = of_samples(torch.ones_like(order, dtype=torch.bool))
    context = StepContext(0, position_fraction, 0.0, None)
    options = PositionOptions.model_validate({"policy": "top_k", "fraction": position_fraction})
    chosen = {
        name: (select(options, metric.combine(placed, valid_mask), valid_mask, context) > 0).flatten()
        for name, metric in Metric.builtin().items()
        if not metric.is_noise
    }
    of_filters = None
    if len(sizes) >= FEWEST_SAMPLES:
        means = {name: values.sum(-1) / sizes for name, values in placed.items()}
        kept = {}
        for name, metric in Metric.of_samples().items():
            if not metric.is_noise:
                scores = metric.combine(means, valid_mask.any(dim=-1))
                kept[name] = torch.zeros(len(sizes), dtype=torch.bool)
                kept[name][torch.from_numpy(highest(scores.numpy(), sample_fraction))] = True
        of_filters = _matrix(kept) | {"fraction": sample_fraction}
    return {"positions": _matrix(chosen) | {"fraction": position_fraction}, "samples": of_filters}


def _matrix(chosen: Mapping[str, Tensor]) -> dict[str, Any]:
    sets = list(chosen.values())
    return {
        "metrics": list(chosen),
        "overlap": [[round(float((a & b).sum() / a.sum().clamp(min=1)), 4) for b in sets] for a in sets],
    }
