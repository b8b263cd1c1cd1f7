import math
import re
from collections.abc import Callable

import pytest
from hypothesis import given
from hypothesis import strategies as some

from selkd.reporting import formats


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (formats.count(42_840), "42,840"),
        (formats.perplexity(7.314), "7.31"),
        (formats.perplexity(98.87), "98.9"),
        (formats.perplexity(3_012_345.2), "3,012,345"),
        (formats.nats(1.782), "1.78"),
        (formats.nats(0.0781), "0.078"),
        (formats.nats(-1.5), "−1.50"),
        (formats.percent(0.6241), "62.4%"),
        (formats.fraction(0.2), "20%"),
        (formats.fraction(0.0025), "0.25%"),
        (formats.parameters(134_515_008), "134.5M"),
        (formats.parameters(1_720_574_976), "1.72B"),
        (formats.parameters(812), "812"),
        (formats.data_size(318), "318 B"),
        (formats.data_size(999_999), "1.00 MB"),
        (formats.data_size(31_800_000), "31.8 MB"),
        (formats.data_size(3_412_000_000), "3.41 GB"),
        (formats.data_size(0), "0 B"),
        (formats.round_size(1000), "1 kB"),
        (formats.bytes_per_position(31.7), "31.7 B"),
        (formats.bytes_per_position(98_304), "98,304 B"),
        (formats.duration(8.44), "8.4 s"),
        (formats.duration(59.99), "1 min 00 s"),
        (formats.duration(316.9), "5 min 17 s"),
        (formats.duration(7_500), "2 h 05 min"),
        (formats.times(98_304, 31.7), "3,101×"),
        (formats.arrow(1.782, None, formats.nats), "1.78 → –"),
        (formats.arrow(None, None, formats.nats), "–"),
        (formats.nats(0.0), "0.00"),
        (formats.nats(-0.00004), "−0.000040"),
        (formats.percent(-0.0001, 0), "0%"),
        (formats.fraction(-0.0), "0%"),
        (formats.counted(1, "optimiser step"), "1 optimiser step"),
        (formats.counted(2_000, "optimiser step"), "2,000 optimiser steps"),
        (formats.counted(None, "step"), "– steps"),
        (formats.plus_minus(-0.00004, 0.00002, formats.nats), "−0.000040 ± 0.000020"),
        (formats.plus_minus(0.8021, 0.0063, formats.nats), "0.802 ± 0.006"),
        (formats.plus_minus(34.02, 0.231, formats.perplexity), "34.0 ± 0.23"),
        (formats.plus_minus(0.5, 0.0, formats.percent), "50.0% ± 0"),
        (formats.plus_minus(0.5, None, formats.percent), "50.0%"),
        (formats.signed(0.3, formats.nats), "+0.30"),
        (formats.signed(-0.3, formats.nats), "−0.30"),
        (formats.signed(1e-9, formats.nats), "0.000"),
        (formats.decimal(math.nan, 1), "NaN"),
        (formats.decimal(-math.inf, 1), "−∞"),
    ],
)
def test_a_number_reads_as_a_person_would_write_it(text: str, expected: str) -> None:
    assert text == expected


@pytest.mark.parametrize(
    "form",
    [
        formats.count,
        formats.perplexity,
        formats.nats,
        formats.percent,
        formats.fraction,
        formats.parameters,
        formats.data_size,
        formats.bytes_per_position,
        formats.duration,
        formats.or_dash,
    ],
)
def test_what_is_not_known_is_a_dash(form: object) -> None:
    assert callable(form)
    assert form(None) == "–"


def test_a_share_of_nothing_is_not_known() -> None:
    assert formats.share(1, 4) == 0.25
    assert formats.share(0, 4) == 0.0
    assert formats.share(None, 4) is None
    assert formats.share(3, 0) is None
    assert formats.share(3, None) is None


def test_dig_stops_at_null_and_at_absent_branches() -> None:
    tree = {"a": {"b": {"c": 0}}, "null": None, "leaf": 3}
    assert formats.dig(tree, "a", "b", "c") == 0
    assert formats.dig(tree, "a", "x", "c") is None
    assert formats.dig(tree, "null", "b") is None
    assert formats.dig(tree, "leaf", "b") is None


FORMS = (
    formats.count,
    formats.perplexity,
    formats.nats,
    formats.percent,
    lambda value: formats.percent(value, 0),
    formats.fraction,
    formats.parameters,
    formats.data_size,
    formats.bytes_per_position,
    formats.duration,
    formats.score,
)


@given(some.floats(-1e15, 1e15, allow_nan=False), some.sampled_from(FORMS))
def test_no_form_shows_a_negative_zero_or_loses_the_sign(value: float, form: Callable[[float | None], str]) -> None:
    text = form(value)
    shows_zero = not re.search(r"[1-9]", text)
    assert text.startswith(formats.MINUS) == (value < 0 and not shows_zero)
    assert "-" not in text.replace("e-", "")
    assert formats.signed(value, form).startswith("+") == (value > 0 and not shows_zero)


@given(some.floats(1e-6, 1e6), some.booleans(), some.sampled_from((formats.nats, formats.perplexity, formats.score)))
def test_what_is_not_zero_does_not_show_as_zero_and_is_within_a_tenth(
    size: float, is_negative: bool, form: Callable[[float | None], str]
) -> None:
    value = -size if is_negative else size
    shown = float(form(value).replace(formats.MINUS, "-").replace(",", ""))
    assert shown != 0
    assert shown == pytest.approx(value, rel=0.1 if size >= 1e-5 else 0.5)


@given(some.integers(0, 10**9))
def test_only_one_is_singular(number: int) -> None:
    assert formats.counted(number, "step").endswith("steps") == (number != 1)
