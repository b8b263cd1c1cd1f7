"""Formats a record's values for people. Every number may be None (a stage did not run), which shows as a dash."""

import math
import re
from collections.abc import Callable, Mapping
from typing import Any

DASH = "–"
MINUS = "−"
Form = Callable[[float | None], str]  # formats a number for people

_SMALLEST = 1e-6  # smaller numbers show as zero
_SIZE_UNITS = ("B", "kB", "MB", "GB", "TB", "PB")
_COUNT_UNITS = ((1e12, "T"), (1e9, "B"), (1e6, "M"), (1e3, "k"))


def dig(tree: Any, *keys: str) -> Any:
    """tree[keys[0]][keys[1]]… or None where a branch is null or absent."""
    for key in keys:
        if not isinstance(tree, Mapping):
            return None
        tree = tree.get(key)
    return tree


def or_dash(value: object) -> str:
    """A value that is no number, as text."""
    return DASH if value is None else str(value)


def capital(text: str) -> str:
    """The text with its first letter as a capital and the others as they are: KL to the teacher, Top-1 agreement."""
    return text[:1].upper() + text[1:]


def decimal(value: float | None, digits: int) -> str:
    """A number with a fixed count of decimals, thousands separated: 1,234.5.

    A number that these would show as zero, but is none, has as many more as show two of its digits (0.00043), down to
    a millionth. Zero has no sign.
    """
    if value is None:
        return DASH
    if math.isnan(value):
        return "NaN"
    if math.isinf(value):
        return "∞" if value > 0 else MINUS + "∞"
    text = f"{value:,.{digits}f}"
    if digits and _is_zero(text) and abs(value) >= _SMALLEST:
        text = f"{value:.{min(6, 1 - math.floor(math.log10(abs(value))))}f}"
    return text.removeprefix("-") if _is_zero(text) else text.replace("-", MINUS)


def _is_zero(text: str) -> bool:
    return not text.strip("-0.")


def counted(value: float | None, noun: str, plural: str | None = None) -> str:
    """A count with its noun, which is in the plural unless it is one: 1 optimiser step, 2,000 optimiser steps."""
    text = count(value)
    return f"{text} {noun if text == '1' else plural or noun + 's'}"


def plus_minus(value: float | None, error: float | None, form: Form) -> str:
    """A figure with its error, if that is known: 7.31 ± 0.26, 54.3% ± 1.2%; an error of exactly zero is 0.

    A plain number that its form would cut off before the error gets the error's decimals: 0.802 ± 0.006.
    """
    shown = form(value)
    if value is None or error is None:
        return shown
    of_error = form(error) if error else "0"
    if _is_plain(shown) and _is_plain(of_error) and 0 < error < 10.0 ** -_decimals(shown):
        shown = decimal(value, _decimals(of_error))
    return f"{shown} ± {of_error}"


def _is_plain(text: str) -> bool:
    return not text.strip(MINUS + "0123456789,.")


def _decimals(text: str) -> int:
    return len(text.partition(".")[2])


def signed(value: float | None, form: Form) -> str:
    """A difference with its sign: +0.30, −0.30, and 0.00 without one."""
    text = form(value)
    shows_more = value is not None and value > 0 and not _is_zero(re.sub(r"[^\d.]", "", text))
    return f"+{text}" if shows_more else text


def count(value: float | None) -> str:
    """A whole number, thousands separated: 42,840."""
    return decimal(value, 0)


def perplexity(value: float | None) -> str:
    """Three digits, or all digits of a larger whole number: 7.31, 36.0, 3,012,345."""
    return DASH if value is None else _three_digits(value)


def _three_digits(value: float) -> str:
    size = abs(value)
    return decimal(value, 2 if size < 10 else 1 if size < 1000 else 0)


def nats(value: float | None) -> str:
    """Two decimals, or three below 0.1: 1.78, 0.078."""
    return decimal(value, 2 if not value or abs(value) >= 0.1 else 3)


def percent(share: float | None, digits: int = 1) -> str:
    """A share in [0, 1] as 62.4%."""
    return DASH if share is None else decimal(100 * share, digits) + "%"


def fraction(share: float | None) -> str:
    """A recipe's fraction without useless zeros: 20%, 0.25%."""
    return DASH if share is None else f"{100 * share:.4g}%".replace("-0%", "0%").replace("-", MINUS)


def parameters(value: float | None) -> str:
    """A count in thousands, millions and so on: 134.5M, 1.72B."""
    if value is None:
        return DASH
    for size, unit in _COUNT_UNITS:
        if abs(value) >= size:
            return _three_digits(value / size) + unit
    return count(value)


def data_size(value_bytes: float | None) -> str:
    """A size in decimal units: 318 B, 31.8 MB, 1.42 GB."""
    if value_bytes is None:
        return DASH
    scaled = float(value_bytes)
    for unit in _SIZE_UNITS:
        if abs(scaled) < 999.5 or unit == _SIZE_UNITS[-1]:
            break
        scaled /= 1000
    digits = 0 if unit == "B" or scaled >= 100 else 1 if scaled >= 10 else 2
    return f"{decimal(scaled, digits)} {unit}"


def round_size(value_bytes: float) -> str:
    """A power of ten of bytes for an axis: 10 B, 1 kB, 100 MB."""
    number, unit = data_size(value_bytes).split()
    return f"{float(number):g} {unit}"


def bytes_per_position(value: float | None) -> str:
    """A size always in bytes, so that layouts compare at a glance: 31.7 B, 98,304 B."""
    if value is None:
        return DASH
    return decimal(value, 0 if abs(value) >= 100 else 1) + " B"


def duration(seconds: float | None) -> str:
    """A time in its two largest units: 8.4 s, 5 min 20 s, 2 h 05 min."""
    if seconds is None:
        return DASH
    if seconds < 0:
        return MINUS + duration(-seconds)
    if seconds < 59.95:
        return decimal(seconds, 1) + " s"
    whole = round(seconds)
    if whole < 3600:
        return f"{whole // 60} min {whole % 60:02d} s"
    minutes = round(seconds / 60)
    return f"{minutes // 60:,} h {minutes % 60:02d} min"


def times(value: float | None, unit: float | None) -> str:
    """The value as a multiple of ``unit``: 6.1×, 3,101×."""
    if value is None or unit is None or unit == 0:
        return DASH
    ratio = value / unit
    return decimal(ratio, 1 if ratio < 100 else 0) + "×"


def arrow(before: float | None, after: float | None, form: Form) -> str:
    """A change, 98.9 → 36.0; a lone dash when neither value is known."""
    if before is None and after is None:
        return DASH
    return f"{form(before)} → {form(after)}"


def share(part: float | None, whole: float | None) -> float | None:
    """The share part / whole; None where either is unknown or the whole is 0."""
    return part / whole if part is not None and whole else None


def score(value: float | None) -> str:
    """A benchmark's number, be it a share or not: 0.644, 7.31, 1,204."""
    size = abs(value or 0.0)
    return decimal(value, 3 if size < 2 else 2 if size < 100 else 0)
