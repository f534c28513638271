"""Requests made from a dataset. Clients import this module, so it needs neither JAX nor a tokenizer."""

from __future__ import annotations

import datetime
import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pyarrow as pa
from google.protobuf.timestamp_pb2 import Timestamp

from brewjax.data.tables.card import Attribute
from brewjax.data.tables.dataset import Dataset
from brewjax.data.tables.statistics import ItemStatistic
from brewjax.data.tasks.examples import RankingExample
from brewjax.data.tasks.task import Task
from brewjax.serve import ranker_pb2 as pb


def request_from_example(dataset: Dataset, task: Task, example: RankingExample, steering_note: str = "") -> pb.Member:
    """A ranking example of a dataset as a request.

    The server renders the request with the text that a `Verbalizer` of the dataset renders for the example. Derived
    attributes of items travel as values, as of the example's cutoff time, because the server has no events of others.

    Args:
      dataset: where the example's rows are.
      task: what is asked about each candidate.
      example: the member, the history, the candidates and the cutoff time.
      steering_note: replaces the task's own steering note, unless it is empty.

    Returns:
      a `Member`, whose items are the candidates in their order, by the ids of the items table.
    """
    card = dataset.card
    history_items = dataset.event_item[example.history]
    (member_attributes,) = _attributes(card.members.attributes, dataset.members, np.array([example.member]))
    event_attributes = _attributes(card.events.attributes, dataset.events, example.history)
    history_item_attributes = _item_attributes(dataset, history_items, "history", example.cutoff_time)
    candidate_attributes = _item_attributes(dataset, example.candidates, "question", example.cutoff_time)
    now = Timestamp()
    now.FromMicroseconds(example.cutoff_time)
    request = pb.Member(task=task.name, now=now, attributes=member_attributes, steering_note=steering_note)
    for row, attributes, item in zip(example.history, event_attributes, history_item_attributes, strict=True):
        event = request.history.add(action=str(dataset.event_action[row]), attributes=attributes, item=item)
        event.time.FromMicroseconds(int(dataset.event_time[row]))
    ids = dataset.items[card.items.id]
    for row, attributes in zip(example.candidates, candidate_attributes, strict=True):
        request.items.add(id=str(ids[int(row)].as_py()), attributes=attributes)
    return request


def _item_attributes(dataset: Dataset, rows: np.ndarray, where: str, cutoff_time: int) -> list[dict[str, pb.Value]]:
    """Attributes of items that prompts show at `where` ("history" or "question"), derived ones as of the cutoff."""
    attributes = dataset.card.items.attributes
    times = np.full(len(rows), cutoff_time)
    derived = {
        attribute.column: ItemStatistic(dataset, attribute.derive).at(rows, times).tolist()
        for attribute in attributes
        if attribute.derive
    }
    return _attributes(
        [attribute for attribute in attributes if where in attribute.where], dataset.items, rows, derived
    )


def _attributes(
    attributes: Sequence[Attribute], table: pa.Table, rows: np.ndarray, derived: Mapping[str, list[float]] | None = None
) -> list[dict[str, pb.Value]]:
    """Known attributes of each of `rows` of a table, by column; `derived` values take the place of the table's."""
    known: list[dict[str, pb.Value]] = [{} for _ in rows]
    for attribute in attributes:
        values = (derived or {}).get(attribute.column)
        if values is None:
            values = table[attribute.column].take(pa.array(rows)).to_pylist()
        for row_values, value in zip(known, values, strict=True):
            if value is not None and not (isinstance(value, float) and math.isnan(value)):
                row_values[attribute.column] = _value(value)
    return known


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
