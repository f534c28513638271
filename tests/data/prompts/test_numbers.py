from __future__ import annotations

import re

import hypothesis
import numpy as np
import pytest
from hypothesis import strategies as st

from brewjax.data.prompts.numbers import ages, format_number

MINUTE, HOUR, DAY = 60_000_000, 3_600_000_000, 86_400_000_000


def test_an_age_is_in_the_largest_unit_that_fits():
    expected = {
        0: (0, "minute"),
        MINUTE - 1: (0, "minute"),
        MINUTE: (1, "minute"),
        HOUR - 1: (59, "minute"),
        HOUR: (1, "hour"),
        DAY: (1, "day"),
        7 * DAY - 1: (6, "day"),
        7 * DAY: (1, "week"),
        30 * DAY: (4, "week"),
        31 * DAY: (1, "month"),
        365 * DAY: (11, "month"),
        366 * DAY: (1, "year"),
        800 * DAY: (2, "year"),
    }
    assert dict(zip(expected, ages(np.array([*expected])), strict=True)) == expected


@hypothesis.given(st.integers(-(10**14), 10**14))
def test_money_keeps_its_cents(cents):
    whole, rest = divmod(abs(cents), 100)
    written = f"{whole}.{rest:02d}".rstrip("0").rstrip(".")
    assert format_number(cents / 100) == ("-" if cents < 0 else "") + written


@hypothesis.given(st.floats(allow_nan=False, allow_infinity=False) | st.integers(-(2**63), 2**63 - 1))
def test_a_number_is_said_plainly_and_nearly_as_it_is(value):
    text = format_number(value)
    assert float(text) == pytest.approx(value, rel=1e-5, abs=0)
    assert abs(float(text) - value) <= max(0.005, 1e-15 * abs(value)) or abs(value) >= 1e21
    assert not text.endswith((".", ".0"))
    if 1e-15 <= abs(value) < 1e21 or value == 0:
        assert re.fullmatch(r"-?\d+(\.\d*[1-9])?", text)


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        (129.99, "129.99"),
        (1234.56, "1234.56"),
        (1e-9, "0.000000001"),
        (1e-20, "1e-20"),
        (-0.0, "0"),
        (1 / 3, "0.333333"),
    ],
)
def test_numbers_are_said_as_people_write_them(value, expected):
    assert format_number(value) == expected
