"""TODO."""

from __future__ import annotations

DIGITS = 6  # significant, of a number that is said


SMALLEST, LARGEST = 1e-15, 1e21  # of a number that is said without an exponent


MICROSECOND_UNITS = {
    "year": 31_557_600_000_000,
    "month": 2_629_800_000_000,
    "week": 604_800_000_000,
    "day": 86_400_000_000,
    "hour": 3_600_000_000,
    "minute": 60_000_000,
}


def age(microseconds: int) -> tuple[int, str]:
    """A span of time in the largest unit that fits, e.g. (2, "day"); under a minute is (0, "minute")."""
    for unit, size in MICROSECOND_UNITS.items():
        if microseconds >= size:
            return microseconds // size, unit
    return 0, "minute"
