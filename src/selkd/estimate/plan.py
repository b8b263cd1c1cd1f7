"""What a recipe will go through: samples, tokens, optimiser steps and the teacher's queries, counted ahead.

Shapes: B samples of a micro-batch, N processes.
"""

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from selkd.errors import InputError
from selkd.evaluation.sample_scores import NEEDS_TEACHER
from selkd.recipe.recipe import Recipe
from selkd.run.workspace import CALIBRATION_SAMPLES, Workspace
from selkd.training.arguments import DistillArguments


@dataclass(frozen=True)
class Plan:
    """Counts of a whole run on ``devices`` devices. Tokens are the samples' own; padding is not counted."""

    devices: int
    samples: int
    samples_kept: int
    train_tokens: int
    sample_tokens: float
    positions_kept: int
    held_out_tokens: int
    per_device_batch: int
    accumulation: int
    epochs: float
    steps: int
    evaluations: int
    selected_share: float
    largest_share: float

    @property
    def samples_per_step(self) -> int:
        return self.per_device_batch * self.accumulation * self.devices

    @property
    def kept_tokens(self) -> int:
        return round(self.samples_kept * self.sample_tokens)

    @property
    def trained_tokens(self) -> int:
        """Over all epochs."""
        return round(self.kept_tokens * self.epochs)


def is_local(recipe: Recipe) -> bool:
    """Whether the text is on this machine, so that it can be counted."""
    return recipe.data.path == "demo" or Path(recipe.data.path).expanduser().exists()


def make_plan(recipe: Recipe, work: Workspace, devices: int, tokens: int | None) -> Plan:
    """Count ``tokens`` training tokens, those that the recipe names, or those of the text itself if it is local.

    Raises:
        InputError: the text is on the hub and nobody says how much of it is to be used.
    """
    length = recipe.data.max_length
    if tokens is not None and tokens < length:
        raise InputError(f"--tokens: {tokens} are fewer than one sample of data.max_length = {length}.")
    if tokens is None and not is_local(recipe):
        tokens = recipe.data.tokens
        if tokens is None:
            raise InputError(
                f"data.tokens: not given, and {recipe.data.path} is not on this machine to be counted. Give --tokens."
            )
    held_out = recipe.data.held_out_tokens if recipe.data.held_out_fraction > 0 else 0
    if tokens is None:
        splits = work.splits
        samples, train_tokens = len(splits.train), splits.train_tokens
        positions = int(splits.train.n_valid.sum())
        held_out = int(splits.held_out.lengths.sum())
    else:
        samples, train_tokens = max(1, tokens // length), tokens
        positions = samples * (length - 1)
    kept = samples if recipe.samples is None else max(1, math.ceil(recipe.samples.fraction * samples - 1e-9))
    arguments = work.arguments
    steps, epochs = _steps(arguments, kept, devices)
    every, measures = recipe.evaluation.every_steps, "fidelity" in recipe.evaluation.suite
    average, largest = _shares(recipe.resolved()["positions"]["fraction"])
    return Plan(
        devices=devices,
        samples=samples,
        samples_kept=kept,
        train_tokens=train_tokens,
        sample_tokens=train_tokens / samples,
        positions_kept=round(positions * kept / samples),
        held_out_tokens=held_out if measures else 0,
        per_device_batch=arguments.per_device_train_batch_size,
        accumulation=arguments.gradient_accumulation_steps,
        epochs=epochs,
        steps=steps,
        evaluations=(2 + (steps // every if every else 0)) if measures else 0,
        selected_share=average,
        largest_share=largest,
    )


def _steps(arguments: DistillArguments, kept: int, devices: int) -> tuple[int, float]:
    """Optimiser steps and epochs of the whole training, as the Trainer counts them."""
    batches = math.ceil(kept / (arguments.per_device_train_batch_size * devices))
    an_epoch = math.ceil(batches / arguments.gradient_accumulation_steps)
    if arguments.max_steps > 0:
        return arguments.max_steps, arguments.max_steps / an_epoch
    return math.ceil(arguments.num_train_epochs * an_epoch), float(arguments.num_train_epochs)


def _shares(fraction: Any) -> tuple[float, float]:
    """(average over the run, largest) share of the positions; a schedule goes from one value to another."""
    if fraction is None:
        return 1.0, 1.0
    if isinstance(fraction, dict):
        begin, end, over = float(fraction["from"]), float(fraction["to"]), float(fraction["over"])
        return over * (begin + end) / 2 + (1 - over) * end, max(begin, end)
    return float(fraction), float(fraction)


def teacher_tokens(recipe: Recipe, plan: Plan) -> dict[str, int]:
    """Tokens that the teacher will run on, by stage; ``total`` is their sum."""
    scores = recipe.samples is not None and recipe.samples.metric in NEEDS_TEACHER
    found = {
        "prune": 0 if recipe.student.model else round(min(CALIBRATION_SAMPLES, plan.samples) * plan.sample_tokens),
        "score": plan.train_tokens if scores else 0,
        "cache": plan.kept_tokens if recipe.cache is not None else 0,
        "train": plan.trained_tokens if recipe.cache is None else 0,
        "evaluate": plan.held_out_tokens * plan.evaluations,
    }
    return {**found, "total": sum(found.values())}
