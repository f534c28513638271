"""`Scales`: the buckets of numbers and the vocabularies of ids that prompts state, fitted to the training data."""

from __future__ import annotations

from collections.abc import Iterator
from functools import cached_property
from typing import Any

import numpy as np
import pyarrow as pa

from brewjax.config import Config
from brewjax.data.tables.card import Attribute
from brewjax.data.tables.dataset import Dataset
from brewjax.data.tables.reading import TEXT
from brewjax.data.tables.statistics import FactValues, Table

MIN_FIT_EVENTS, MAX_FIT_EVENTS = 10_000, 500_000  # that the scales of facts are fitted on
VOCABULARY = 10_000  # ids of an attribute that have a number of their own, by default
MIN_ID_EVENTS = 10  # of training that an id must have; rarer ones teach the model what it makes of the unknown


class Scales(Config):
    """The buckets of numbers and the vocabularies of ids, as of a time. A key is "table.column" or "group.fact"."""

    until: int
    """Microseconds since 1970; fitted to what was known before."""
    tables: str = ""
    """SHA-256 of the dataset's tables; empty where they were not read from a folder."""
    quantiles: dict[str, list[float]]
    """By key, the values that split the training data into equal shares, ascending: 99 for percentiles, 9 for ten
    buckets; empty without data."""
    vocabularies: dict[str, list[str]] = {}
    """By key, the ids that have numbers of their own, those with the most events first."""

    @classmethod
    def fit(cls, dataset: Dataset, until: int, tables: str = "") -> Scales:
        """Fits the scale of every attribute and fact in buckets on the past, and on the members and items that occur in
        it.

        Counts grow with time, and a model is asked about what comes next: the scales of facts are of the latest quarter
        of the past events, each as of its own time. A dataset's scales are fitted once.

        Args:
          dataset: whose card says what is in buckets.
          until: microseconds since 1970; only events before it count.
          tables: SHA-256 of the dataset's tables, if they are of a folder.

        Returns:
          The scales of all that `keys_of` names.
        """
        fitted = dataset.__dict__.setdefault("_scales", {})
        if until not in fitted:
            quantiles, vocabularies = _fit_quantiles(dataset, until), _fit_vocabularies(dataset, until)
            fitted[until] = cls(until=until, quantiles=quantiles, vocabularies=vocabularies)
        return fitted[until].model_copy(update={"tables": tables})

    @staticmethod
    def keys_of(dataset: Dataset) -> set[str]:
        """The keys of the scales that a dataset's prompts need."""
        attributes = {f"{table}.{a.column}" for table, a in _attributes(dataset) if a.num_buckets or a.kind == "id"}
        return attributes | {f"{group}.{fact.name}" for group, fact in dataset.card.facts.declared() if fact.buckets}

    @property
    def fitted_keys(self) -> set[str]:
        """The keys of the scales that there are."""
        return {*self.quantiles, *self.vocabularies}

    def fits(self, dataset: Dataset) -> bool:
        """Whether `dataset` has the same attributes and, before `until`, the same values; its name does not matter."""
        if self.keys_of(dataset) != self.fitted_keys:
            return False
        refitted = self.fit(dataset, self.until)
        return refitted.vocabularies == self.vocabularies and all(
            len(refitted.quantiles[key]) == len(scale)
            and np.allclose(refitted.quantiles[key], scale, rtol=1e-9, atol=0)
            for key, scale in self.quantiles.items()
        )

    @cached_property
    def _numbers(self) -> dict[str, dict[str, int]]:
        return {key: {id_: n for n, id_ in enumerate(ids, 1)} for key, ids in self.vocabularies.items()}

    @cached_property
    def _edges(self) -> dict[str, np.ndarray]:
        return {key: np.array(values) for key, values in self.quantiles.items()}

    def number(self, key: str, id_: Any) -> int:
        """The number of an id in the vocabulary of `key`: 0 for one that training has hardly seen.
        `id_` is a text or a whole number, which counts as its text."""
        return self._numbers[key].get(str(id_), 0)

    def bucket(self, key: str, value: float) -> int:
        """The bucket that a value of `key` falls in: 1 is the lowest."""
        return int(self.buckets(key, np.array([value]))[0])

    def buckets(self, key: str, values: np.ndarray) -> np.ndarray:
        """int64 [values]: the bucket of the scale `key` that each of `values` falls in, 1 for the lowest; none may be
        NaN."""
        return np.searchsorted(self._edges[key], values, side="left") + 1


def _fit_quantiles(dataset: Dataset, until: int) -> dict[str, list[float]]:
    events = np.flatnonzero(dataset.event_time < until)
    rows_by_table = {
        "members": np.unique(dataset.event_member[events]),
        "items": np.unique(dataset.event_item[events]),
        "events": events,
    }
    quantiles = {}
    for table, attribute in _attributes(dataset):
        if not attribute.num_buckets:
            continue
        column: pa.ChunkedArray = getattr(dataset, table)[attribute.column]
        values = column.take(rows_by_table[table]).cast(pa.float64()).to_numpy()
        quantiles[f"{table}.{attribute.column}"] = _quantiles(values, attribute.num_buckets or 0)
    fact_values, origins = FactValues.of(dataset), list(dataset.card.origins)
    for origin, facts in dataset.card.facts_by_origin.items():
        of_origin = events[dataset.event_origin[events] == origins.index(origin)] if origin else events
        sample = _latest(dataset, of_origin)
        questions = dataset.event_member[sample], dataset.event_item[sample], dataset.event_time[sample]
        for group, fact in facts.declared():
            if fact.buckets:
                if group == "events":
                    known = fact_values.event_values(fact, sample)
                else:
                    known = fact_values.values(group, fact, *questions)
                quantiles[f"{group}.{fact.name}"] = _quantiles(known, fact.buckets)
    return quantiles


def _fit_vocabularies(dataset: Dataset, until: int) -> dict[str, list[str]]:
    events = np.flatnonzero(dataset.event_time < until)
    rows_by_table = {"members": dataset.event_member[events], "items": dataset.event_item[events], "events": events}
    vocabularies = {}
    for table, attribute in _attributes(dataset):
        if attribute.kind == "id":
            ids = getattr(dataset, table)[attribute.column].cast(TEXT).combine_chunks().dictionary_encode()
            known = np.flatnonzero(ids.is_valid())
            events_of_rows = np.bincount(rows_by_table[table], minlength=len(ids))[known]
            counts = np.bincount(ids.indices.drop_null().to_numpy(), events_of_rows, len(ids.dictionary))
            frequent = np.flatnonzero(counts >= MIN_ID_EVENTS)
            names = ids.dictionary.to_numpy(zero_copy_only=False)[frequent].astype(str)
            order = np.lexsort((names, -counts[frequent]))[: attribute.vocabulary or VOCABULARY]
            vocabularies[f"{table}.{attribute.column}"] = names[order].tolist()
    return vocabularies


def _latest(dataset: Dataset, events: np.ndarray) -> np.ndarray:
    """The latest quarter of some events, but at least MIN_FIT_EVENTS of them, evenly thinned to MAX_FIT_EVENTS."""
    times = dataset.event_time[events]
    count = min(len(events), max(len(events) // 4, MIN_FIT_EVENTS))
    if count:
        events = events[times >= np.partition(times, len(times) - count)[len(times) - count]]
    return events[:: -(-len(events) // MAX_FIT_EVENTS) or 1]


def _quantiles(values: np.ndarray, buckets: int) -> list[float]:
    values = values[np.isfinite(values)]
    return np.quantile(values, np.arange(1, buckets) / buckets).tolist() if len(values) else []


def _attributes(dataset: Dataset) -> Iterator[tuple[Table, Attribute]]:
    """Yields (table, attribute) for every attribute of the card."""
    tables: tuple[Table, ...] = ("members", "items", "events")
    for table in tables:
        for attribute in getattr(dataset.card, table).attributes:
            yield table, attribute
