"""From the member of a request to a prompt: the server renders the request's tables as training renders a dataset."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

import numpy as np
import pyarrow as pa
from google.protobuf.timestamp_pb2 import Timestamp

from brewjax.bundle.bundle import Bundle
from brewjax.bundle.surface import Surface
from brewjax.data.tables.card import Attribute, Card
from brewjax.data.tables.dataset import Dataset
from brewjax.data.tables.facts import Fact, FactGroup
from brewjax.data.tables.reading import TEXT
from brewjax.data.tables.statistics import FactSource, floats
from brewjax.data.tables.union_tables import ORIGIN
from brewjax.data.tasks.examples import RankingExample, history_before
from brewjax.data.tasks.task import Task
from brewjax.data.text.prompt import Prompt
from brewjax.serve import ranker_pb2 as pb

if TYPE_CHECKING:
    from brewjax.serve.catalogue import Catalogue

Attributes = Mapping[str, pb.Value]
ROW = "row: id"  # the ids of a request's tables; no attribute has a name of this form


class MemberTables(NamedTuple):
    """Where the member of a request is: tables, the example to render, and where its facts come from."""

    dataset: Dataset
    example: RankingExample
    facts: FactSource


def find_surface(bundle: Bundle, member: pb.Member) -> Surface:
    """The surface that a request names, or the only one.

    Raises:
      ValueError: there is none of this name; or the model has several, or none, as it was imported.
    """
    try:
        return bundle.surface(member.surface)
    except ValueError as error:
        raise ValueError(f"member.surface: {error}") from None


def render_member(bundle: Bundle, task: Task, member: pb.Member, catalogue: Catalogue | None = None) -> Prompt:
    """The prompt that the model reads for the member of a request.

    Args:
      bundle: the served model, with the cards of its training datasets.
      task: the task that `member.task` names.
      member: the request. Events at or after `member.now` are ignored.
      catalogue: of the surface; knows the members that requests name by `id`.

    Raises:
      ValueError: naming the field that is missing, unknown to the card or the catalogue, or of the wrong type; or
        because the model was imported and has no card.
    """
    surface = find_surface(bundle, member)
    dataset, example, facts = read_member(surface.card, task, member, catalogue)
    try:
        note = bundle.tokenizer.clean(member.steering_note)
        verbalizer = bundle.request_verbalizer(surface, dataset, facts)
        return verbalizer.prompt(task, example, bundle.prompts.score_style, note)
    except ValueError as error:
        raise ValueError(f"member: {error}") from None


def read_member(card: Card, task: Task, member: pb.Member, catalogue: Catalogue | None = None) -> MemberTables:
    """The member of a request as of `member.now`.

    A member that is sent in full becomes a dataset of one member, so that one code renders training examples, requests
    and members of the catalogue alike.

    Args:
      card: of the member's surface.
      task: what is asked.
      member: of the request, in full or by id.
      catalogue: of the surface, for members by id; None where the server has none.

    Returns:
      The tables that the member is in, and the example that is asked.

    Raises:
      ValueError: names the field that is wrong.
    """
    if member.id:
        if catalogue is None:
            raise ValueError("member.id: no catalogue of this surface (set `catalogue`); send attributes and history")
        return MemberTables(catalogue.dataset, catalogue.example(task, member), catalogue.facts)
    for index, event in enumerate(member.history):
        if event.action not in card.events.actions:
            known = ", ".join(card.events.actions)
            raise ValueError(f"member.history[{index}].action: no action '{event.action}'; actions: {known}")
        if not event.HasField("time"):
            raise ValueError(f"member.history[{index}].time: missing")
    items = item_attributes(member)
    actions = [event.action for event in member.history]
    origins = [card.origin_of(action) for action in [*actions, *([task.questions.actions[0]] * len(member.items))]]
    _check_attributes(card, "items", items, origins)
    times = np.array(
        [microseconds(event.time, f"member.history[{index}].time") for index, event in enumerate(member.history)],
        np.int64,
    )
    now = request_time(member)
    events = event_attributes(member)
    if task.questions.context:  # the exposures in question are events too, as of now, so no history holds them
        events |= context_attributes(member)
        actions += [task.questions.actions[0]] * len(member.items)
        times = np.concatenate([times, np.full(len(member.items), max(now, int(times.max(initial=now))))])
    _check_attributes(card, "events", events, origins[: len(events)])
    order = np.argsort(times, kind="stable")
    facts = card.facts
    member_table = attribute_table(card.members.attributes, facts.members, {"member.attributes": member.attributes})
    item_table = attribute_table(card.items.attributes, (*facts.items, *facts.pairs), items)
    event_table = attribute_table(card.events.attributes, facts.events, events).take(order)
    ordered = [actions[row] for row in order]
    tables = _join(card, member_table, item_table, origins, event_table, order, ordered, times[order])
    history, num_past_events = history_before(tables, task, 0, now)
    candidates = np.arange(len(member.history), len(items), dtype=np.int32)
    labels = np.full(len(candidates), -1, np.int32)
    exposures = np.full(len(candidates), -1)
    if task.questions.context:
        exposures = np.argsort(order)[len(member.history) :]
    example = RankingExample(task.name, 0, now, history, num_past_events, candidates, labels, exposures)
    return MemberTables(tables, example, RequestFacts(tables))


def read_items(card: Card, task: Task, items: Mapping[str, Attributes]) -> Dataset:
    """The items of a request that a task can ask about, whose keys are fields of it, as a dataset without members and
    events."""
    origins = [card.origin_of(task.questions.actions[0])] * len(items)
    _check_attributes(card, "items", items, origins)
    nothing = np.zeros(0, np.int64)
    members, events = (attribute_table(part.attributes, (), {}) for part in (card.members, card.events))
    item_table = attribute_table(card.items.attributes, (*card.facts.items, *card.facts.pairs), items)
    return _join(card, members, item_table, origins, events, nothing, [], nothing)


def _join(
    card: Card,
    members: pa.Table,
    items: pa.Table,
    origins: Sequence[str],
    events: pa.Table,
    event_items: np.ndarray,
    actions: list[str],
    times: np.ndarray,
) -> Dataset:
    """A dataset of tables without ids, whose events are all of the first member; in a union, `origins` are those of
    the items."""
    if "" not in card.origins:
        items = items.append_column(ORIGIN, pa.array(origins, TEXT))
    parts = {
        "members": card.members.model_copy(update={"id": ROW}),
        "items": card.items.model_copy(update={"id": ROW}),
        "events": card.events.model_copy(update={"time": "time", "request": None}),
    }
    return Dataset(
        Path("request"),
        card.model_copy(update=parts),
        members.append_column(ROW, pa.array(np.arange(len(members)))),
        items.append_column(ROW, pa.array(np.arange(len(items)))),
        events.append_column(card.events.member, pa.array(np.zeros(len(events), np.int64)))
        .append_column(card.events.item, pa.array(event_items))
        .append_column(card.events.action, pa.array(actions, TEXT))
        .append_column("time", pa.array(times).cast(pa.timestamp("us"))),
    )


def _check_attributes(
    card: Card, table: Literal["items", "events"], rows: Mapping[str, Attributes], origins: Sequence[str]
) -> None:
    """Refuses attributes that the row's dataset of a union does not have, though another may."""
    for (field, attributes), origin in zip(rows.items(), origins, strict=True):
        side = card.origins[origin]
        facts = (*side.facts.items, *side.facts.pairs) if table == "items" else side.facts.events
        known = [attribute.column for attribute in getattr(side, table).attributes] + [fact.name for fact in facts]
        if unknown := set(attributes) - set(known):
            raise ValueError(f"{field}: no attribute '{min(unknown)}'; attributes: {', '.join(known)}")


def event_attributes(member: pb.Member) -> dict[str, Attributes]:
    """The attributes of each event, by field of the request."""
    return {f"member.history[{index}].attributes": event.attributes for index, event in enumerate(member.history)}


def item_attributes(member: pb.Member) -> dict[str, Attributes]:
    """The attributes of the item of each event, then of each item to score, by field of the request."""
    values = {f"member.history[{index}].item": event.item for index, event in enumerate(member.history)}
    return values | {f"member.items[{index}].attributes": item.attributes for index, item in enumerate(member.items)}


def context_attributes(member: pb.Member) -> dict[str, Attributes]:
    """The attributes of the exposure of each item to score, by field of the request."""
    return {f"member.items[{index}].context": item.context for index, item in enumerate(member.items)}


class RequestFacts:
    """Facts that a request brings, as of its own time: columns of its tables, by name."""

    def __init__(self, tables: Dataset):
        self._tables = tables

    def values(
        self, group: FactGroup, fact: Fact, members: np.ndarray, items: np.ndarray, times: np.ndarray
    ) -> np.ndarray:
        """See `FactSource`."""
        table, rows = (self._tables.members, members) if group == "members" else (self._tables.items, items)
        return floats(table[fact_column(fact)])[rows]

    def event_values(self, fact: Fact, events: np.ndarray) -> np.ndarray:
        """See `FactSource`."""
        return floats(self._tables.events[fact_column(fact)])[events]


def fact_column(fact: Fact) -> str:
    """The column of a request's tables with the values of a fact; no attribute has a name of this form."""
    return f"fact: {fact.name}"


# For each kind of attribute: the type of its column, and a conversion from each kind of value that is accepted.
_TEXTS: tuple[pa.DataType, dict[str, Callable[[Any], Any]]] = (
    TEXT,
    {"text": str, "integer": str, "number": str, "truth": str},
)
_KINDS: dict[str, tuple[pa.DataType, dict[str, Callable[[Any], Any]]]] = {
    "text": _TEXTS,
    "category": _TEXTS,
    "id": _TEXTS,
    "number": (pa.float64(), {"integer": float, "number": float}),
    "list": (pa.list_(TEXT), {"list": lambda texts: list(texts.values)}),
    "date": (pa.timestamp("us"), {"date": Timestamp.ToMicroseconds}),
}


def attribute_table(attributes: Sequence[Attribute], facts: Sequence[Fact], rows: Mapping[str, Attributes]) -> pa.Table:
    """A table with a column for each attribute and fact, and a row for each of `rows`, whose keys are fields of the
    request.

    Raises:
      ValueError: names the field of an unknown attribute, or of a value of the wrong kind.
    """
    by_column = {attribute.column: attribute for attribute in attributes}
    by_column |= {fact.name: Attribute(column=fact.name, kind="number", where=("question",)) for fact in facts}
    names = {fact.name: fact_column(fact) for fact in facts}
    columns: dict[str, list[Any]] = {column: [] for column in by_column}
    for field, row in rows.items():
        if unknown := set(row) - set(by_column):
            raise ValueError(f"{field}: no attribute '{min(unknown)}'; attributes: {', '.join(by_column)}")
        for column, attribute in by_column.items():
            columns[column].append(_read(attribute, row[column], field) if column in row else None)
    arrays = {
        names.get(column, column): pa.array(values, _KINDS[by_column[column].kind][0])
        for column, values in columns.items()
    }
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
        return microseconds(value.date, f"{field}['{attribute.column}']")
    return conversions[kind](getattr(value, kind))


def request_time(member: pb.Member) -> int:
    """The time as of which a member is read, in microseconds since 1970: `member.now`, or the server's clock."""
    return microseconds(member.now, "member.now") if member.HasField("now") else int(time.time() * 1e6)


def microseconds(timestamp: Timestamp, field: str) -> int:
    """Microseconds since 1970.

    Raises:
      ValueError: names the field of a time outside of the years 1 to 9999.
    """
    try:
        return timestamp.ToMicroseconds()
    except ValueError as error:
        raise ValueError(f"{field}: {error}") from None
