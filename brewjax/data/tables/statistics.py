"""Numbers that depend on time or on the training data: statistics as of a moment, percentiles, ages."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator

import numpy as np
import pyarrow as pa

from brewjax.data.tables.card import Attribute, Statistic
from brewjax.data.tables.dataset import Dataset
from brewjax.data.tables.point_in_time import PointInTimeIndex


class ItemStatistic:
    """A `Statistic` of items at moments: only events strictly older than the moment count."""

    def __init__(self, dataset: Dataset, statistic: Statistic):
        self._as_of = PointInTimeIndex(dataset.event_item, dataset.event_time)
        self._counts: np.ndarray | None = None  # nothing to divide by
        if statistic.mean is not None:
            values = dataset.event_column(statistic.mean).cast(pa.float64()).to_numpy()
            known = ~np.isnan(values)
            self._sums, self._counts = self._as_of.totals(np.where(known, values, 0)), self._as_of.totals(known)
        else:
            self._sums = self._as_of.totals(np.isin(dataset.event_action, statistic.count or ()))

    def at(self, items: np.ndarray, moments: np.ndarray) -> np.ndarray:
        """float64 [items]: each item's statistic before its moment (microseconds); NaN for a mean of nothing."""
        start, end = self._as_of.window(items, moments)
        sums = self._sums[end] - self._sums[start]
        if self._counts is None:
            return sums
        with np.errstate(invalid="ignore"):
            return sums / (self._counts[end] - self._counts[start])


@dataclasses.dataclass(frozen=True)
class Percentiles:
    """Percentile scales of number attributes, fitted on training data only.

    Attributes:
      quantiles: for "table.column", the 99 values that cut the training data into hundredths.
    """

    quantiles: dict[str, list[float]]

    @classmethod
    def fit(cls, dataset: Dataset, until: int) -> Percentiles:
        """Fits every attribute that is said as a percentile on events before `until` (microseconds) and on the
        members and items that occur in them; statistics are taken as of each of those events."""
        events = np.flatnonzero(dataset.event_time < until)
        seen = {
            "members": np.unique(dataset.event_member[events]),
            "items": np.unique(dataset.event_item[events]),
            "events": events,
        }
        quantiles = {}
        for table, attribute in percentile_attributes(dataset):
            if attribute.derive:
                statistic = ItemStatistic(dataset, attribute.derive)
                values = statistic.at(dataset.event_item[events], dataset.event_time[events])
            else:
                column: pa.ChunkedArray = getattr(dataset, table)[attribute.column]
                values = column.take(seen[table]).cast(pa.float64()).to_numpy()
            values = values[np.isfinite(values)]
            quantiles[f"{table}.{attribute.column}"] = (
                np.quantile(values, np.arange(1, 100) / 100).tolist() if len(values) else []
            )
        return cls(quantiles)

    def of(self, table: str, column: str, value: float) -> int:
        """1 to 100: the hundredth of the training data that `value` falls in."""
        return int(np.searchsorted(self.quantiles[f"{table}.{column}"], value, side="left")) + 1


def percentile_attributes(dataset: Dataset) -> Iterator[tuple[str, Attribute]]:
    """The attributes said as percentiles, with the table each belongs to."""
    for table in ("members", "items", "events"):
        for attribute in getattr(dataset.card, table).attributes:
            if attribute.percentile:
                yield table, attribute
