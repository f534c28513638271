"""From the member of a request to a prompt: the server renders the request's tables as training renders a dataset."""

from __future__ import annotations

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
    """The prompt that the model reads for the member of a request.

    The request becomes a dataset of one member, so that one code renders training examples and requests alike.

    Args:
      bundle: the served model, with the card of its training dataset.
      task: the task that `member.task` names.
      member: the request. Events at or after `member.now` are ignored.

    Raises:
      ValueError: naming the field that is missing, unknown to the card, or of the wrong type; or because the model
        was imported and has no card.
    """
    if bundle.card is None:
        raise ValueError("member: this model was imported and has no dataset's card; send a raw request")
    tables, example = read_member(bundle.card, task, member)
    try:
        note = bundle.tokenizer.clean(member.steering_note)
        return bundle.request_verbalizer(tables).prompt(task, example, bundle.prompts.score_style, note)
    except ValueError as error:
        raise ValueError(f"member: {error}") from None


def read_member(training_card: Card, task: Task, member: pb.Member) -> tuple[Dataset, RankingExample]:
    """The member of a request as a dataset of one member, and its example as of `member.now`; errors as above."""
    card = _without_derived(training_card)
    for index, event in enumerate(member.history):
        if event.action not in card.events.actions:
            known = ", ".join(card.events.actions)
            raise ValueError(f"member.history[{index}].action: no action '{event.action}'; actions: {known}")
        if not event.HasField("time"):
            raise ValueError(f"member.history[{index}].time: missing")
    items = item_attributes(member)
    times = np.array(
        [_microseconds(event.time, f"member.history[{index}].time") for index, event in enumerate(member.history)],
        np.int64,
    )
    order = np.argsort(times, kind="stable")
    actions = [member.history[row].action for row in order]
    events = _table(card.events.attributes, event_attributes(member)).take(order)
    member_table = _table(card.members.attributes, {"member.attributes": member.attributes})
    tables = _join(card, member_table, _table(card.items.attributes, items), events, order, actions, times[order])
    now = _microseconds(member.now, "member.now") if member.HasField("now") else int(time.time() * 1e6)
    history, num_past_events = history_before(tables, task, 0, now)
    candidates = np.arange(len(order), len(items), dtype=np.int32)
    labels = np.full(len(candidates), -1, np.int32)
    return tables, RankingExample(task.name, 0, now, history, num_past_events, candidates, labels)


def read_items(training_card: Card, items: Mapping[str, Attributes]) -> Dataset:
    """The items of a request, whose keys are fields of it, as a dataset without members and events."""
    card, none = _without_derived(training_card), np.zeros(0, np.int64)
    members, events = (_table(attributes, {}) for attributes in (card.members.attributes, card.events.attributes))
    return _join(card, members, _table(card.items.attributes, items), events, none, [], none)


def _join(
    card: Card,
    members: pa.Table,
    items: pa.Table,
    events: pa.Table,
    event_items: np.ndarray,
    actions: list[str],
    times: np.ndarray,
) -> Dataset:
    """A dataset of tables without ids, whose events are all of the first member."""
    return Dataset(
        Path("request"),
        card,
        members.append_column(card.members.id, pa.array(np.arange(len(members)))),
        items.append_column(card.items.id, pa.array(np.arange(len(items)))),
        events.append_column(card.events.member, pa.array(np.zeros(len(events), np.int64)))
        .append_column(card.events.item, pa.array(event_items))
        .append_column(card.events.action, pa.array(actions, pa.string()))
        .append_column(card.events.time, pa.array(times).cast(pa.timestamp("us"))),
    )


def event_attributes(member: pb.Member) -> dict[str, Attributes]:
    """The attributes of each event, by field of the request."""
    return {f"member.history[{index}].attributes": event.attributes for index, event in enumerate(member.history)}


def item_attributes(member: pb.Member) -> dict[str, Attributes]:
    """The attributes of the item of each event, then of each item to score, by field of the request."""
    values = {f"member.history[{index}].item": event.item for index, event in enumerate(member.history)}
    return values | {f"member.items[{index}].attributes": item.attributes for index, item in enumerate(member.items)}


def _without_derived(card: Card) -> Card:
    """The card with no attribute to derive: a request brings the statistics of its items, as of its cutoff time."""
    attributes = tuple(attribute.model_copy(update={"derive": None}) for attribute in card.items.attributes)
    return card.model_copy(update={"items": card.items.model_copy(update={"attributes": attributes})})


# For each kind of attribute: the type of its column, and a conversion from each kind of value that is accepted.
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
    """A table with a column for each attribute, and a row for each of `rows`, whose keys are fields of the request.

    Raises ValueError naming the field of an unknown attribute, or of a value of the wrong kind.
    """
    by_column = {attribute.column: attribute for attribute in attributes}
    columns: dict[str, list[Any]] = {column: [] for column in by_column}
    for field, row in rows.items():
        if unknown := set(row) - set(by_column):
            raise ValueError(f"{field}: no attribute '{min(unknown)}'; attributes: {', '.join(by_column)}")
        for column, attribute in by_column.items():
            columns[column].append(_read(attribute, row[column], field) if column in row else None)
    arrays = {column: pa.array(values, _KINDS[by_column[column].kind][0]) for column, values in columns.items()}
    # A table without columns would have no rows: the null column keeps their number until the ids are appended.
    return pa.table({"_": pa.nulls(len(rows)), **arrays})


def _read(attribute: Attribute, value: pb.Value, field: str) -> Any:
    kind = value.WhichOneof("kind")
    if kind is None:
        return None
    conversions = _KINDS[attribute.kind][1]
    if kind not in conversions:
        accepted = " or ".join(conversions)
        raise ValueError(f"{field}['{attribute.column}']: a {kind}; for a {attribute.kind} give {accepted}")
    if kind == "number" and not math.isfinite(value.number):
        raise ValueError(f"{field}['{attribute.column}']: {value.number}; leave it out where it is unknown")
    if kind == "date":
        return _microseconds(value.date, f"{field}['{attribute.column}']")
    return conversions[kind](getattr(value, kind))


def _microseconds(timestamp: Timestamp, field: str) -> int:
    """Microseconds since 1970."""
    try:
        return timestamp.ToMicroseconds()
    except ValueError as error:  # outside of the years 1 to 9999
        raise ValueError(f"{field}: {error}") from None
