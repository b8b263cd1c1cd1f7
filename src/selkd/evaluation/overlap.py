"""How far metrics agree on what to select: the share of one's top choice that another picks too.

Shapes: S samples, T positions of the longest, N positions, M metrics.
"""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

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
    placed, valid_mask = _placed(statistics, sample_of)
    context = StepContext(0, position_fraction, 0.0, None)
    options = PositionOptions.model_validate({"policy": "top_k", "fraction": position_fraction})
    chosen = {
        name: (select(options, metric.combine(placed, valid_mask), valid_mask, context) > 0).flatten()
        for name, metric in Metric.builtin().items()
        if not metric.is_noise
    }
    of_samples = None
    if len(valid_mask) >= FEWEST_SAMPLES:
        means = {name: (values * valid_mask).sum(-1) / valid_mask.sum(-1) for name, values in placed.items()}
        scores = {
            name: metric.combine(means, valid_mask.any(dim=-1))
            for name, metric in Metric.of_samples().items()
            if not metric.is_noise
        }
        kept = {name: torch.zeros(len(valid_mask), dtype=torch.bool) for name in scores}
        for name, values in scores.items():
            kept[name][torch.from_numpy(highest(values.numpy(), sample_fraction))] = True
        of_samples = _matrix(kept) | {"fraction": sample_fraction}
    return {"positions": _matrix(chosen) | {"fraction": position_fraction}, "samples": of_samples}


def _placed(statistics: Mapping[str, Tensor], sample_of: Tensor) -> tuple[dict[str, Tensor], Tensor]:
    """The statistics as [S, T], and where there are any; samples without a position are left out."""
    order = sample_of.argsort(stable=True)
    _, row, sizes = sample_of[order].unique_consecutive(return_inverse=True, return_counts=True)
    column = torch.arange(len(order)) - (sizes.cumsum(0) - sizes)[row]
    shape = len(sizes), int(sizes.max())
    valid_mask = torch.zeros(shape, dtype=torch.bool)
    valid_mask[row, column] = True
    placed = {}
    for name, values in statistics.items():
        placed[name] = torch.zeros(shape)
        placed[name][row, column] = values[order]
    return placed, valid_mask


def _matrix(chosen: Mapping[str, Tensor]) -> dict[str, Any]:
    sets = list(chosen.values())
    return {
        "metrics": list(chosen),
        "overlap": [[round(float((a & b).sum() / a.sum().clamp(min=1)), 4) for b in sets] for a in sets],
    }
