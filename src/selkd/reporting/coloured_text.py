"""Tokens of a text, coloured by score and marked where a policy selects them.

Tokens are untrusted text. Nothing here makes HTML: the template escapes what the tokens hold.
"""

import math
from dataclasses import dataclass
from typing import Any

import numpy as np

from selkd.reporting import formats

HEAT_LEVELS = 8
_STOPS = 8
LIGHT, PLAIN, HEAVY = range(3)
WEIGHTS = {PLAIN: "selected", HEAVY: "with a high weight", LIGHT: "with a low weight"}
# A weight is heavy from 1.5 times the mean of the selected ones on, and light below half of it.
_HEAVY_FROM, _LIGHT_BELOW = 1.5, 0.5
# The visible signs of control characters. Three kinds show as U+FFFD: those of writing direction, which reorder text so
# that it could pass for another; C1; and lone surrogates, which can't be written as UTF-8.
_WRITING_DIRECTION = (0x061C, 0x200E, 0x200F, *range(0x202A, 0x202F), *range(0x2066, 0x206A))
_PICTURES = {
    **{code: chr(0x2400 + code) for code in range(32)},
    **dict.fromkeys((*range(0x80, 0xA0), *range(0xD800, 0xE000), *_WRITING_DIRECTION), "\ufffd"),
    ord("\t"): "\t",
    ord("\n"): "↵\n",
    127: "␡",
}


@dataclass(frozen=True)
class TokenView:
    """One token as it is shown.

    Attributes:
        heat: the level of its colour, 0 to HEAT_LEVELS - 1; None without a score.
        weight: LIGHT, PLAIN or HEAVY; other than PLAIN only where a policy weighs its positions differently.
        is_stop: whether the keyboard reaches it, as it does the selected ones with the highest scores.
    """

    text: str
    heat: int | None
    selected: bool
    tooltip: str
    weight: int = PLAIN
    is_stop: bool = False


def visible(text: str) -> str:
    """Show line ends (and keep them), and show other control characters as their pictures or as U+FFFD."""
    return text.translate(_PICTURES)


def marked_part(text: str) -> tuple[str, str, str]:
    """Split into white space before, the part to mark, and line ends after; spaces alone are marked themselves."""
    body = text.rstrip("\n")
    core = body.lstrip(" \t\n") or body
    return body[: len(body) - len(core)], core, text[len(body) :]


def heat_scale(samples: list[dict[str, Any]]) -> tuple[float, float]:
    """The lowest and the highest score that colours tell apart, over all the samples.

    The highest is the 98th percentile, so that one outlier does not wash out the rest.
    """
    scores = [
        score
        for sample in samples
        for score, valid in zip(sample["scores"], sample["valid"], strict=True)
        if valid and score is not None and np.isfinite(score)
    ]
    if not scores:
        return 0.0, 1.0
    lowest, highest = min(0.0, float(np.min(scores))), float(np.percentile(scores, 98))
    return lowest, highest if highest > lowest else lowest + 1.0


def token_views(sample: dict[str, Any], scale: tuple[float, float], unit: str = "nats") -> list[TokenView]:
    """Make a view of each token of one sample, {tokens, scores, selected, valid}, all lists of length L.

    Index t of scores, selected and valid is about token t+1, so token t+1 takes its colour from index t; the first
    token has none. ``weights``, if the sample has them, are the policy's coefficients.
    """
    lowest, highest = scale
    weights = sample.get("weights")
    positive = [weight for weight in weights or [] if weight > 0]
    mean = sum(positive) / len(positive) if positive else 1.0
    lowest_stop = _lowest_stop(sample)
    views = []
    for index, token in enumerate(sample["tokens"]):
        score = sample["scores"][index - 1] if index and sample["valid"][index - 1] else None
        if score is None or not np.isfinite(score):
            views.append(TokenView(visible(token), None, False, "not a prediction target"))
            continue
        selected = bool(sample["selected"][index - 1])
        level = int(np.clip((score - lowest) / (highest - lowest), 0, 1) * (HEAT_LEVELS - 1) + 0.5)
        tooltip = f"{formats.nats(score)} {unit}".strip() + (", selected" if selected else "")
        share = weights[index - 1] / mean if weights and selected else 1.0
        if abs(share - 1) > 1e-3:
            tooltip += f", {formats.decimal(share, 2)} times the mean weight"
        weight = HEAVY if share >= _HEAVY_FROM else LIGHT if share < _LIGHT_BELOW else PLAIN
        views.append(TokenView(visible(token), level, selected, tooltip, weight, selected and score >= lowest_stop))
    return views


def _lowest_stop(sample: dict[str, Any]) -> float:
    """The score from which on a selected token is a stop of the keyboard."""
    columns = zip(sample["scores"], sample["selected"], sample["valid"], strict=True)
    scores = sorted(score for score, selected, valid in columns if selected and valid and score is not None)
    return scores[-_STOPS] if len(scores) >= _STOPS else -math.inf
