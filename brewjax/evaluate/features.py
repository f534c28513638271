"""Features that an engineer would build by hand for a ranking task, every one as of the example's cut.

They follow from the card's kinds of attributes, and use all events before the cut, not only those a prompt tells.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from brewjax.data.dataset import Attribute, Dataset
from brewjax.data.examples import DAY, Example, _questions
from brewjax.data.task import Task
from brewjax.evaluate.as_of import AsOf
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
class Questions:
    """The questions of some examples, one row each.

    Attributes:
      member, item: int64 [rows], rows of the tables.
      cut: int64 [rows], microseconds since 1970.
      label: int64 [rows].
    """

    member: np.ndarray
    item: np.ndarray
    cut: np.ndarray
    label: np.ndarray

    @classmethod
    def of(cls, examples: Sequence[Example]) -> Questions:
        sizes = [len(example.items) for example in examples]
        spread = lambda name: np.repeat(np.array([getattr(e, name) for e in examples], np.int64), sizes)  # noqa: E731
        joined = lambda name: np.concatenate([[], *(getattr(e, name) for e in examples)]).astype(np.int64)  # noqa: E731
        return cls(spread("member"), joined("items"), spread("cut"), joined("labels"))


def build_features(dataset: Dataset, task: Task, examples: Sequence[Example]) -> Features:
    """One row per question, in the order of the examples.

    Of the member and of the item: how many events of each action, the mean and spread of what events say, when the
    first and the last was. Of the two together: what the member did with items of the same category or list values.
    And the attributes of both, as they are.
    """
    asked = Questions.of(examples)
    columns: dict[str, np.ndarray] = {}
    categorical: list[str] = []
    events = np.flatnonzero(np.isin(dataset.event_action, [*task.history.actions, *task.questions.actions]))
    numbers, answers = _numbers(dataset, events), _answers(dataset, task, events)
    signals = numbers | answers
    for name, keys, asked_keys in (
        ("member", dataset.event_member, asked.member),
        ("item", dataset.event_item, asked.item),
    ):
        columns |= _history(name, dataset, events, keys[events], asked_keys, asked.cut, numbers, answers)
        table, attributes = getattr(dataset, f"{name}s"), getattr(dataset.card, f"{name}s").attributes
        for attribute in attributes:
            for column, values in _attribute(table, attribute, asked_keys, asked.cut).items():
                columns[f"{name} {column}"] = values
                if attribute.kind == "category":
                    categorical.append(f"{name} {column}")
    for attribute in dataset.card.items.attributes:
        if attribute.kind in ("category", "list"):
            columns |= _affinity(dataset, attribute, events, asked, signals)
    values = np.stack(list(columns.values()), axis=1).astype(np.float32)
    return Features(list(columns), values, categorical)


def _numbers(dataset: Dataset, events: np.ndarray) -> dict[str, np.ndarray]:
    """The numbers that events say, each float64 [events], NaN where an event says nothing."""
    attributes = [attribute for attribute in dataset.card.events.attributes if attribute.kind == "number"]
    return {attribute.name: _floats(dataset.events[attribute.column])[events] for attribute in attributes}


def _answers(dataset: Dataset, task: Task, events: np.ndarray) -> dict[str, np.ndarray]:
    """Whether each label but the last was the answer to an event, each float64 [events], NaN where it was not asked."""
    if task.questions.sampled_negatives:  # then every event has the same answer
        return {}
    rows, labels = _questions(dataset, task)
    answers = np.full((len(task.words) - 1, len(dataset.events)), np.nan)
    for index in range(len(answers)):
        answers[index, rows] = labels == index
    return {f"answer {word}": answer[events] for word, answer in zip(task.words, answers, strict=False)}


def _history(
    name: str,
    dataset: Dataset,
    events: np.ndarray,
    keys: np.ndarray,
    asked_keys: np.ndarray,
    cut: np.ndarray,
    numbers: dict[str, np.ndarray],
    answers: dict[str, np.ndarray],
) -> dict[str, np.ndarray]:
    """Statistics of the events of a member, or of an item, before each cut."""
    times = dataset.event_time[events]
    as_of = AsOf(keys, times)
    window = start, end = as_of.window(asked_keys, cut)
    recent_start, _ = as_of.window(asked_keys, cut, RECENT_DAYS)
    columns = {f"{name} events in {RECENT_DAYS} days": (end - recent_start).astype(float)}
    for action in dataset.card.events.actions:
        columns[f"{name} {action}"] = as_of.sum(dataset.event_action[events] == action, window)
    for signal, values in (numbers | answers).items():
        columns[f"{name} mean {signal}"] = as_of.mean(values, window)
    for signal, values in numbers.items():
        variance = as_of.mean(values**2, window) - columns[f"{name} mean {signal}"] ** 2
        columns[f"{name} spread of {signal}"] = np.sqrt(np.maximum(variance, 0))
    if len(events):
        some = end > start
        for which, position in (("first", start), ("last", end - 1)):
            days = (cut - as_of.at(times, np.where(some, position, 0))) / DAY
            columns[f"{name} days since {which} event"] = np.where(some, days, np.nan)
    return columns


def _affinity(
    dataset: Dataset, attribute: Attribute, events: np.ndarray, asked: Questions, signals: dict[str, np.ndarray]
) -> dict[str, np.ndarray]:
    """The member's past with the values of an item's category or list: per value its share of the member's events and
    the mean of every signal, then the mean over the values that the item in question has."""
    of_item, names = _values(dataset.items, attribute)
    event, value = of_item.expand(dataset.event_item[events])
    times = dataset.event_time[events]
    pairs = AsOf(dataset.event_member[events][event].astype(np.int64) * len(names) + value, times[event])
    row, asked_value = of_item.expand(asked.item)
    window = start, end = pairs.window(asked.member[row] * len(names) + asked_value, asked.cut[row])
    members = AsOf(dataset.event_member[events], times)
    member_start, member_end = members.window(asked.member, asked.cut)

    def over_values(pair_values: np.ndarray) -> np.ndarray:
        known = ~np.isnan(pair_values)
        sums = np.bincount(row, np.where(known, pair_values, 0), len(asked.item))
        return ratio(sums, np.bincount(row, known, len(asked.item)))

    share = ratio(end - start, (member_end - member_start)[row])
    columns = {f"share of {attribute.name}": over_values(share)}
    for signal, values in signals.items():
        columns[f"mean {signal} with {attribute.name}"] = over_values(pairs.mean(values[event], window))
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
