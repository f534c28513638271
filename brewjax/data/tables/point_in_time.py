"""Statistics of events as of a moment, for many keys and moments at once."""

from __future__ import annotations

import numpy as np


class PointInTimeIndex:
    """Sums over the events of a key (a member, an item, ..) that are strictly older than a moment.

    All questions are answered at once: events are sorted once, a question is a binary search, a sum is the difference
    of two running totals.

    Args:
      keys: int64 [events].
      times: int64 [events], microseconds.
    """

    def __init__(self, keys: np.ndarray, times: np.ndarray):
        self._times = np.sort(times)
        codes = self._code(keys, times)
        self._order = np.argsort(codes, kind="stable")
        self._codes = codes[self._order]

    def _code(self, keys: np.ndarray, moments: np.ndarray) -> np.ndarray:
        """Ordered by key, then time; a moment's code is that of the first event at or after it."""
        return keys.astype(np.int64) * (len(self._times) + 1) + np.searchsorted(self._times, moments)

    def window(self, keys: np.ndarray, moments: np.ndarray, days: float = np.inf) -> tuple[np.ndarray, np.ndarray]:
        """Positions [start, end) of the key's events in the last `days` before each moment, for the methods below."""
        end = np.searchsorted(self._codes, self._code(keys, moments))
        since = moments - int(days * DAY) if np.isfinite(days) else np.full(len(moments), np.iinfo(np.int64).min)
        return np.searchsorted(self._codes, self._code(keys, since)), end

    def totals(self, values: np.ndarray) -> np.ndarray:
        """float64 [events + 1]: running totals of `values` [events]; the sum over a window is totals[end] - [start]."""
        return np.concatenate([[0.0], np.cumsum(values[self._order], dtype=np.float64)])

    def sum(self, values: np.ndarray, window: tuple[np.ndarray, np.ndarray]) -> np.ndarray:
        """float64 [moments]: the sum of `values` [events] over each window."""
        totals = self.totals(values)
        return totals[window[1]] - totals[window[0]]

    def mean(self, values: np.ndarray, window: tuple[np.ndarray, np.ndarray]) -> np.ndarray:
        """float64 [moments]: the mean over each window, leaving out NaN; NaN for a mean of nothing."""
        known = ~np.isnan(values)
        with np.errstate(invalid="ignore"):
            return self.sum(np.where(known, values, 0), window) / self.sum(known, window)

    def since(self, window: tuple[np.ndarray, np.ndarray], moments: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Days from the first and from the last event of each window to its moment; NaN where there is none."""
        if not len(self._codes):
            return np.full(len(moments), np.nan), np.full(len(moments), np.nan)
        start, end = window
        times = self._times[self._codes % (len(self._times) + 1)]
        some = end > start
        first, last = times[np.where(some, start, 0)], times[np.where(some, end - 1, 0)]
        return np.where(some, (moments - first) / DAY, np.nan), np.where(some, (moments - last) / DAY, np.nan)


DAY = 86_400_000_000  # microseconds
