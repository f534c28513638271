"""Point-in-time statistics: sums over the events strictly older than a time, for many keys and times at once."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

DAY = 86_400_000_000  # microseconds
LONG_RUN = 1024  # events of a key that are summed by a call of their own
EXACT = 1 << 53  # up to here float64 has every whole number
MANY = 4096  # queries that are worth sorting: a search in order stays in the processor's cache

Window = tuple[np.ndarray, np.ndarray]


class Totals(NamedTuple):
    """Running totals of values, restarted for each key, so that a key's sums do not depend on any other key.

    Attributes:
      inclusive: float64 [events], in the index's order; the sum of the key's values up to and with this one.
      first: bool [events], whether a key begins here.
    """

    inclusive: np.ndarray
    first: np.ndarray

    def over(self, window: Window) -> np.ndarray:
        """float64 [windows]: the sum over each window."""
        start, end = window
        if not len(self.inclusive):
            return np.zeros(len(start))
        begun = np.minimum(start, len(self.first) - 1)
        before = np.where(self.first[begun], 0.0, self.inclusive[begun - 1])
        return np.where(end > start, self.inclusive[end - 1] - before, 0.0)


class PointInTimeIndex:
    """An index of events by key (a member, an item, ..) and time.

    The events are sorted once. A window of a key's events before a time is then a binary search, and a sum over a
    window is the difference of two running totals, so thousands of queries cost a few vectorised operations.

    Args:
      keys: int64 [events].
      times: int64 [events], microseconds since 1970. Events of one key and time keep their order.
    """

    def __init__(self, keys: np.ndarray, times: np.ndarray):
        self._times = np.sort(times)
        codes = self._code(keys, times)
        self._order = np.argsort(codes, kind="stable")
        self._codes = codes[self._order]
        sorted_keys = keys[self._order]
        self._first = np.ones(len(keys), bool)
        self._first[1:] = sorted_keys[1:] != sorted_keys[:-1]

    def _code(self, keys: np.ndarray, times: np.ndarray) -> np.ndarray:
        """int64 codes that sort by key, then time; a time has the code of the first event at or after it."""
        return keys.astype(np.int64) * (len(self._times) + 1) + _search(self._times, times)

    def window(self, keys: np.ndarray, times: np.ndarray, days: float | None = None) -> Window:
        """Finds the events of keys strictly before a time.

        Args:
          keys: int64 [windows], one key may have several windows.
          times: int64 [windows], microseconds since 1970; an event at that very time is outside.
          days: how far back a window reaches; None for all earlier events.

        Returns:
          int64 [windows] each: first position and end of each window in the index's order, for the methods below.
        """
        end = _search(self._codes, self._code(keys, times))
        since = np.full(len(times), np.iinfo(np.int64).min) if days is None else times - int(days * DAY)
        return _search(self._codes, self._code(keys, since)), end

    def totals(self, values: np.ndarray) -> Totals:
        """Makes running totals. Each key's values are added in order of time.

        Args:
          values: [events], in the order that the index was made with.

        Returns:
          What `Totals.over` takes the sum of any window from.
        """
        inclusive = values[self._order].astype(np.float64) + 0.0  # no -0.0, which some orders of adding lose
        starts = np.flatnonzero(self._first)
        sizes = np.diff(starts, append=len(inclusive))
        if _adds_up_exactly(values):  # so a key's totals are differences of those of all
            before = inclusive[starts]
            np.cumsum(inclusive, out=inclusive)
            inclusive -= np.repeat(inclusive[starts] - before, sizes)
            return Totals(inclusive, self._first)
        for start, size in zip(starts[sizes > LONG_RUN], sizes[sizes > LONG_RUN], strict=True):
            np.cumsum(inclusive[start : start + size], out=inclusive[start : start + size])
        short = np.flatnonzero(sizes <= LONG_RUN)
        short = short[np.argsort(-sizes[short], kind="stable")]
        starts, sizes = starts[short], sizes[short]
        for step in range(1, int(sizes.max(initial=0))):  # the step-th event of every key that has so many
            positions = starts[: np.searchsorted(-sizes, -step, side="left")] + step
            inclusive[positions] += inclusive[positions - 1]
        return Totals(inclusive, self._first)

    def sum(self, values: np.ndarray, window: Window) -> np.ndarray:
        """float64 [windows]: the sum of `values` [events] over each window."""
        return self.totals(values).over(window)

    def mean(self, values: np.ndarray, window: Window) -> np.ndarray:
        """float64 [windows]: the mean of `values` [events] over each window, without those that are NaN; NaN for a
        window without values."""
        known = ~np.isnan(values)
        with np.errstate(invalid="ignore"):
            return self.sum(np.where(known, values, 0), window) / self.sum(known, window)

    def since(self, window: Window, times: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """How long ago the events of each window were.

        Args:
          window: as `window` returns it.
          times: int64 [windows], microseconds since 1970.

        Returns:
          Days from the first and from the last event of each window to its time, float64 [windows] each; NaN for an
          empty window.
        """
        if not len(self._codes):
            return np.full(len(times), np.nan), np.full(len(times), np.nan)
        start, end = window
        event_times = self._times[self._codes % (len(self._times) + 1)]
        occupied = end > start
        first = event_times[np.where(occupied, start, 0)]
        last = event_times[np.where(occupied, end - 1, 0)]
        return np.where(occupied, (times - first) / DAY, np.nan), np.where(occupied, (times - last) / DAY, np.nan)


def _adds_up_exactly(values: np.ndarray) -> bool:
    """Whether values are whole numbers whose sums in any order are exact in float64."""
    if values.dtype == bool:
        return True
    with np.errstate(invalid="ignore", over="ignore"):
        return bool((values == np.rint(values)).all() and np.abs(values).sum(dtype=np.float64) < EXACT)


def _search(ordered: np.ndarray, values: np.ndarray) -> np.ndarray:
    """`np.searchsorted(ordered, values)`, several times as fast for many values."""
    if len(values) < MANY:
        return np.searchsorted(ordered, values)
    order = np.argsort(values)
    positions = np.empty(len(values), np.int64)
    positions[order] = np.searchsorted(ordered, values[order])
    return positions
