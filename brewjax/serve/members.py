"""A member as requests have it: said in words by the server as in training, and made from a dataset by a client."""

from __future__ import annotations

import datetime
import math
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from google.protobuf.timestamp_pb2 import Timestamp

from brewjax.bundle.bundle import Bundle
from brewjax.data.tables.card import Attribute, Card
from brewjax.data.tables.dataset import Dataset
from brewjax.data.tasks.examples import RankingExample, history_before
from brewjax.data.tasks.task import Task
from brewjax.data.text.prompt import Prompt
from brewjax.serve import ranker_pb2 as pb

Attributes = Mapping[str, pb.Value]


def render_member(bundle: Bundle, task: Task, member: pb.Member) -> Prompt:
    """What the model reads about the member of a request.

    Raises ValueError naming the field that is missing, unknown to the dataset's card, or of the wrong type.
    """
    if bundle.card is None:
        raise ValueError("member: this model was imported and knows no dataset's card; ask raw")
    card = _as_given(bundle.card)
    for place, event in enumerate(member.history):
        if event.action not in card.events.actions:
            known = ", ".join(card.events.actions)
            raise ValueError(f"member.history[{place}].action: no action '{event.action}'; actions: {known}")
        if not event.HasField("time"):
            raise ValueError(f"member.history[{place}].time: missing")
    items = {f"member.history[{place}].item": event.item for place, event in enumerate(member.history)}
    items |= {f"member.items[{place}].attributes": item.attributes for place, item in enumerate(member.items)}
    told = {f"member.history[{place}].attributes": event.attributes for place, event in enumerate(member.history)}
    times = np.array(
        [_microseconds(event.time, f"member.history[{place}].time") for place, event in enumerate(member.history)],
        np.int64,
    )
    order = np.argsort(times, kind="stable")
    events = _table(card.events.attributes, told).take(order)
    count = len(order)
    tables = Dataset(
        Path("request"),
        card,
        _table(card.members.attributes, {"member.attributes": member.attributes}).append_column(
            card.members.id, pa.array([0])
        ),
        _table(card.items.attributes, items).append_column(card.items.id, pa.array(range(len(items)))),
        events.append_column(card.events.member, pa.array(np.zeros(count, np.int64)))
        .append_column(card.events.item, pa.array(order))
        .append_column(card.events.action, pa.array([member.history[row].action for row in order], pa.string()))
        .append_column(card.events.time, pa.array(times[order]).cast(pa.timestamp("us"))),
    )
    now = _microseconds(member.now, "member.now") if member.HasField("now") else int(time.time() * 1e6)
    history, past = history_before(tables, task, 0, now)
    asked = np.arange(count, len(items), dtype=np.int32)
    example = RankingExample(task.name, 0, now, history, past, asked, np.full(len(asked), -1, np.int32))
    try:
        note = bundle.tokenizer.clean(member.steering_note)
        return bundle.request_verbalizer(tables).prompt(task, example, bundle.prompts.score_style, note)
    except ValueError as error:
        raise ValueError(f"member: {error}") from None


def _as_given(card: Card) -> Card:
    """The card with nothing to be derived: statistics of items come with a request, as of its moment."""
    given = [attribute.model_copy(update={"derive": None}) for attribute in card.items.attributes]
    return card.model_copy(update={"items": card.items.model_copy(update={"attributes": tuple(given)})})


# How an attribute of each kind is kept, and read from the kinds of value that it may come as.
_TEXTS: tuple[pa.DataType, dict[str, Callable[[Any], Any]]] = (
    pa.string(),
    {"text": str, "integer": str, "number": str, "truth": str},
)
_KINDS: dict[str, tuple[pa.DataType, dict[str, Callable[[Any], Any]]]] = {
    "text": _TEXTS,
    "category": _TEXTS,
    "number": (pa.float64(), {"integer": float, "number": float}),
    "list": (pa.list_(pa.string()), {"list": lambda texts: list(texts.values)}),
    "date": (pa.timestamp("us"), {"date": Timestamp.ToMicroseconds}),
}


def _table(attributes: Sequence[Attribute], rows: Mapping[str, Attributes]) -> pa.Table:
    """A column for each attribute; `rows` are named by where they stand in the request."""
    by_column = {attribute.column: attribute for attribute in attributes}
    columns: dict[str, list[Any]] = {column: [] for column in by_column}
    for place, row in rows.items():
        if unknown := set(row) - set(by_column):
            raise ValueError(f"{place}: no attribute '{min(unknown)}'; attributes: {', '.join(by_column)}")
        for column, attribute in by_column.items():
            columns[column].append(_read(attribute, row[column], place) if column in row else None)
    arrays = {column: pa.array(values, _KINDS[by_column[column].kind][0]) for column, values in columns.items()}
    # A table without columns would have no rows; the ids are put beside this one.
    return pa.table({"_": pa.nulls(len(rows)), **arrays})


def _read(attribute: Attribute, value: pb.Value, place: str) -> Any:
    kind = value.WhichOneof("kind")
    if kind is None:
        return None
    reads = _KINDS[attribute.kind][1]
    if kind not in reads:
        raise ValueError(f"{place}['{attribute.column}']: a {kind}; for a {attribute.kind} give {' or '.join(reads)}")
    if kind == "number" and not math.isfinite(value.number):
        raise ValueError(f"{place}['{attribute.column}']: {value.number}; leave it out where it is unknown")
    if kind == "date":
        return _microseconds(value.date, f"{place}['{attribute.column}']")
    return reads[kind](getattr(value, kind))


def _microseconds(moment: Timestamp, place: str) -> int:
    try:
        return moment.ToMicroseconds()
    except ValueError as error:  # not of the years 1 to 9999
        raise ValueError(f"{place}: {error}") from None


def _attributes(
    attributes: Sequence[Attribute], table: pa.Table, rows: np.ndarray, derived: Mapping[str, list[float]] | None = None
) -> list[dict[str, pb.Value]]:
    """Of each row, what is known."""
    said: list[dict[str, pb.Value]] = [{} for _ in rows]
    for attribute in attributes:
        values = (derived or {}).get(attribute.column)
        if values is None:
            values = table[attribute.column].take(pa.array(rows)).to_pylist()
        for row, value in zip(said, values, strict=True):
            if value is not None and not (isinstance(value, float) and math.isnan(value)):
                row[attribute.column] = _value(value)
    return said


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
        moment = Timestamp()
        moment.FromDatetime(value if isinstance(value, datetime.datetime) else midnight)
        return pb.Value(date=moment)
    return pb.Value(list=pb.Texts(values=[str(entry) for entry in value]))
