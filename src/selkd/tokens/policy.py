"""Position policies on the command line: ``pos_rs,smoothing=2``, with the keys of a recipe's ``positions``."""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from selkd.errors import InputError, cut, shown
from selkd.plugins import Metric
from selkd.recipe.choices import PositionOptions
from selkd.recipe.part import parse_part
from selkd.recipe.yaml_text import parse_yaml
from selkd.selection.positions import StepContext, step_context

# A text has no optimiser steps, so ``progress`` says which share of a run of this length is done.
_STEPS = 1_000_000


@dataclass(frozen=True)
class PolicyChoice:
    """A checked policy.

    Attributes:
        label: the policy as the user wrote it.
        options: the recipe's part that it stands for.
        progress: the share of a run that is done, 0 to 1, for ``curriculum`` and a fraction's schedule.
    """

    label: str
    options: PositionOptions
    progress: float

    @property
    def context(self) -> StepContext:
        """The context at ``progress``. Its draws are always those of the first step."""
        return step_context(self.options, round(self.progress * _STEPS), _STEPS)._replace(step=0)

    def described(self) -> dict[str, Any]:
        """The label, every option and ``progress`` as plain data."""
        return {"label": self.label, **self.options.model_dump(mode="json"), "progress": self.progress}


def check_metric(metric: str) -> str:
    """``metric``, if there is such a metric. Raises InputError, which has the nearest name, if not."""
    try:
        return Metric.check(metric)
    except ValueError as error:
        raise InputError(f"--metric: {error}") from None


def parse_policy(label: str, metric: str, fraction: float) -> PolicyChoice:
    """The policy that ``name`` or ``name,key=value,…`` stands for; keys are those of ``positions``, and ``progress``.

    Args:
        metric, fraction: used unless the label has them.

    Raises:
        InputError: the label can't be read, or a recipe would refuse these options.
    """
    name, *pairs = (part.strip() for part in re.split(r",(?![^{]*\})", label))  # not at commas within {from: …, to: …}
    options: dict[str, Any] = {"policy": name}
    for pair in pairs:
        key, equals, value = (part.strip() for part in pair.partition("="))
        if not equals or not key:
            raise InputError(
                f"--policy {cut(label)}: {shown(pair)} is no option; expected key=value, as in pos_rs,smoothing=2."
            )
        if key in options:
            raise InputError(f"--policy {cut(label)}: {key} stands twice.")
        try:
            options[key] = parse_yaml(value)
        except ValueError:
            raise InputError(f"--policy {cut(label)}: the value of {key} is not readable: {shown(value)}.") from None
    if "=" in name:
        raise InputError(f"--policy {cut(label)}: the policy's name comes first, as in top_k,{cut(label)}.")
    progress = options.pop("progress", 0.0)
    if isinstance(progress, bool) or not isinstance(progress, int | float) or not 0 <= progress <= 1:
        raise InputError(
            f"--policy {cut(label)}: progress is the share of the run that is done, 0 to 1; got {shown(progress)}."
        )
    try:
        checked = parse_part(PositionOptions, {"metric": metric, "fraction": fraction} | options, "positions")
    except InputError as error:
        raise InputError(f"--policy {cut(label)}: {error}") from None
    if isinstance(checked.curriculum_steps, int):
        raise InputError(
            f"--policy {cut(label)}: curriculum_steps counts a run's steps, and a text has none; give a share of them "
            "(curriculum_steps=0.5), and progress for the place in the run."
        )
    return PolicyChoice(label.strip(), checked, float(progress))


def require_teacher(metric: str, policies: Sequence[PolicyChoice], teacher: str | None) -> bool:
    """Whether one of these metrics needs the teacher. Raises InputError if so and ``teacher`` is None."""
    metrics = {"--metric": metric} | {f"--policy {choice.label}: metric": choice.options.metric for choice in policies}
    for key, name in metrics.items():
        if name is not None and Metric.find(name).needs_teacher:
            if teacher is None:
                alone = ", ".join(name for name, metric in Metric.builtin().items() if not metric.needs_teacher)
                raise InputError(
                    f"{key} {name} looks at the teacher's distribution: give --teacher MODEL, a model with the same "
                    f"tokenizer, or take a metric of the model alone ({alone})."
                )
            return True
    return False
