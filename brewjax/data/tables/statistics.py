"""`FactValues`: the facts of members, items, pairs and events as of a moment."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any, Literal, NamedTuple, Protocol

import numpy as np
import pyarrow as pa

from brewjax.data.tables.dataset import Dataset
from brewjax.data.tables.facts import Fact, FactGroup
from brewjax.data.tables.neighbors import Neighbors
from brewjax.data.tables.point_in_time import DAY, PointInTimeIndex, Totals, Window
from brewjax.data.tables.ragged import Ragged
from brewjax.data.tables.vectors import Similarities

Table = Literal["members", "items", "events"]


class FactSource(Protocol):
    """Where the numbers of facts come from: the events of a dataset, or a request that brings them."""

    def values(
        self, group: FactGroup, fact: Fact, members: np.ndarray, items: np.ndarray, times: np.ndarray
    ) -> np.ndarray:
        """Looks up a fact of members, items or pairs, each as of its time.

        Args:
          group: "members", "items" or "pairs"; of "members" the `items` play no part, and the reverse.
          fact: of that group.
          members: int [rows], rows of the members table.
          items: int [rows], rows of the items table.
          times: int64 [rows], microseconds since 1970.

        Returns:
          float64 [rows]; NaN where it is unknown.
        """

    def event_values(self, fact: Fact, events: np.ndarray) -> np.ndarray:
        """float64 [rows]: a fact of `events` (int [rows], rows of the events table); NaN where it is unknown."""


@dataclasses.dataclass(frozen=True)
class _KeyedEvents:
    """The events by one kind of key. An event counts once for each of its keys.

    Attributes:
      index: the events by key and time.
      event: int64 [entries], the event of each entry of the index.
      query: from members and items, the query (row) of each key to look up, and the key.
    """

    index: PointInTimeIndex
    event: np.ndarray
    query: Callable[[np.ndarray, np.ndarray], tuple[np.ndarray, np.ndarray]]


class _Pairs(NamedTuple):
    """Members and items, each pair as of its time: int [pairs] rows of the tables, int64 [pairs] microseconds."""

    members: np.ndarray
    items: np.ndarray
    times: np.ndarray


class FactValues:
    """Facts computed from a dataset's events: only events strictly older than the time of a question count.

    What is computed for all questions (indices, running totals, similarities) is kept, so a call costs what its own
    questions cost.
    """

    @classmethod
    def of(cls, dataset: Dataset) -> FactValues:
        """The facts of a dataset, made once for it; not for several threads."""
        return dataset.__dict__.setdefault("_fact_values", cls(dataset))

    def __init__(self, dataset: Dataset):
        self._dataset = dataset
        self._keyed: dict[tuple[str, str], _KeyedEvents] = {}
        self._totals: dict[tuple[Any, ...], Totals] = {}
        self._columns: dict[tuple[Any, ...], np.ndarray] = {}
        self._neighbors: dict[tuple[Any, ...], Neighbors] = {}
        self._similarities: dict[str, Similarities] = {}
        self._windows: tuple[_Pairs | None, dict[tuple[Any, ...], Any]] = (None, {})  # of the latest pairs

    def values(
        self, group: FactGroup, fact: Fact, members: np.ndarray, items: np.ndarray, times: np.ndarray
    ) -> np.ndarray:
        """See `FactSource`."""
        return self._values(group, fact, _Pairs(members, items, times))

    def _values(self, group: FactGroup, fact: Fact, pairs: _Pairs) -> np.ndarray:
        if fact.together or fact.neighbors:
            return self._neighborhood(fact, pairs)
        if fact.similarity:
            if fact.similarity not in self._similarities:
                self._similarities[fact.similarity] = Similarities(self._dataset, fact.similarity)
            return self._similarities[fact.similarity].products(*pairs)
        if fact.age:
            rows = pairs.items if group == "items" else pairs.members
            return pairs.times / DAY - self._numbers(group, fact.age)[rows]
        if fact.distance:
            item_numbers = self._numbers("items", fact.distance)
            mean, _ = self._mean(("members", ""), ("distance", fact.distance), None, pairs)
            return np.abs(item_numbers[pairs.items] - mean)
        kind = ("by", fact.by) if fact.by else ("among", fact.among) if fact.among else (group, "")
        if fact.days_since:
            return self._days_since(kind, fact.days_since, pairs)
        if fact.mean or fact.rate:
            column = ("mean", fact.mean or fact.rate, fact.less)
            mean, count = self._mean(kind, column, fact.days, pairs)
            if fact.shrink:
                mean = self._shrink(kind, fact, mean, count, pairs)
        else:
            mean = self._sum(kind, ("actions", *fact.actions), fact.days, pairs)
            if fact.share:
                totals = self._sum(("members", ""), ("actions", *fact.actions), fact.days, pairs)
                with np.errstate(invalid="ignore"):
                    mean = mean / totals[self._rows(kind, pairs)]
        return self._average(kind, mean, pairs)

    def event_values(self, fact: Fact, events: np.ndarray) -> np.ndarray:
        """See `FactSource`."""
        return self._column(("mean", fact.mean, fact.less))[events]

    def _keyed_events(self, kind: tuple[str, str]) -> _KeyedEvents:
        if kind not in self._keyed:
            self._keyed[kind] = self._key_events(*kind)
        return self._keyed[kind]

    def _key_events(self, kind: str, column: str) -> _KeyedEvents:
        dataset = self._dataset
        member, item, time = (
            dataset.event_member.astype(np.int64),
            dataset.event_item.astype(np.int64),
            dataset.event_time,
        )
        every, num_items = np.arange(len(time)), len(dataset.items)
        if kind == "members":
            return _KeyedEvents(PointInTimeIndex(member, time), every, lambda m, _: (np.arange(len(m)), m))
        if kind == "items":
            return _KeyedEvents(PointInTimeIndex(item, time), every, lambda _, i: (np.arange(len(i)), i))
        if kind == "pairs":
            index = PointInTimeIndex(member * num_items + item, time)
            return _KeyedEvents(index, every, lambda m, i: (np.arange(len(m)), m.astype(np.int64) * num_items + i))
        if kind == "all":
            index = PointInTimeIndex(np.zeros(len(time), np.int64), time)
            return _KeyedEvents(index, every, lambda m, _: (np.arange(len(m)), np.zeros(len(m), np.int64)))
        by = kind == "by"
        ragged = Ragged.read(dataset.items if by else dataset.members, column)
        size = len(ragged.names)
        event, value = ragged.expand(item if by else member)
        index = PointInTimeIndex((member if by else item)[event] * size + value, time[event])

        def query(members: np.ndarray, items: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
            row, code = ragged.expand(items if by else members)
            return row, (members if by else items)[row].astype(np.int64) * size + code

        return _KeyedEvents(index, event, query)

    def _remembered(self, key: tuple[Any, ...], pairs: _Pairs, compute: Callable[[], Any]) -> Any:
        """What was computed for the latest pairs; the facts of a prompt share their windows."""
        latest, results = self._windows
        if latest is None or any(a is not b for a, b in zip(latest, pairs, strict=True)):
            results = {}
            self._windows = (pairs, results)
        if key not in results:
            results[key] = compute()
        return results[key]

    def _query(self, kind: tuple[str, str], pairs: _Pairs) -> tuple[np.ndarray, np.ndarray]:
        """The pair of each key to look up, and the key."""
        look_up = self._keyed_events(kind).query
        return self._remembered(("query", kind), pairs, lambda: look_up(pairs.members, pairs.items))

    def _rows(self, kind: tuple[str, str], pairs: _Pairs) -> np.ndarray:
        return self._query(kind, pairs)[0]

    def _window(self, kind: tuple[str, str], days: float | None, pairs: _Pairs) -> Window:
        def compute() -> Window:
            row, keys = self._query(kind, pairs)
            return self._keyed_events(kind).index.window(keys, pairs.times[row], days)

        return self._remembered(("window", kind, days), pairs, compute)

    def _sum(
        self,
        kind: tuple[str, str],
        column: tuple[Any, ...],
        days: float | None,
        pairs: _Pairs,
    ) -> np.ndarray:
        """float64 [keys]: the sum of an event column over each key's window, of all keys of the questions in order."""
        window = self._window(kind, days, pairs)
        if (kind, column) not in self._totals:
            keyed = self._keyed_events(kind)
            self._totals[kind, column] = keyed.index.totals(self._column(column)[keyed.event])
        return self._totals[kind, column].over(window)

    def _mean(
        self,
        kind: tuple[str, str],
        column: tuple[Any, ...],
        days: float | None,
        pairs: _Pairs,
    ) -> tuple[np.ndarray, np.ndarray]:
        """The mean of an event column over each key's window, and how many values it is of."""
        total = self._sum(kind, ("zero for unknown", *column), days, pairs)
        count = self._sum(kind, ("known", *column), days, pairs)
        with np.errstate(invalid="ignore"):
            return total / count, count

    def _shrink(
        self,
        kind: tuple[str, str],
        fact: Fact,
        mean: np.ndarray,
        count: np.ndarray,
        pairs: _Pairs,
    ) -> np.ndarray:
        """Draws means of `count` values towards the mean of all events, or towards 0."""
        prior = np.zeros(len(pairs.times))
        if not fact.less:
            prior = self._overall_mean(fact, pairs)
        prior = prior[self._rows(kind, pairs)]
        shrunk = (np.where(count > 0, mean, 0) * count + fact.shrink * prior) / (count + fact.shrink)
        return np.where(np.isnan(prior), mean, shrunk)

    def _overall_mean(self, fact: Fact, pairs: _Pairs) -> np.ndarray:
        """float64 [pairs]: the mean or rate of all events before each pair's time."""
        summary = self._dataset.summary
        if summary:
            assert (pairs.times == summary.moment).all(), "an excerpt is read for one moment"
            assert fact.rate, "where a mean is needed, all events are read"
            return np.full(len(pairs.times), summary.rates[fact.rate])
        return self._mean(("all", ""), ("mean", fact.mean or fact.rate, None), None, pairs)[0]

    def _average(self, kind: tuple[str, str], values: np.ndarray, pairs: _Pairs) -> np.ndarray:
        """The mean over the keys of each question."""
        if kind[0] not in ("by", "among"):
            return values
        rows, known = self._rows(kind, pairs), ~np.isnan(values)
        sums = np.bincount(rows, np.where(known, values, 0), len(pairs.times))
        with np.errstate(invalid="ignore"):
            return sums / np.bincount(rows, known, len(pairs.times))

    def _days_since(self, kind: tuple[str, str], actions: tuple[str, ...], pairs: _Pairs) -> np.ndarray:
        keyed_by = (f"{kind[0]} {' '.join(actions)}", kind[1])
        if keyed_by not in self._keyed:
            keyed = self._keyed_events(kind)
            event = keyed.event[self._column(("actions", *actions))[keyed.event] > 0]
            dataset = self._dataset
            _, keys = keyed.query(dataset.event_member[event], dataset.event_item[event])
            self._keyed[keyed_by] = _KeyedEvents(PointInTimeIndex(keys, dataset.event_time[event]), event, keyed.query)
        window = self._window(keyed_by, None, pairs)
        return self._keyed[keyed_by].index.since(window, pairs.times)[1]

    def _neighborhood(self, fact: Fact, pairs: _Pairs) -> np.ndarray:
        key = (fact.together, fact.neighbors)
        if key not in self._neighbors:
            if fact.together:
                events = np.flatnonzero(self._dataset.has_action(fact.together))
                self._neighbors[key] = Neighbors(self._dataset, events, np.ones(len(events)))
            else:
                values = self._column(("mean", fact.neighbors, "items"))
                self._neighbors[key] = Neighbors(self._dataset, np.arange(len(values)), values)
        weights, weighted = self._neighbors[key].sums(*pairs)
        if fact.together:
            return weights
        with np.errstate(invalid="ignore"):
            return weighted / (weights + fact.shrink)

    def _column(self, column: tuple[Any, ...]) -> np.ndarray:
        """float64 or bool [events]: an event column by what it is."""
        if column not in self._columns:
            self._columns[column] = self._make_column(*column)
        return self._columns[column]

    def _make_column(self, kind: str, *rest: Any) -> np.ndarray:
        if kind == "actions":
            return self._dataset.has_action(rest) if rest else np.ones(len(self._dataset.events), bool)
        if kind == "known":
            return ~np.isnan(self._column(rest))
        if kind == "zero for unknown":
            return np.nan_to_num(self._column(rest), nan=0.0)
        if kind == "distance":
            return self._numbers("items", rest[0])[self._dataset.event_item]
        name, less = rest
        values = self._rate_values(name) if isinstance(name, tuple) else floats(self._dataset.event_column(name))
        if less:
            dataset = self._dataset
            events = _Pairs(dataset.event_member, dataset.event_item, dataset.event_time)
            mean, _ = self._mean((less, ""), ("mean", name, None), None, events)
            values = values - mean
        return values

    def _rate_values(self, actions: tuple[str, ...]) -> np.ndarray:
        """float64 [events]: whether an event is of one of the actions, 1 or 0; NaN for those that a rate is not of:
        events of other datasets of a union than those that have the actions."""
        card = self._dataset.card
        alike = {name for action in actions for name in card.side_of(action).events.actions}
        return np.where(self._dataset.has_action(alike), self._column(("actions", *actions)), np.nan)

    def _numbers(self, table: FactGroup, column: str) -> np.ndarray:
        """float64 [rows]: a number of each member or item, or a date in days since 1970."""
        key = (table, column)
        if key not in self._columns:
            values = getattr(self._dataset, table)[column]
            is_date = pa.types.is_temporal(values.type)
            microseconds = values.cast(pa.timestamp("us")).cast(pa.int64()) if is_date else values
            self._columns[key] = floats(microseconds) / (DAY if is_date else 1)
        return self._columns[key]


def floats(column: pa.ChunkedArray) -> np.ndarray:
    """float64 [rows]: the numbers of `column`; NaN for null, and for infinity, which would spoil every running total
    after it."""
    values = column.cast(pa.float64()).to_numpy()
    return np.where(np.isfinite(values), values, np.nan)
