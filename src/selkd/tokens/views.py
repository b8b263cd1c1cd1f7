"""The answer of ``selkd tokens`` in words, which its terminal output and its page show, and the page itself."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from selkd.errors import InputError
from selkd.plugins import Policy
from selkd.reporting import formats, words
from selkd.reporting.coloured_text import (
    HEAVY,
    LIGHT,
    WEIGHTS,
    TokenView,
    heat_scale,
    marked_part,
    token_views,
    visible,
)
from selkd.reporting.rendering import render, write_text


@dataclass(frozen=True)
class PolicyView:
    """One policy, and what it picks: the tokens of each sample.

    ``counts`` has "20 of 99 positions" for each sample, ``count`` the same for all samples together.
    """

    label: str
    rule: str
    notes: list[str]
    count: str
    counts: list[str]
    samples: list[list[TokenView]]


@dataclass(frozen=True)
class TextView:
    """Policies side by side on one text. The colours range from ``low`` to ``high`` of ``metric``."""

    model: str
    teacher: str | None
    metric: str
    low: str
    high: str
    size: str
    policies: list[PolicyView]

    @property
    def weights(self) -> set[int]:
        """Those of LIGHT, PLAIN and HEAVY that occur."""
        return {token.weight for policy in self.policies for sample in policy.samples for token in sample}


def describe(looked_at: dict[str, Any]) -> TextView:
    """The view of the answer that ``selkd tokens --json`` prints."""
    samples, unit = looked_at["samples"], words.metric_unit(looked_at["metric"])
    low, high = scale = heat_scale(samples)
    n_valid = [sum(sample["valid"]) for sample in samples]
    policies = []
    for index, options in enumerate(looked_at["options"]):
        weights = [sample["coefficients"][index] for sample in samples]
        selected = [[weight > 0 for weight in row] for row in weights]
        n_selected = list(map(sum, selected))
        policies.append(
            PolicyView(
                label=visible(options["label"]),
                rule=visible(words.positions({"positions": options})),
                notes=_notes(options, looked_at["seed"]),
                count=_count(sum(n_selected), sum(n_valid)),
                counts=list(map(_count, n_selected, n_valid)),
                samples=[
                    token_views(sample | {"selected": is_selected, "weights": row}, scale, unit)
                    for sample, is_selected, row in zip(samples, selected, weights, strict=True)
                ],
            )
        )
    n_tokens = sum(len(sample["tokens"]) for sample in samples)
    return TextView(
        model=visible(words.model(looked_at["model"])),
        teacher=None if looked_at["teacher"] is None else visible(words.model(looked_at["teacher"])),
        metric=visible(words.metric(looked_at["metric"])),
        low=formats.nats(low) if low else "0",
        high=f"{formats.nats(high)} {unit}".strip(),
        size=f"{formats.count(n_tokens)} tokens" + (f" in {len(samples)} samples" if len(samples) > 1 else ""),
        policies=policies,
    )


def check_page_path(page: Path) -> None:
    """Raises InputError, before anything is computed, if no page can be written at this path."""
    if page.is_dir():
        raise InputError(f"--html {page}: this is a folder; give a file's name, as in --html tokens.html.")
    if not page.absolute().parent.is_dir():
        raise InputError(f"--html {page}: there is no folder {page.parent}; make it, or give another file.")


def write_page(page: Path, view: TextView) -> None:
    """Write the view as one HTML file that needs no script and no network; every value is escaped.

    A file of that name is replaced. Raises RunError if it can't be written.
    """
    classes = {HEAVY: "heavy", LIGHT: "light"}
    html = render("tokens.html.j2", compared=view, classes=classes, words=WEIGHTS, marked_part=marked_part)
    write_text(page, html)


def _count(selected: int, valid: int) -> str:
    return f"{formats.count(selected)} of {formats.count(valid)} positions"


def _notes(options: dict[str, Any], seed: int) -> list[str]:
    """What the reader must know beside the policy's rule."""
    policy, progress = options["policy"], formats.percent(options["progress"], 0)
    notes = []
    if policy == "gls":
        notes.append("a text has no queue of scores: the top of each sample is picked, as at the start of a run")
    if policy == "curriculum" or options["progress"] or isinstance(options["fraction"], dict):
        notes.append(f"at {progress} of the run (progress={options['progress']:g})")
    if Policy.find(policy).uniforms is not None or options["metric"] == "random":
        notes.append(f"drawn with seed {seed}")
    return notes
