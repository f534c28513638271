"""Numbers that depend on time or on the training data: statistics as of a moment, percentiles, ages."""

from __future__ import annotations

import dataclasses
import decimal
import math
from collections.abc import Iterator

import numpy as np
import pyarrow as pa

from brewjax.data.prompts.numbers import DIGITS, LARGEST, SMALLEST
from brewjax.data.tables.card import Attribute, Statistic
from brewjax.data.tables.dataset import Dataset
from brewjax.data.tables.point_in_time import PointInTimeIndex


def format_number(value: float) -> str:
    """A number as people write it: a whole one in full, another with DIGITS significant digits but never fewer than two
    decimals, so that money keeps its cents; no zeros at the end, and no exponent but for what is too small or too large
    to be read without one, e.g. "129.99", "0.000000001", "1.5e-20"."""
    if isinstance(value, int):
        return str(value)
    if value and not SMALLEST <= abs(value) < LARGEST:
        digits, exponent = f"{value:.{DIGITS - 1}e}".split("e")
        return f"{digits.rstrip('0').rstrip('.')}e{int(exponent)}"
    decimals = max(2, DIGITS - 1 - math.floor(math.log10(abs(value)))) if value else 0
    # By way of the shortest text that reads as this float: 0.125 is that and not a bit less or more.
    text = f"{round(decimal.Decimal(repr(float(value))), decimals):f}"
    text = text.rstrip("0").rstrip(".") if "." in text else text
    return "0" if text == "-0" else text


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
