"""A position policy as a command line names it: ``pos_rs,smoothing=2``, with the keys of a recipe's ``positions``."""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import yaml

from selkd.errors import InputError
from selkd.plugins import Metric
from selkd.recipe.choices import PositionOptions
from selkd.recipe.part import parse_part
from selkd.selection.positions import StepContext, step_context

# A text has no optimiser steps: a share of the run's, ``progress``, says how far it is. The steps of a run whose
# steps are as good as continuous:
_STEPS = 1_000_000


@dataclass(frozen=True)
class PolicyChoice:
    """A checked policy.

    Attributes:
        label: as the user wrote it.
        options: what it does.
        progress: how much of the run is done, 0 to 1: it moves ``curriculum`` and a fraction's schedule.
    """

    label: str
    options: PositionOptions
    progress: float

    @property
    def context(self) -> StepContext:
        """The place in the run. Draws are those of the first step wherever it is."""
        return step_context(self.options, round(self.progress * _STEPS), _STEPS)._replace(step=0)

    def described(self) -> dict[str, Any]:
        """Plain data: the label, every option, and ``progress``."""
        return {"label": self.label, **self.options.model_dump(mode="json"), "progress": self.progress}


def check_metric(metric: str) -> str:
    """``metric`` if it is a metric's name or a user's own.

    Raises:
        InputError: it is neither; the nearest name is told.
    """
    try:
        return Metric.check(metric)
    except ValueError as error:
        raise InputError(f"--metric: {error}") from None


def parse_policy(label: str, metric: str, fraction: float) -> PolicyChoice:
    """``name`` or ``name,key=value,…`` with the options of a recipe's ``positions``, and ``progress``.

    Args:
        metric, fraction: the policy's own, unless it says otherwise.

    Raises:
        InputError: anything that a recipe would refuse.
    """
    name, *pairs = (part.strip() for part in re.split(r",(?![^{]*\})", label))  # no comma within {from: …, to: …}
    options: dict[str, Any] = {"policy": name}
    for pair in pairs:
        key, equals, value = (part.strip() for part in pair.partition("="))
        if not equals or not key:
            raise InputError(f"--policy {label}: {pair!r} is no option; expected key=value, as in pos_rs,smoothing=2.")
        if key in options:
            raise InputError(f"--policy {label}: {key} stands twice.")
        try:
            options[key] = yaml.safe_load(value)
        except yaml.YAMLError:
            raise InputError(f"--policy {label}: the value of {key} is not readable: {value!r}.") from None
    if "=" in name:
        raise InputError(f"--policy {label}: the policy's name comes first, as in top_k,{label}.")
    progress = options.pop("progress", 0.0)
    if isinstance(progress, bool) or not isinstance(progress, int | float) or not 0 <= progress <= 1:
        raise InputError(f"--policy {label}: progress is the share of the run that is done, 0 to 1; got {progress!r}.")
    try:
        checked = parse_part(PositionOptions, {"metric": metric, "fraction": fraction} | options, "positions")
    except InputError as error:
        raise InputError(f"--policy {label}: {error}") from None
    if isinstance(checked.curriculum_steps, int):
        raise InputError(
            f"--policy {label}: curriculum_steps counts a run's steps, and a text has none; give a share of them "
            "(curriculum_steps=0.5), and progress for the place in the run."
        )
    return PolicyChoice(label.strip(), checked, float(progress))


def require_teacher(metric: str, policies: Sequence[PolicyChoice], teacher: str | None) -> bool:
    """Whether what is asked for looks at the teacher.

    Raises:
        InputError: it does, and there is none.
    """
    asked = {"--metric": metric} | {f"--policy {choice.label}: metric": choice.options.metric for choice in policies}
    for key, name in asked.items():
        if name is not None and Metric.find(name).needs_teacher:
            if teacher is None:
                raise InputError(
                    f"{key} {name} looks at the teacher's distribution: give --teacher MODEL, a model with the same "
                    "tokenizer, or take a metric of the model alone (student_entropy, student_ce, random)."
                )
            return True
    return False
