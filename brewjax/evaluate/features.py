"""Features that an engineer would build by hand for a ranking task, every one as of the example's cut.

They follow from the card's kinds of attributes, and use all events before the cut, not only those a prompt tells.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from brewjax.data.tables.card import Attribute
from brewjax.data.tables.dataset import Dataset
from brewjax.data.tables.point_in_time import DAY, PointInTimeIndex
from brewjax.data.tasks.examples import RankingExample, labelled_events
from brewjax.data.tasks.task import Task
from brewjax.evaluate.metrics import ratio

MAX_CATEGORIES = 255  # values of a category, the most frequent; others count as missing
MAX_LIST_VALUES = 30  # values of a list, the most frequent, with a column each
RECENT_DAYS = 30


@dataclasses.dataclass(frozen=True)
class Features:
    """float32 [questions, features], NaN where unknown; `categorical` names the columns that hold codes."""

    names: list[str]
    values: np.ndarray
    categorical: list[str]


@dataclasses.dataclass(frozen=True)
class CandidateRows:
    """The questions of some examples, one row each.

    Attributes:
      member, item: int64 [rows], rows of the tables.
      cut: int64 [rows], microseconds since 1970.
      label: int64 [rows].
    """

    member: np.ndarray
    item: np.ndarray
    cutoff_time: np.ndarray
    label: np.ndarray

    @classmethod
    def of(cls, examples: Sequence[RankingExample]) -> CandidateRows:
        sizes = [len(example.candidates) for example in examples]
        spread = lambda name: np.repeat(np.array([getattr(e, name) for e in examples], np.int64), sizes)  # noqa: E731
        joined = lambda name: np.concatenate([[], *(getattr(e, name) for e in examples)]).astype(np.int64)  # noqa: E731
        return cls(spread("member"), joined("candidates"), spread("cutoff_time"), joined("labels"))


@dataclasses.dataclass(frozen=True)
class EventLog:
    """The events that features are computed from: all of the task's history and question actions.

    Attributes:
      member, item: int64 [events], rows of the tables.
      time: int64 [events], microseconds since 1970.
      actions: for each action, bool [events], whether an event is one.
      signals: what events say, by name, each float64 [events] and NaN where an event says nothing.
    """

    member: np.ndarray
    item: np.ndarray
    time: np.ndarray
    actions: dict[str, np.ndarray]
    signals: dict[str, np.ndarray]

    @classmethod
    def of(cls, dataset: Dataset, task: Task) -> EventLog:
        """With three kinds of signals: the numbers that events say; whether each label but the last was the answer;
        and by how much those are above what the item had on average until then, so that a member who was shown good
        items does not look generous."""
        names = sorted({*task.history.actions, *task.questions.actions})
        events = np.flatnonzero(np.isin(dataset.event_action, names))
        item, time = dataset.event_item[events].astype(np.int64), dataset.event_time[events]
        numbers = [attribute for attribute in dataset.card.events.attributes if attribute.kind == "number"]
        signals = {attribute.name: _floats(dataset.events[attribute.column])[events] for attribute in numbers}
        if not task.questions.sampled_negatives:  # else every event has the same answer
            rows, labels = labelled_events(dataset, task)
            for index, word in enumerate(task.words[:-1]):
                answer = np.full(len(dataset.events), np.nan)
                answer[rows] = labels == index
                signals[f"answer {word}"] = answer[events]
        as_of = PointInTimeIndex(item, time)
        until_then = as_of.window(item, time)
        above = {f"{name} above average": values - as_of.mean(values, until_then) for name, values in signals.items()}
        member = dataset.event_member[events].astype(np.int64)
        actions = {name: dataset.event_action[events] == name for name in names}
        return cls(member, item, time, actions, signals | above)


def build_features(dataset: Dataset, task: Task, examples: Sequence[RankingExample]) -> Features:
    """One row per question, in the order of the examples.

    Of the member and of the item: how many events of each action, the mean and spread of every signal, when the first
    and the last event was, and the attributes as they are. Of the two together: what the member did with items that
    share a category or list value with this one, and what members of the same category did with this item.
    """
    asked, past = CandidateRows.of(examples), EventLog.of(dataset, task)
    columns: dict[str, np.ndarray] = {}
    categorical: list[str] = []
    for side, table, attributes, past_keys, keys in (
        ("member", dataset.members, dataset.card.members.attributes, past.member, asked.member),
        ("item", dataset.items, dataset.card.items.attributes, past.item, asked.item),
    ):
        for column, values in _history(past, past_keys, keys, asked.cutoff_time).items():
            columns[f"{side} {column}"] = values
        for attribute in attributes:
            for column, values in _attribute(table, attribute, keys, asked.cutoff_time).items():
                columns[f"{side} {column}"] = values
                if attribute.kind == "category":
                    categorical.append(f"{side} {column}")
    for attribute in dataset.card.items.attributes:
        if attribute.kind in ("category", "list"):
            columns |= _affinity(past, asked, dataset.items, attribute)
    for attribute in dataset.card.members.attributes:
        if attribute.kind == "category":
            columns |= _cohort_features(past, asked, dataset.members, attribute)
    return Features(list(columns), np.stack(list(columns.values()), axis=1).astype(np.float32), categorical)


def _history(past: EventLog, past_keys: np.ndarray, keys: np.ndarray, cut: np.ndarray) -> dict[str, np.ndarray]:
    """Statistics of the events of a member, or of an item, before each cut."""
    as_of = PointInTimeIndex(past_keys, past.time)
    window = as_of.window(keys, cut)
    recent_start, recent_end = as_of.window(keys, cut, RECENT_DAYS)
    columns = {f"events in {RECENT_DAYS} days": recent_end - recent_start}
    for action, matches in past.actions.items():
        columns[f"{action} events"] = as_of.sum(matches, window)
    for name, values in past.signals.items():
        mean = columns[f"mean {name}"] = as_of.mean(values, window)
        columns[f"spread of {name}"] = np.sqrt(np.maximum(as_of.mean(values**2, window) - mean**2, 0))
    for which, days in zip(("first", "last"), as_of.since(window, cut), strict=True):
        columns[f"days since {which} event"] = days
    return columns


def _affinity(past: EventLog, asked: CandidateRows, items: pa.Table, attribute: Attribute) -> dict[str, np.ndarray]:
    """The member's past with the values of an item's category or list: for each value its share of the member's events
    and the mean of every signal, then the mean over the values that the item in question has."""
    of_item, names = _values(items, attribute)
    event, value = of_item.expand(past.item)
    pairs = PointInTimeIndex(past.member[event] * len(names) + value, past.time[event])
    row, asked_value = of_item.expand(asked.item)
    window = start, end = pairs.window(asked.member[row] * len(names) + asked_value, asked.cutoff_time[row])
    member_start, member_end = PointInTimeIndex(past.member, past.time).window(asked.member, asked.cutoff_time)

    def over_values(pair_values: np.ndarray) -> np.ndarray:
        known = ~np.isnan(pair_values)
        sums = np.bincount(row, np.where(known, pair_values, 0), len(asked.item))
        return ratio(sums, np.bincount(row, known, len(asked.item)))

    share = ratio(end - start, (member_end - member_start)[row])
    columns = {f"member's share of {attribute.name}": over_values(share)}
    for name, values in past.signals.items():
        columns[f"member's mean {name} by {attribute.name}"] = over_values(pairs.mean(values[event], window))
    return columns


def _cohort_features(
    past: EventLog, asked: CandidateRows, members: pa.Table, attribute: Attribute
) -> dict[str, np.ndarray]:
    """The item's past with the members that share the member's category: its share of their events, and the mean of
    every signal."""
    of_member, names = _values(members, attribute)
    event, value = of_member.expand(past.member)
    pairs = PointInTimeIndex(past.item[event] * len(names) + value, past.time[event])
    row, asked_value = of_member.expand(asked.member)
    window = start, end = pairs.window(asked.item[row] * len(names) + asked_value, asked.cutoff_time[row])
    alike_start, alike_end = PointInTimeIndex(value, past.time[event]).window(asked_value, asked.cutoff_time[row])

    def spread_out(row_values: np.ndarray) -> np.ndarray:
        column = np.full(len(asked.item), np.nan)
        column[row] = row_values
        return column

    columns = {f"item's share among the same {attribute.name}": spread_out(ratio(end - start, alike_end - alike_start))}
    for name, values in past.signals.items():
        columns[f"item's mean {name} among the same {attribute.name}"] = spread_out(pairs.mean(values[event], window))
    return columns


def _attribute(table: pa.Table, attribute: Attribute, rows: np.ndarray, cut: np.ndarray) -> dict[str, np.ndarray]:
    """The attribute of each row as columns of numbers; nothing for text, nor for what is derived from the events."""
    if attribute.derive or attribute.kind == "text":
        return {}
    if attribute.kind == "number":
        return {attribute.name: _floats(table[attribute.column])[rows]}
    if attribute.kind == "date":
        moments = _floats(table[attribute.column].cast(pa.timestamp("us")).cast(pa.int64()))
        return {f"days since {attribute.name}": (cut - moments[rows]) / DAY}
    of_row, names = _values(table, attribute)
    row, value = of_row.expand(rows)
    if attribute.kind == "category":
        codes = np.full(len(rows), np.nan)
        codes[row] = np.where(value < MAX_CATEGORIES, value, np.nan)
        return {attribute.name: codes}
    has = np.zeros((len(rows), min(len(names), MAX_LIST_VALUES)))
    frequent = value < MAX_LIST_VALUES
    has[row[frequent], value[frequent]] = 1
    return {f"{attribute.name}: {name}": has[:, index] for index, name in enumerate(names[:MAX_LIST_VALUES])}


@dataclasses.dataclass(frozen=True)
class Ragged:
    """The values of each row of a table: row r has codes[offsets[r] : offsets[r + 1]]."""

    offsets: np.ndarray
    codes: np.ndarray

    def expand(self, rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """One entry per value of each row asked for: the index into `rows`, and the value's code."""
        sizes = self.offsets[rows + 1] - self.offsets[rows]
        index = np.repeat(np.arange(len(rows)), sizes)
        within = np.arange(len(index)) - np.repeat(np.cumsum(sizes) - sizes, sizes)
        return index, self.codes[self.offsets[rows][index] + within]


def _values(table: pa.Table, attribute: Attribute) -> tuple[Ragged, list[str]]:
    """A category's or list's values as codes, the most frequent first, and what they stand for."""
    column = table[attribute.column].combine_chunks()
    if attribute.kind == "list":
        parents, flat = pc.list_parent_indices(column), pc.list_flatten(column)
    else:
        parents, flat = pa.array(np.arange(len(column))), column
    known = pc.is_valid(flat)
    parents, flat = parents.filter(known).to_numpy(), flat.filter(known).cast(pa.string()).to_numpy(False)
    names, codes, counts = np.unique(flat.astype(str), return_inverse=True, return_counts=True)
    by_frequency = np.argsort(-counts, kind="stable")
    rank = np.empty(len(names), np.int64)
    rank[by_frequency] = np.arange(len(names))
    return Ragged(np.searchsorted(parents, np.arange(len(column) + 1)), rank[codes]), names[by_frequency].tolist()


def _floats(column: pa.ChunkedArray) -> np.ndarray:
    """float64; NaN for null and for what is not finite, which would spoil every running total after it."""
    values = column.cast(pa.float64()).to_numpy()
    return np.where(np.isfinite(values), values, np.nan)
