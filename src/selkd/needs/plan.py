"""Counts a run's samples, tokens, optimiser steps and teacher queries ahead."""

import math
from dataclasses import dataclass
from pathlib import Path

from selkd.data.splits import Splits
from selkd.errors import InputError
from selkd.evaluation.shown import EXAMINED, MAPPED_TEXTS, MAPPED_TOKENS, NEW_TOKENS, PROMPT_TOKENS
from selkd.recipe.choices import FractionSchedule
from selkd.recipe.pruning import CALIBRATION_SAMPLES
from selkd.recipe.recipe import Recipe
from selkd.training.arguments import DistillArguments


@dataclass(frozen=True)
class Plan:
    """The counts of a whole run on ``devices`` devices. Padding does not count as tokens."""

    recipe: Recipe
    arguments: DistillArguments
    devices: int
    samples: int
    samples_kept: int
    train_tokens: int
    positions_kept: int
    held_out_tokens: int
    held_out_samples: int
    steps: int
    epochs: float

    @property
    def samples_per_step(self) -> int:
        return self.batch * self.arguments.gradient_accumulation_steps * self.devices

    @property
    def batch(self) -> int:
        """How many samples a micro-batch has on one device."""
        return self.arguments.per_device_train_batch_size

    @property
    def length(self) -> int:
        """How many positions an average sample has."""
        return min(self.recipe.data.max_length, max(1, round(self.train_tokens / self.samples)))

    @property
    def kept_tokens(self) -> int:
        return round(self.samples_kept * self.train_tokens / self.samples)

    @property
    def trained_tokens(self) -> int:
        """Training tokens over all epochs."""
        return round(self.kept_tokens * self.epochs)

    @property
    def evaluated_tokens(self) -> int:
        """Held-out tokens before, during and after training; 0 if fidelity is not measured."""
        options = self.recipe.evaluation
        during = self.steps // options.every_steps if options.every_steps else 0
        return self.held_out_tokens * (2 + during)

    @property
    def scores_samples(self) -> bool:
        """Whether the student runs over every sample to score it."""
        return self.recipe.samples is not None and self.recipe.samples.metric != "random"

    @property
    def scores_by_teacher(self) -> bool:
        """Whether the teacher runs over every sample to score it."""
        samples = self.recipe.samples
        return samples is not None and samples.needs_teacher and not samples.from_cache

    @property
    def cached_share(self) -> float:
        """The samples in the teacher cache, as a share of those that are kept: all, if it scores them, too."""
        samples = self.recipe.samples
        return self.samples / self.samples_kept if samples is not None and samples.from_cache else 1.0

    @property
    def cached_positions(self) -> int:
        return round(self.positions_kept * self.cached_share)

    @property
    def selected_shares(self) -> tuple[float, float]:
        """The average and the largest share of the positions that is selected; a schedule moves it during the run."""
        fraction = self.recipe.positions.fraction
        if isinstance(fraction, FractionSchedule):
            start, end, over = fraction.start, fraction.to, fraction.over
            return over * (start + end) / 2 + (1 - over) * end, max(start, end)
        return (1.0, 1.0) if fraction is None else (float(fraction), float(fraction))

    @property
    def _reported_tokens(self) -> int:
        """About how many tokens the teacher runs on for what the report shows: texts beside two students, answers, and
        examples where the positions' metric needs it."""
        recipe, length, samples = self.recipe, self.length, self.held_out_samples or self.samples
        examples = min(EXAMINED, samples) * length if recipe.positions.needs_teacher else 0
        if "fidelity" not in recipe.evaluation.suite:
            return examples
        texts = min(MAPPED_TEXTS, samples) * min(length, MAPPED_TOKENS)
        answers = min(recipe.evaluation.generations, samples)
        prompt = min(PROMPT_TOKENS, length // 2)
        return examples + 2 * texts + answers * (prompt + min(NEW_TOKENS, recipe.data.max_length - prompt) - 1)

    @property
    def teacher_tokens(self) -> dict[str, int]:
        """How many tokens the teacher will run on, by stage; ``total`` is their sum."""
        recipe, is_live = self.recipe, self.recipe.cache is None
        calibration = round(min(CALIBRATION_SAMPLES, self.samples) * self.train_tokens / self.samples)
        by_stage = {
            "prune": 0 if recipe.student.model else calibration,
            "score": self.train_tokens if self.scores_by_teacher else 0,
            "cache": 0 if is_live else round(self.kept_tokens * self.cached_share),
            "train": self.trained_tokens if is_live else 0,
            "evaluate": self.evaluated_tokens + self._reported_tokens,
        }
        return {**by_stage, "total": sum(by_stage.values())}


def is_local(recipe: Recipe) -> bool:
    """Whether the recipe's text is on this machine, where it can be counted."""
    return recipe.data.path == "demo" or Path(recipe.data.path).expanduser().exists()


def tokens_to_plan(recipe: Recipe, tokens: int | None) -> int | None:
    """The training tokens to plan for: ``tokens``, or ``data.tokens`` of a text on the hub; None: count the text's.

    Raises:
        InputError: ``tokens`` are too few, or the text is on the hub and its number of tokens is not named.
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
    return tokens


def make_plan(recipe: Recipe, arguments: DistillArguments, devices: int, text: Splits | int) -> Plan:
    """Plan a run over ``text``: its samples, or how many training tokens it has."""
    if isinstance(text, int):
        samples, tokens = max(1, text // recipe.data.max_length), text
        positions = samples * (recipe.data.max_length - 1)
        held_out = recipe.data.held_out_tokens if recipe.data.held_out_fraction > 0 else 0
        held_out_samples = held_out // recipe.data.max_length
    else:
        samples, tokens = len(text.train), text.train_tokens
        positions, held_out = int(text.train.n_valid.sum()), int(text.held_out.lengths.sum())
        held_out_samples = len(text.held_out)
    kept = samples if recipe.samples is None else max(1, math.ceil(recipe.samples.fraction * samples - 1e-9))
    # Steps of an epoch, as the Trainer counts them.
    batches = math.ceil(kept / (arguments.per_device_train_batch_size * devices))
    an_epoch = math.ceil(batches / arguments.gradient_accumulation_steps)
    is_counted = arguments.max_steps > 0
    return Plan(
        recipe=recipe,
        arguments=arguments,
        devices=devices,
        samples=samples,
        samples_kept=kept,
        train_tokens=tokens,
        positions_kept=round(positions * kept / samples),
        held_out_samples=held_out_samples,
        held_out_tokens=held_out if "fidelity" in recipe.evaluation.suite else 0,
        steps=arguments.max_steps if is_counted else math.ceil(arguments.num_train_epochs * an_epoch),
        epochs=arguments.max_steps / an_epoch if is_counted else float(arguments.num_train_epochs),
    )
