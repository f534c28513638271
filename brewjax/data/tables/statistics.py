"""Numbers that depend on time or on the training data: item statistics as of a time, and percentile scales."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator

import numpy as np
import pyarrow as pa

from brewjax.data.tables.card import Attribute, Statistic
from brewjax.data.tables.dataset import Dataset
from brewjax.data.tables.point_in_time import PointInTimeIndex


class ItemStatistic:
    """A `Statistic` of items as of a time: only strictly older events count."""

    def __init__(self, dataset: Dataset, statistic: Statistic):
        self._events = PointInTimeIndex(dataset.event_item, dataset.event_time)
        self._counts: np.ndarray | None = None  # of a mean: how many known values
        if statistic.mean is not None:
            values = dataset.event_column(statistic.mean).cast(pa.float64()).to_numpy()
            known = ~np.isnan(values)
            self._sums, self._counts = self._events.totals(np.where(known, values, 0)), self._events.totals(known)
        else:
            self._sums = self._events.totals(np.isin(dataset.event_action, statistic.count or ()))

    def at(self, items: np.ndarray, times: np.ndarray) -> np.ndarray:
        """float64 [items]: the statistic of each item as of its time; NaN for a mean without values.

        Args:
          items: int [items], rows of the items table.
          times: int64 [items], microseconds since 1970.
        """
        start, end = self._events.window(items, times)
        sums = self._sums[end] - self._sums[start]
        if self._counts is None:
            return sums
        with np.errstate(invalid="ignore"):
            return sums / (self._counts[end] - self._counts[start])


@dataclasses.dataclass(frozen=True)
class Percentiles:
    """Percentile scales of number attributes, fitted on training data only.

    Attributes:
      quantiles: by "table.column", the 99 values that split the training data into hundredths; empty without data.
    """

    quantiles: dict[str, list[float]]

    @classmethod
    def fit(cls, dataset: Dataset, until: int) -> Percentiles:
        """Fits the scale of every percentile attribute on the events before `until` (microseconds since 1970) and on
        the members and items that occur in them; item statistics are computed as of each of these events."""
        events = np.flatnonzero(dataset.event_time < until)
        rows_by_table = {
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
                values = column.take(rows_by_table[table]).cast(pa.float64()).to_numpy()
            values = values[np.isfinite(values)]
            quantiles[f"{table}.{attribute.column}"] = (
                np.quantile(values, np.arange(1, 100) / 100).tolist() if len(values) else []
            )
        return cls(quantiles)

    def percentile(self, table: str, column: str, value: float) -> int:
        """The hundredth of the training data that `value` falls in, 1 to 100."""
        return int(np.searchsorted(self.quantiles[f"{table}.{column}"], value, side="left")) + 1


def percentile_attributes(dataset: Dataset) -> Iterator[tuple[str, Attribute]]:
    """Yields (table, attribute) for every attribute that is rendered as a percentile."""
    for table in ("members", "items", "events"):
        for attribute in getattr(dataset.card, table).attributes:
            if attribute.percentile:
                yield table, attribute
