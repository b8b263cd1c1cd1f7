"""The bytes that a run's stages write, as far as they can be counted: teacher cache, checkpoints and students."""

import math

from selkd.needs.architecture import Architecture
from selkd.needs.cache_size import typical_bytes
from selkd.needs.optimiser import optimiser_bytes
from selkd.needs.plan import Plan


def disk(student: Architecture, plan: Plan) -> dict[str, int]:
    """What a stage will have written at most, by stage; 0 for one that writes little.

    Adapters are counted as nothing: they are small, and their student is counted once.
    """
    recipe, arguments = plan.recipe, plan.arguments
    weights, is_whole = 4 * student.parameters, recipe.student.lora is None
    state = 0 if arguments.save_only_model else optimiser_bytes(arguments, student)[0]
    kept = _checkpoints(plan) if is_whole else 0
    best = 0 if recipe.evaluation.keep_best is None else 2 * weights  # the new one is whole before the old one goes
    draws = recipe.classes.draws if recipe.cache is not None else None
    cache = 0 if draws is None else round(typical_bytes(recipe) * plan.cached_positions)
    return {"cache": cache, "train": kept * (weights + state) + weights + best}


def _checkpoints(plan: Plan) -> int:
    """How many checkpoints there are at most at once; an old one goes only after the new one is there."""
    arguments, strategy = plan.arguments, str(getattr(plan.arguments.save_strategy, "value", ""))
    if strategy == "steps":
        every = arguments.save_steps if arguments.save_steps >= 1 else arguments.save_steps * plan.steps
        saved = math.ceil(plan.steps / max(1, every))
    else:
        saved = math.ceil(plan.epochs) if strategy == "epoch" else 0
    limit = arguments.save_total_limit
    return saved if not limit else min(saved, limit + 1)
