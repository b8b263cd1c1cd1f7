"""What training changed on held-out text, for a run's page: each token before and after, and what the models write.

Tokens and what models write are untrusted text. Nothing here makes HTML: the template escapes them.
"""

from dataclasses import dataclass
from typing import Any

import numpy as np

from selkd.reporting import formats
from selkd.reporting.coloured_text import HEAT_LEVELS, visible
from selkd.reporting.formats import dig

FARTHER_NATS = 0.1  # a token counts as farther from the teacher than before from here on
_STOPS = 10  # of each text so many tokens can be reached by the keyboard: those that changed most


@dataclass(frozen=True)
class ChangedToken:
    """One token; ``before`` and ``after`` are the levels of its colours, None where nothing is predicted.

    ``is_stop``: the keyboard reaches it.
    """

    text: str
    before: int | None
    after: int | None
    tip: str
    is_farther: bool
    is_stop: bool


@dataclass(frozen=True)
class Change:
    """The texts, the end of the colours' scale in nats, what the nats are, and how many positions went which way.

    ``cut_at``: the tokens at which texts were cut; None if none was.
    """

    texts: list[list[ChangedToken]]
    highest: float
    measured: str
    is_held_out: bool
    cut_at: int | None
    positions: int
    nearer: float
    farther: float
    before: np.ndarray
    after: np.ndarray


def change(held_out: dict[str, Any] | None) -> Change | None:
    """The view of ``held_out.json``; None where it has no position."""
    texts = dig(held_out, "texts") or []
    pairs = [pair for text in texts for pair in _pairs(text) if pair is not None]
    if not pairs:
        return None
    before, after = np.array(pairs, dtype=np.float64).T
    highest = max(float(np.percentile(before, 98)), 1e-3)
    is_kl = dig(held_out, "nats_of") == "kl"
    return Change(
        texts=[_tokens(text, highest, "KL" if is_kl else "cross-entropy") for text in texts],
        highest=highest,
        measured="KL to the teacher" if is_kl else "cross-entropy with the text",
        is_held_out=bool(held_out and held_out.get("is_held_out", True)),
        cut_at=dig(held_out, "cut_at"),
        positions=len(pairs),
        nearer=float(np.mean(after < before)),
        farther=float(np.mean(after - before >= FARTHER_NATS)),
        before=before,
        after=after,
    )


def _pairs(text: dict[str, Any]) -> list[tuple[float, float] | None]:
    """Of each position the nats before and after; None where nothing is predicted."""
    pairs = zip(text["before"], text["after"], strict=True)
    return [None if old is None or new is None else (float(old), float(new)) for old, new in pairs]


def _tokens(text: dict[str, Any], highest: float, measured: str) -> list[ChangedToken]:
    pairs = _pairs(text)
    sizes = [0.0 if pair is None else abs(pair[1] - pair[0]) for pair in pairs]
    stops = set(sorted(range(len(pairs)), key=lambda t: -sizes[t])[:_STOPS])
    tokens = []
    for index, token in enumerate(text["tokens"]):
        pair = pairs[index - 1] if index else None
        if pair is None:
            tokens.append(ChangedToken(visible(token), None, None, "not a prediction target", False, False))
            continue
        old, new = (int(min(1.0, value / highest) * (HEAT_LEVELS - 1) + 0.5) for value in pair)
        tip = f"{_quoted(token)}: {measured} {formats.nats(pair[0])} → {formats.nats(pair[1])} nats"
        ranked = {
            "the teacher": dig(text, "teacher_first"),
            "the student before": dig(text, "before_first"),
            "after": dig(text, "after_first"),
        }
        told = [f"{who} {_quoted(first[index - 1])}" for who, first in ranked.items() if first]
        tip += f". Ranked first by {', '.join(told)}" if told else ""
        tokens.append(
            ChangedToken(visible(token), old, new, tip, pair[1] - pair[0] >= FARTHER_NATS, index - 1 in stops)
        )
    return tokens


def _quoted(token: str | None) -> str:
    """A token on one line: its white space is told apart from none."""
    return f"“{visible(token or '').replace(chr(10), '').replace(' ', '␣')}”"


@dataclass(frozen=True)
class Written:
    """What one model wrote: the beginning that is the teacher's, the rest, and a note; all empty if it did not."""

    who: str
    same: str
    rest: str
    note: str


def continuations(held_out: dict[str, Any] | None) -> list[tuple[str, list[Written]]]:
    """Each prompt with what teacher, student before and student after wrote; models that did not write are left out."""
    rows = []
    for row in dig(held_out, "continuations") or []:
        titles = {"teacher": "Teacher", "before": "Student before", "after": "Student after"}
        answers = [_written(title, row.get(key), is_teacher=key == "teacher") for key, title in titles.items()]
        if known := [answer for answer in answers if answer is not None]:
            rows.append((visible(row["prompt"]), known))
    return rows


def missing(held_out: dict[str, Any] | None) -> list[str]:
    """Why models did not write; nothing where nobody was to write."""
    failure = dig(held_out, "why_not_written")
    if not dig(held_out, "continuations") and failure is None:
        return []
    return [str(why) for why in (dig(held_out, "why_no_teacher"), failure) if why is not None]


def _written(who: str, answer: dict[str, Any] | None, *, is_teacher: bool) -> Written | None:
    if answer is None:
        return None
    text, same = str(answer["text"]), "" if is_teacher else str(answer.get("same_text") or "")
    same = same if text.startswith(same) else ""
    note = ""
    if not is_teacher and answer.get("same") is not None:
        shared = answer["same"]
        note = (
            f"the first {formats.count(shared)} tokens are the teacher’s"
            if shared > 1
            else "the first token is the teacher’s"
        )
        if answer["same"] == 0:
            note = "another first token than the teacher’s"
        if answer["same"] == answer["tokens"]:
            note = "word for word the teacher’s"
    rest = text[len(same) :]
    return Written(who, visible(same.lstrip(" ")), visible(rest if same else rest.lstrip(" ")), note)


def require_shape(content: dict[str, Any]) -> None:
    """Raises ValueError, saying what was expected, unless the content can be shown."""
    for name in ("texts", "continuations"):
        if not isinstance(content.get(name), list) or not all(isinstance(entry, dict) for entry in content[name]):
            raise ValueError(f'expected a list "{name}" of objects')
    for number, text in enumerate(content["texts"]):
        columns: dict[str, Any] = {name: text.get(name) for name in ("tokens", "before", "after")}
        columns |= {name: text[name] for name in ("teacher_first", "before_first", "after_first") if text.get(name)}
        if not all(isinstance(column, list) for column in columns.values()):
            raise ValueError(f"text {number}: expected lists {', '.join(columns)}")
        if len({len(column) for column in columns.values()}) != 1:
            raise ValueError(f"text {number}: expected lists of one length")
        if not all(isinstance(token, str) for token in columns["tokens"]):
            raise ValueError(f"text {number}: expected tokens to be texts")
        if not all(
            value is None or isinstance(value, int | float) for name in ("before", "after") for value in columns[name]
        ):
            raise ValueError(f"text {number}: expected numbers before and after")
