"""What several policies pick of one text, told for people: what the terminal and the page of ``selkd tokens`` share."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

from selkd.plugins import Policy
from selkd.reporting import formats, words
from selkd.reporting.coloured_text import TokenView, heat_scale, token_views, visible


@dataclass(frozen=True)
class PolicyView:
    """One policy: what it is, and a list of tokens for each sample.

    ``counts`` has "20 of 99 positions" for each sample, ``count`` the same for all together.
    """

    label: str
    rule: str
    notes: list[str]
    count: str
    counts: list[str]
    samples: list[list[TokenView]]


@dataclass(frozen=True)
class Comparison:
    """Policies side by side on one text, and the scale of the colours: ``low`` to ``high`` of ``metric``."""

    model: str
    teacher: str | None
    metric: str
    low: str
    high: str
    size: str
    policies: list[PolicyView]

    @property
    def weights(self) -> set[int]:
        """Which of LIGHT, PLAIN and HEAVY some selected positions have."""
        return {token.weight for policy in self.policies for sample in policy.samples for token in sample}


def compare(found: dict[str, Any]) -> Comparison:
    """The views of what ``selkd tokens --json`` prints."""
    samples, unit = found["samples"], words.metric_unit(found["metric"])
    scale = heat_scale(samples)
    tokens = sum(len(sample["tokens"]) for sample in samples)
    return Comparison(
        model=visible(words.model(found["model"])),
        teacher=None if found["teacher"] is None else visible(words.model(found["teacher"])),
        metric=visible(words.metric(found["metric"])),
        low=formats.nats(scale[0]) if scale[0] else "0",
        high=f"{formats.nats(scale[1])} {unit}".strip(),
        size=f"{formats.count(tokens)} tokens" + (f" in {len(samples)} samples" if len(samples) > 1 else ""),
        policies=[
            _policy_view(index, options, samples, partial(token_views, scale=scale, unit=unit), found["seed"])
            for index, options in enumerate(found["options"])
        ],
    )


def _policy_view(
    index: int,
    options: dict[str, Any],
    samples: list[dict[str, Any]],
    view: Callable[[dict[str, Any]], list[TokenView]],
    seed: int,
) -> PolicyView:
    weights = [sample["coefficients"][index] for sample in samples]
    selected = [[weight > 0 for weight in row] for row in weights]
    picked = [sum(row) for row in selected]
    valid = [sum(sample["valid"]) for sample in samples]
    return PolicyView(
        label=visible(options["label"]),
        rule=visible(words.positions({"positions": options})),
        notes=_notes(options, seed),
        count=_count(sum(picked), sum(valid)),
        counts=[_count(*each) for each in zip(picked, valid, strict=True)],
        samples=[
            view(sample | {"selected": chosen, "weights": weight})
            for sample, chosen, weight in zip(samples, selected, weights, strict=True)
        ],
    )


def _count(picked: int, valid: int) -> str:
    return f"{formats.count(picked)} of {formats.count(valid)} positions"


def _notes(options: dict[str, Any], seed: int) -> list[str]:
    """What the rule alone does not say."""
    policy, progress = options["policy"], formats.percent(options["progress"], 0)
    notes = []
    if policy == "gls":
        notes.append("no run, so no queue of scores: the top of each sample stands in, as at the start of a run")
    if policy == "curriculum" or options["progress"] or isinstance(options["fraction"], dict):
        notes.append(f"at {progress} of the run (progress={options['progress']:g})")
    if Policy.find(policy).uniforms is not None or options["metric"] == "random":
        notes.append(f"drawn with seed {seed}")
    return notes
