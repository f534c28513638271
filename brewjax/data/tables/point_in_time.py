"""Point-in-time statistics: sums over the events strictly older than a time, for many keys and times at once."""

from __future__ import annotations

import numpy as np

DAY = 86_400_000_000  # microseconds


class PointInTimeIndex:
    """An index of events by key (a member, an item, ..) and time.

    The events are sorted once. A window of a key's events before a time is then a binary search, and a sum over a
    window is the difference of two running totals, so thousands of queries cost a few vectorised operations.

    Args:
      keys: int64 [events].
      times: int64 [events], microseconds since 1970.
    """

    def __init__(self, keys: np.ndarray, times: np.ndarray):
        self._times = np.sort(times)
        codes = self._code(keys, times)
        self._order = np.argsort(codes, kind="stable")
        self._codes = codes[self._order]

    def _code(self, keys: np.ndarray, times: np.ndarray) -> np.ndarray:
        """int64 codes that sort by key, then time; a time has the code of the first event at or after it."""
        return keys.astype(np.int64) * (len(self._times) + 1) + np.searchsorted(self._times, times)

    def window(self, keys: np.ndarray, times: np.ndarray, days: float = np.inf) -> tuple[np.ndarray, np.ndarray]:
        """Positions [start, end) of each key's events in the last `days` before its time, for the methods below."""
        end = np.searchsorted(self._codes, self._code(keys, times))
        since = times - int(days * DAY) if np.isfinite(days) else np.full(len(times), np.iinfo(np.int64).min)
        return np.searchsorted(self._codes, self._code(keys, since)), end

    def totals(self, values: np.ndarray) -> np.ndarray:
        """float64 [events + 1]: running totals of `values` [events]; the sum over a window is totals[end] - [start]."""
        return np.concatenate([[0.0], np.cumsum(values[self._order], dtype=np.float64)])

    def sum(self, values: np.ndarray, window: tuple[np.ndarray, np.ndarray]) -> np.ndarray:
        """float64 [windows]: the sum of `values` [events] over each window."""
        totals = self.totals(values)
        return totals[window[1]] - totals[window[0]]

    def mean(self, values: np.ndarray, window: tuple[np.ndarray, np.ndarray]) -> np.ndarray:
        """float64 [windows]: the mean of the values over each window without NaN; NaN for a window without values."""
        known = ~np.isnan(values)
        with np.errstate(invalid="ignore"):
            return self.sum(np.where(known, values, 0), window) / self.sum(known, window)

    def since(self, window: tuple[np.ndarray, np.ndarray], times: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Days from the first and from the last event of each window to its time; NaN for an empty window."""
        if not len(self._codes):
            return np.full(len(times), np.nan), np.full(len(times), np.nan)
        start, end = window
        event_times = self._times[self._codes % (len(self._times) + 1)]
        occupied = end > start
        first = event_times[np.where(occupied, start, 0)]
        last = event_times[np.where(occupied, end - 1, 0)]
        return np.where(occupied, (times - first) / DAY, np.nan), np.where(occupied, (times - last) / DAY, np.nan)
