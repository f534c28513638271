"""A member who is not in the tables: what it did is typed, a line each."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from brewjax.config import suggest
from brewjax.data.tables.dataset import PSEUDO_TIME, Dataset
from brewjax.data.tables.reading import TEXT
from brewjax.explore.profile import parse_value

DAY = 86_400_000_000  # microseconds
SHOWN = 3  # items that an error names


def add_member(dataset: Dataset, events: Sequence[str], moment: int) -> Dataset:
    """The tables with one more member, in the last row, whose profile is unknown.

    Its events are rows like all others, so that its history and its facts are computed as everybody's.

    Args:
      dataset: the tables.
      events: a line each, the oldest first: an action, an item by its id or name, and attributes of the event, as
        "rated: Alien (1979) | stars=5". Where the tables know one action it may be left out. A part of a name is enough
        if no other name has it; in a union, no other of the action's dataset. Blank lines are skipped.
      moment: microseconds since 1970; the last event is a day before it, each other one a day before the next.

    Raises:
      ValueError: names the line, and the action, item or attribute that does not exist.
    """
    card, lines = dataset.card, [line.strip() for line in events if line.strip()]
    names = _item_names(dataset)
    rows = [_parse_line(dataset, names, line, f"line {number}") for number, line in enumerate(lines, 1)]
    member = _new_id(dataset.members[card.members.id])
    time = card.events.time or PSEUDO_TIME
    for index, row in enumerate(rows):
        microseconds = pa.scalar(moment - (len(rows) - index) * DAY).cast(pa.timestamp("us"))
        row |= {card.events.member: member, time: microseconds.cast(dataset.events.schema.field(time).type).as_py()}
    members = _append(dataset.members, [{card.members.id: member}])
    return dataclasses.replace(dataset, members=members, events=_append(dataset.events, rows))


def _append(table: pa.Table, rows: list[dict[str, Any]]) -> pa.Table:
    """The table with more rows; columns that a row does not name are null."""
    schema = pa.schema([field.with_nullable(True) for field in table.schema])
    return pa.concat_tables([table.cast(schema), pa.Table.from_pylist(rows, schema)])


def _new_id(ids: pa.ChunkedArray) -> Any:
    """An id that no member has."""
    if pa.types.is_integer(ids.type):
        return pc.max(ids).as_py() + 1
    existing, new = set(ids.to_pylist()), "new"
    while new in existing:
        new += "'"
    return new


def _item_names(dataset: Dataset) -> pa.Array:
    """The name of every item, as `Dataset.item_name` has it, in small letters."""
    return pa.array([dataset.item_name(row).lower() for row in range(len(dataset.items))], TEXT)


def _parse_line(dataset: Dataset, names: pa.Array, line: str, where: str) -> dict[str, Any]:
    """An event as values by column, without member and time."""
    events = dataset.card.events
    event, *settings = [part.strip() for part in line.split(" | ")]
    action, colon, rest = event.partition(":")
    if colon and action.strip() in events.actions:
        action, event = action.strip(), rest.strip()
    elif len(events.actions) == 1:
        (action,) = events.actions
    else:
        raise ValueError(f"{where}: '{line}' begins with no action; {', '.join(f'{name}:' for name in events.actions)}")
    row = _find_item(dataset, names, action, event, where)
    values = {events.item: dataset.items[dataset.card.items.id][row].as_py(), events.action: action}
    kinds = {attribute.column: attribute.kind for attribute in events.attributes}
    for setting in settings:
        column, equals, text = (part.strip() for part in setting.partition("="))
        if not equals or column not in kinds:
            expected = (
                f"COLUMN=VALUE; {suggest(column, kinds, listing='columns')}" if kinds else "nothing after the item"
            )
            raise ValueError(f"{where}: '{setting}': expected {expected}")
        try:
            values[column] = parse_value(text, kinds[column], dataset.events[column].type).as_py()
        except ValueError as error:
            raise ValueError(f"{where}: {column}: {error}") from None
    return values


def _find_item(dataset: Dataset, names: pa.Array, action: str, item: str, where: str) -> int:
    """The row of the item with an id, with a name, or with a part of a name, that no other item of the action has."""
    items, is_of_action = dataset.card.side_of(action).items, dataset.items_of(action)
    ids = dataset.items[dataset.card.items.id].cast(TEXT).combine_chunks()
    for mask in (pc.equal(ids, item), pc.equal(names, item.lower()), pc.match_substring(names, item.lower())):
        matches = np.flatnonzero(mask.to_numpy(zero_copy_only=False) & is_of_action)
        if len(matches) == 1:
            return int(matches[0])
        if len(matches) > 1:
            some = ", ".join(f"{dataset.item_id(row)} {dataset.item_name(row)}" for row in matches[:SHOWN])
            raise ValueError(f"{where}: {len(matches)} {items.plural} are '{item}': {some} ..; give the id")
    raise ValueError(f"{where}: no {items.noun} has the id or name '{item}'")
