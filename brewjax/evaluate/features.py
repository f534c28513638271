"""Features that an engineer would build by hand for a ranking task, each as of the example's cutoff time.

They are derived from the kinds of attributes on the card. They use all events before the cutoff time, not only those of
a prompt's history.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import numpy as np
import pyarrow as pa

from brewjax.data.tables.card import Attribute
from brewjax.data.tables.dataset import Dataset
from brewjax.data.tables.point_in_time import DAY, PointInTimeIndex
from brewjax.data.tables.ragged import Ragged
from brewjax.data.tables.statistics import FactValues, floats
from brewjax.data.tasks.examples import RankingExample
from brewjax.data.tasks.questions import match_labels
from brewjax.data.tasks.task import Task
from brewjax.evaluate.metrics import ratio

MAX_CATEGORIES = 255  # the most frequent values of a category; rarer ones count as missing
MAX_LIST_VALUES = 30  # the most frequent values of a list, which have a column each
RECENT_DAYS = 30  # window of the count of recent events


@dataclasses.dataclass(frozen=True)
class Features:
    """The feature matrix of some questions.

    Attributes:
      names: of the columns.
      values: float32 [questions, features], NaN where unknown.
      categorical: the names of the columns that hold category codes.
    """

    names: list[str]
    values: np.ndarray
    categorical: list[str]


@dataclasses.dataclass(frozen=True)
class CandidateRows:
    """The candidates of some examples, one row each.

    Attributes:
      member: int64 [rows], rows of the members table.
      item: int64 [rows], rows of the items table.
      cutoff_time: int64 [rows], microseconds since 1970.
      label: int64 [rows], index of the label.
    """

    member: np.ndarray
    item: np.ndarray
    cutoff_time: np.ndarray
    label: np.ndarray

    @classmethod
    def from_examples(cls, examples: Sequence[RankingExample]) -> CandidateRows:
        """The candidates of all examples, in order."""
        sizes = [len(example.candidates) for example in examples]
        repeat = lambda name: np.repeat(np.array([getattr(e, name) for e in examples], np.int64), sizes)  # noqa: E731
        concat = lambda name: np.concatenate([[], *(getattr(e, name) for e in examples)]).astype(np.int64)  # noqa: E731
        return cls(repeat("member"), concat("candidates"), repeat("cutoff_time"), concat("labels"))


@dataclasses.dataclass(frozen=True)
class EventLog:
    """The events that features are computed from: those of the task's history and question actions.

    Attributes:
      member: int64 [events], rows of the members table.
      item: int64 [events], rows of the items table.
      time: int64 [events], microseconds since 1970.
      actions: by action, bool [events], whether an event is of it.
      signals: numbers of the events by name, each float64 [events], NaN where an event has none.
    """

    member: np.ndarray
    item: np.ndarray
    time: np.ndarray
    actions: dict[str, np.ndarray]
    signals: dict[str, np.ndarray]

    @classmethod
    def from_dataset(cls, dataset: Dataset, task: Task) -> EventLog:
        """The events of a task, with three kinds of signals.

        The signals are the number attributes of events; for each label except the last, whether it was the answer; and
        the excess of both over the item's average until then, so that a member who saw good items does not look
        generous.
        """
        names = sorted({*task.history.actions, *task.questions.actions, *task.questions.outcomes})
        events = np.flatnonzero(dataset.has_action(names))
        item, time = dataset.event_item[events].astype(np.int64), dataset.event_time[events]
        numbers = [attribute for attribute in dataset.card.events.attributes if attribute.kind == "number"]
        signals = {attribute.name: floats(dataset.events[attribute.column])[events] for attribute in numbers}
        if not task.questions.sampled_negatives:  # with them, every event has the same answer
            # An event's own label: the answer to a question may be known only later.
            labels = match_labels(dataset, task, events)
            for index, word in enumerate(task.words[:-1]):
                signals[f"answer {word}"] = np.where(labels >= 0, labels == index, np.nan)
        item_events = PointInTimeIndex(item, time)
        earlier = item_events.window(item, time)
        excess = {
            f"{name} above average": values - item_events.mean(values, earlier) for name, values in signals.items()
        }
        member = dataset.event_member[events].astype(np.int64)
        actions = {name: dataset.has_action([name])[events] for name in names}
        return cls(member, item, time, actions, signals | excess)


def build_features(dataset: Dataset, task: Task, examples: Sequence[RankingExample]) -> Features:
    """The features of every candidate, in the order of the examples.

    Of the member and of the item: the number of events of each action, the mean and spread of every signal, the days
    since the first and the last event, and the attributes. Of both together: the member's events with items that share
    a category or list value with this one, the events of members of the same category with this item, and the facts of
    the card: all that a prompt states.
    """
    candidates, log = CandidateRows.from_examples(examples), EventLog.from_dataset(dataset, task)
    card = task.side_of(dataset.card)
    columns: dict[str, np.ndarray] = {}
    categorical: list[str] = []
    for side, table, attributes, event_keys, keys in (
        ("member", dataset.members, card.members.attributes, log.member, candidates.member),
        ("item", dataset.items, card.items.attributes, log.item, candidates.item),
    ):
        for column, values in _history(log, event_keys, keys, candidates.cutoff_time).items():
            columns[f"{side} {column}"] = values
        for attribute in attributes:
            for column, values in _attribute(table, attribute, keys, candidates.cutoff_time).items():
                columns[f"{side} {column}"] = values
                if attribute.kind == "category":
                    categorical.append(f"{side} {column}")
    for attribute in card.items.attributes:
        if attribute.kind in ("category", "list"):
            columns |= _affinity(log, candidates, dataset.items, attribute)
    for attribute in card.members.attributes:
        if attribute.kind == "category":
            columns |= _cohort_features(log, candidates, dataset.members, attribute)
    facts = FactValues.of(dataset)
    for group, fact in card.facts.declared():
        if group != "events":
            columns[f"{group}: {fact.name}"] = facts.values(
                group, fact, candidates.member, candidates.item, candidates.cutoff_time
            )
    return Features(list(columns), np.stack(list(columns.values()), axis=1).astype(np.float32), categorical)


def _history(log: EventLog, event_keys: np.ndarray, keys: np.ndarray, cutoff_time: np.ndarray) -> dict[str, np.ndarray]:
    """Statistics of the events of a member, or of an item, before each cutoff time.

    Args:
      event_keys: int64 [events], the member or item of each event.
      keys: int64 [rows], the member or item of each candidate.
      cutoff_time: int64 [rows].
    """
    index = PointInTimeIndex(event_keys, log.time)
    window = index.window(keys, cutoff_time)
    recent_start, recent_end = index.window(keys, cutoff_time, RECENT_DAYS)
    columns = {f"events in {RECENT_DAYS} days": recent_end - recent_start}
    for action, matches in log.actions.items():
        columns[f"{action} events"] = index.sum(matches, window)
    for name, values in log.signals.items():
        mean = columns[f"mean {name}"] = index.mean(values, window)
        columns[f"spread of {name}"] = np.sqrt(np.maximum(index.mean(values**2, window) - mean**2, 0))
    for end, days in zip(("first", "last"), index.since(window, cutoff_time), strict=True):
        columns[f"days since {end} event"] = days
    return columns


def _affinity(log: EventLog, candidates: CandidateRows, items: pa.Table, attribute: Attribute) -> dict[str, np.ndarray]:
    """The member's affinity to the values of an item's category or list.

    For each value of the candidate: its share of the member's events, and the mean of every signal over these; each is
    averaged over the candidate's values.
    """
    item_values = Ragged.read(items, attribute.column)
    names = item_values.names
    event, value = item_values.expand(log.item)
    pairs = PointInTimeIndex(log.member[event] * len(names) + value, log.time[event])
    row, row_value = item_values.expand(candidates.item)
    window = start, end = pairs.window(candidates.member[row] * len(names) + row_value, candidates.cutoff_time[row])
    member_events = PointInTimeIndex(log.member, log.time)
    member_start, member_end = member_events.window(candidates.member, candidates.cutoff_time)

    def average_over_values(pair_values: np.ndarray) -> np.ndarray:
        known = ~np.isnan(pair_values)
        sums = np.bincount(row, np.where(known, pair_values, 0), len(candidates.item))
        return ratio(sums, np.bincount(row, known, len(candidates.item)))

    share = ratio(end - start, (member_end - member_start)[row])
    columns = {f"member's share of {attribute.name}": average_over_values(share)}
    for name, values in log.signals.items():
        columns[f"member's mean {name} by {attribute.name}"] = average_over_values(pairs.mean(values[event], window))
    return columns


def _cohort_features(
    log: EventLog, candidates: CandidateRows, members: pa.Table, attribute: Attribute
) -> dict[str, np.ndarray]:
    """The item among the members of the same category: its share of their events, and the mean of every signal over
    their events with it."""
    member_values = Ragged.read(members, attribute.column)
    names = member_values.names
    event, value = member_values.expand(log.member)
    pairs = PointInTimeIndex(log.item[event] * len(names) + value, log.time[event])
    row, row_value = member_values.expand(candidates.member)
    window = start, end = pairs.window(candidates.item[row] * len(names) + row_value, candidates.cutoff_time[row])
    cohort_events = PointInTimeIndex(value, log.time[event])
    cohort_start, cohort_end = cohort_events.window(row_value, candidates.cutoff_time[row])

    def scatter(row_values: np.ndarray) -> np.ndarray:
        column = np.full(len(candidates.item), np.nan)
        column[row] = row_values
        return column

    columns = {f"item's share among the same {attribute.name}": scatter(ratio(end - start, cohort_end - cohort_start))}
    for name, values in log.signals.items():
        columns[f"item's mean {name} among the same {attribute.name}"] = scatter(pairs.mean(values[event], window))
    return columns


def _attribute(
    table: pa.Table, attribute: Attribute, rows: np.ndarray, cutoff_time: np.ndarray
) -> dict[str, np.ndarray]:
    """The attribute of each row as columns of numbers; none for text, nor for ids, of which trees make less than of the
    item's own means and counts."""
    if attribute.kind in ("text", "id"):
        return {}
    if attribute.kind == "number":
        return {attribute.name: floats(table[attribute.column])[rows]}
    if attribute.kind == "date":
        times = floats(table[attribute.column].cast(pa.timestamp("us")).cast(pa.int64()))
        return {f"days since {attribute.name}": (cutoff_time - times[rows]) / DAY}
    row_values = Ragged.read(table, attribute.column)
    names = row_values.names
    row, value = row_values.expand(rows)
    if attribute.kind == "category":
        codes = np.full(len(rows), np.nan)
        codes[row] = np.where(value < MAX_CATEGORIES, value, np.nan)
        return {attribute.name: codes}
    indicators = np.zeros((len(rows), min(len(names), MAX_LIST_VALUES)))
    frequent = value < MAX_LIST_VALUES
    indicators[row[frequent], value[frequent]] = 1
    return {f"{attribute.name}: {name}": indicators[:, index] for index, name in enumerate(names[:MAX_LIST_VALUES])}
