"""Bytes a position of a teacher cache, interpolated between measured ones: no teacher runs."""

import math
from itertools import pairwise

from selkd.recipe.recipe import Recipe

# Sampler -> draws U -> bytes a position, all files counted: SmolLM2-135M over textbooks and encyclopedia, 34,737
# positions (docs/results/cache.md, which a test compares).
MEASURED: dict[str, dict[int, float]] = {
    "rs_kd": {8: 6.6, 16: 10.6, 32: 16.8, 64: 26.4, 128: 41.3, 256: 64.0},
    "systematic": {8: 6.9, 16: 11.2, 32: 17.8, 64: 28.0, 128: 43.9, 256: 68.3},
    "top_k": {8: 20.1, 16: 38.4, 32: 70.7, 64: 126.7, 128: 221.5, 256: 373.8},
}
SOURCE = "SmolLM2-135M over textbooks"


BYTES_OF_SCALARS = 0.9  # more at U = 64 with scalars, whose format codes classes in groups, than without
BYTES_OF_OTHER_TEMPERATURE = 1.7  # more with those at the draws' temperature, too, coded as those at temperature 1 are


def typical_bytes(recipe: Recipe) -> float:
    """Bytes a position of the recipe's cache."""
    assert recipe.cache is not None, "a live teacher has no cache"
    assert recipe.classes.draws is not None, "a cache holds drawn classes"
    size = bytes_of_draws(recipe.classes.sampler, recipe.classes.draws)
    if not recipe.cache.scalars:
        return size
    return size + BYTES_OF_SCALARS + (BYTES_OF_OTHER_TEMPERATURE if recipe.criterion.temperature != 1.0 else 0)


def bytes_of_draws(sampler: str, draws: int) -> float:
    """Bytes a position of ``draws`` draws: a straight line in log-log through the nearest two measured ones.

    A user's own sampler counts as ``rs_kd``.
    """
    points = sorted(MEASURED.get(sampler, MEASURED["rs_kd"]).items())
    (low, below), (high, above) = next(((a, b) for a, b in pairwise(points) if draws <= b[0]), (points[-2], points[-1]))
    slope = math.log(above / below) / math.log(high / low)
    return below * (draws / low) ** slope
