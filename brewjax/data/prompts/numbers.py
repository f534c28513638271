"""How prompts write numbers and spans of time."""

from __future__ import annotations

import decimal
import functools
import math

import numpy as np

DIGITS = 6  # significant digits of a number
SMALLEST, LARGEST = 1e-15, 1e21  # absolute values that are written without an exponent
MICROSECOND_UNITS = {
    "minute": 60_000_000,
    "hour": 3_600_000_000,
    "day": 86_400_000_000,
    "week": 604_800_000_000,
    "month": 2_629_800_000_000,
    "year": 31_557_600_000_000,
}
_UNITS, _SIZES = [*MICROSECOND_UNITS], np.array([*MICROSECOND_UNITS.values()])


def ages(microseconds: np.ndarray) -> list[tuple[int, str]]:
    """Spans of time (int64, none negative), each in the largest unit that fits, e.g. (2, "day"); under a minute is
    (0, "minute")."""
    unit = np.maximum(np.searchsorted(_SIZES, microseconds, side="right") - 1, 0)
    counts = microseconds // _SIZES[unit]
    return [(count, _UNITS[index]) for count, index in zip(counts.tolist(), unit.tolist(), strict=True)]


@functools.lru_cache(maxsize=1 << 14, typed=True)  # most numbers of a table are few: stars, prices
def format_number(value: float) -> str:
    """Writes a number as people do, e.g. "129.99", "0.000000001", "1.5e-20".

    Whole numbers are written in full; others with DIGITS significant digits, but never fewer than two decimals, so that
    money keeps its cents. There are no trailing zeros, and an exponent only for values outside [SMALLEST, LARGEST).
    """
    if isinstance(value, int):
        return str(value)
    if value and not SMALLEST <= abs(value) < LARGEST:
        digits, exponent = f"{value:.{DIGITS - 1}e}".split("e")
        return f"{digits.rstrip('0').rstrip('.')}e{int(exponent)}"
    decimals = max(2, DIGITS - 1 - math.floor(math.log10(abs(value)))) if value else 0
    # Rounds the shortest decimal that reads as this float: 0.125 is exactly that.
    text = f"{round(decimal.Decimal(repr(float(value))), decimals):f}"
    text = text.rstrip("0").rstrip(".") if "." in text else text
    return "0" if text == "-0" else text
