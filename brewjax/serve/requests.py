"""Requests made from a dataset. Clients import this module, so it needs neither JAX nor a tokenizer."""

from __future__ import annotations

import datetime
import math
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
from google.protobuf.timestamp_pb2 import Timestamp

from brewjax.data.tables.card import Attribute
from brewjax.data.tables.dataset import Dataset
from brewjax.data.tables.statistics import FactValues
from brewjax.data.tasks.examples import RankingExample
from brewjax.data.tasks.task import Task
from brewjax.serve import ranker_pb2 as pb


def request_from_example(
    dataset: Dataset, task: Task, example: RankingExample, steering_note: str = "", surface: str = ""
) -> pb.Member:
    """A ranking example of a dataset as a request.

    The server renders the request with the text that a `Verbalizer` of the dataset renders for the example. Facts
    travel as values, as of the example's cutoff time, because the server has no events of others.

    Args:
      dataset: where the example's rows are.
      task: what is asked about each candidate.
      example: the member, the history, the candidates and the cutoff time.
      steering_note: replaces the task's own steering note, unless it is empty.
      surface: of the served model, by name; needed where it has several.

    Returns:
      a `Member`, whose items are the candidates in their order, by the ids of the items table.
    """
    card, facts = dataset.card, FactValues.of(dataset)
    side = task.side_of(card)
    count = len(example.candidates)
    cutoff = np.full(count, example.cutoff_time)
    candidates = _StatedRows(dataset.items, side.items.attributes, example.candidates, "question")
    candidate_attributes = candidates.attributes()
    members = np.full(count, example.member)
    for group in ("items", "pairs"):
        for fact in getattr(side.facts, group):
            _add(candidate_attributes, fact.name, facts.values(group, fact, members, example.candidates, cutoff))
    profile = _StatedRows(dataset.members, card.members.attributes, np.array([example.member]), "question").attributes()
    for fact in card.facts.members:
        _add(profile, fact.name, facts.values("members", fact, members[:1], example.candidates[:1], cutoff[:1]))
    events = _StatedRows(dataset.events, card.events.attributes, example.history, "question").attributes()
    for fact in card.facts.events:
        _add(events, fact.name, facts.event_values(fact, example.history))
    history_items = dataset.event_item[example.history]
    items = _StatedRows(dataset.items, card.items.attributes, history_items, "history").attributes()
    now = Timestamp()
    now.FromMicroseconds(example.cutoff_time)
    request = pb.Member(task=task.name, now=now, attributes=profile[0], steering_note=steering_note, surface=surface)
    for row, attributes, item in zip(example.history, events, items, strict=True):
        event = request.history.add(action=dataset.action_name(row), attributes=attributes, item=item)
        event.time.FromMicroseconds(int(dataset.event_time[row]))
    ids = dataset.items[card.items.id]
    context = [a for a in card.events.attributes if a.column in task.questions.context]
    for row, attributes, exposure in zip(example.candidates, candidate_attributes, example.exposures, strict=True):
        item = request.items.add(id=str(ids[int(row)].as_py()), attributes=attributes)
        if context and exposure >= 0:
            (values,) = _StatedRows(dataset.events, context, np.array([exposure]), "question").attributes()
            for column, value in values.items():
                item.context[column].CopyFrom(value)
    return request


def request_from_catalogue(
    dataset: Dataset, task: Task, example: RankingExample, steering_note: str = "", surface: str = ""
) -> pb.Member:
    """The member of a ranking example as a request to a server that has the dataset as its catalogue.

    Args:
      dataset: where the example's rows are.
      task: what is asked about each item.
      example: the member, and the cutoff time.
      steering_note: as of `request_from_example`.
      surface: as of `request_from_example`.

    Returns:
      A `Member` by id, without items.
    """
    now = Timestamp()
    now.FromMicroseconds(example.cutoff_time)
    name = dataset.member_id(example.member)
    return pb.Member(task=task.name, now=now, id=name, steering_note=steering_note, surface=surface)


class _StatedRows(NamedTuple):
    """Rows of a table with the attributes that prompts show at `where`, "history" or "question"."""

    table: pa.Table
    columns: Sequence[Attribute]
    rows: np.ndarray
    where: str

    def attributes(self) -> list[dict[str, pb.Value]]:
        """The known attributes of each row, by column."""
        known: list[dict[str, pb.Value]] = [{} for _ in self.rows]
        for attribute in self.columns:
            if self.where in attribute.where:
                _add(known, attribute.column, self.table[attribute.column].take(pa.array(self.rows)).to_pylist())
        return known


def _add(known: list[dict[str, pb.Value]], name: str, values: Iterable[Any]) -> None:
    """Adds a value to each of `known`, unless it is unknown."""
    for row_values, value in zip(known, values, strict=True):
        value = float(value) if isinstance(value, np.floating) else value
        if value is not None and not (isinstance(value, float) and math.isnan(value)):
            row_values[name] = _value(value)


def _value(value: Any) -> pb.Value:
    if isinstance(value, bool):
        return pb.Value(truth=value)
    if isinstance(value, int):
        return pb.Value(integer=value)
    if isinstance(value, float):
        return pb.Value(number=value)
    if isinstance(value, str):
        return pb.Value(text=value)
    if isinstance(value, datetime.date):
        midnight = datetime.datetime.combine(value, datetime.time(), datetime.UTC)
        date = Timestamp()
        date.FromDatetime(value if isinstance(value, datetime.datetime) else midnight)
        return pb.Value(date=date)
    return pb.Value(list=pb.Texts(values=[str(entry) for entry in value]))
