"""How selkd ends before it is done: the input was bad, something failed while running, or it was asked to end."""

import difflib
from collections.abc import Iterable

from selkd_cache.errors import InputError, RunError

__all__ = ["InputError", "Interrupted", "RunError", "cut", "nearest", "shown"]


class Interrupted(RuntimeError):
    """Asked to end before it was done, which a signal or a time limit does; what was finished is kept.

    The command line exits with 75 (``EX_TEMPFAIL``): the same command continues.
    """


def shown(value: object) -> str:
    """A value in a message, as Python writes it, cut if it is long."""
    try:
        return cut(repr(value))
    except ValueError:
        return "an integer of more digits than Python writes"


def cut(text: object, length: int = 200) -> str:
    """A text in a message, cut if it is long."""
    text = str(text)
    return text if len(text) <= length else f"{text[:length]}… ({len(text):,} characters)"


def nearest(given: object, names: Iterable[str]) -> str:
    """`` Did you mean 'x'?`` for the nearest of ``names``, or nothing."""
    close = difflib.get_close_matches(str(given), list(names), n=1, cutoff=0.5)
    return f" Did you mean {close[0]!r}?" if close else ""
