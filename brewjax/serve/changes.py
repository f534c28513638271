"""Changes of a catalogue, as rows of its tables: each is checked against card and tables before it is taken."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import NamedTuple

import pyarrow as pa

from brewjax.data.tables.card import Attribute, Card
from brewjax.data.tables.dataset import Dataset
from brewjax.data.tables.facts import GROUPS
from brewjax.data.tables.reading import TEXT, TIME, show
from brewjax.data.tables.statistics import Table
from brewjax.data.tables.union import UnitedCard
from brewjax.data.tables.union_tables import ORIGIN, coalesce
from brewjax.data.tables.validate import LATEST
from brewjax.serve import ranker_pb2 as pb
from brewjax.serve.members import attribute_table, microseconds


class ChangedRows(NamedTuple):
    """ChangedRows of a dataset's tables, with the columns that the tables have."""

    members: pa.Table
    items: pa.Table
    events: pa.Table


def read_rows(
    change: pb.Change, dataset: Dataset, is_member: Callable[[str], bool], is_item: Callable[[str], bool]
) -> ChangedRows:
    """Reads a change of a dataset.

    Args:
      change: what a caller asks for.
      dataset: whose card and tables it must fit.
      is_member: whether a member has this id.
      is_item: whether an item has this id.

    Returns:
      The rows of the change; columns that the card does not name are null in them.

    Raises:
      ValueError: names the field that is missing, unknown to the card or the tables, or of the wrong type.
    """
    card = dataset.card
    members, items = ({row.id for row in rows} for rows in (change.members, change.items))
    item_origins = [_origin(card, row.id, f"items[{index}].id") for index, row in enumerate(change.items)]
    for index, event in enumerate(change.events):
        field = f"events[{index}]"
        for noun, id_, added, is_known in (
            ("member", event.member, members, is_member),
            ("item", event.item, items, is_item),
        ):
            if not (id_ in added or is_known(id_)):
                raise ValueError(f"{field}.{noun}: no {noun} '{id_}' in the catalogue; Upsert{noun.title()}s adds it")
        if event.action not in card.events.actions:
            raise ValueError(f"{field}.action: no action '{event.action}'; actions: {', '.join(card.events.actions)}")
        if _origin(card, event.item, f"{field}.item") != (origin := card.origin_of(event.action)):
            raise ValueError(f"{field}.action: '{event.action}', but item '{event.item}' is none of {origin}")
        if not event.HasField("time"):
            raise ValueError(f"{field}.time: missing")
        if microseconds(event.time, f"{field}.time") > LATEST:
            raise ValueError(f"{field}.time: after the year 2199")
    events, event_origins = change.events, [card.origin_of(event.action) for event in change.events]
    event_keys = {
        card.events.member: _texts(event.member for event in events),
        card.events.item: _texts(event.item for event in events),
        card.events.action: _texts(event.action for event in events),
        card.events.time or "": pa.array([event.time.ToMicroseconds() for event in events], TIME),
    }
    member_keys = {card.members.id: _read_ids(change.members, "members")}
    return ChangedRows(
        _read(dataset, "members", change.members, member_keys, [""] * len(change.members)),
        _read_items(dataset, change.items, item_origins),
        _read(dataset, "events", events, event_keys, event_origins),
    )


def _origin(card: Card, item: str, field: str) -> str:
    """The dataset of a union that an item is of, by its id; "" where the card is no union's."""
    if "" in card.origins:
        return ""
    name, _, id_ = item.partition(".")
    if name not in card.origins or not id_.strip():
        expected = " or ".join(f"{origin}.ID" for origin in card.origins)
        raise ValueError(f"{field}: '{item}'; expected {expected}")
    return name


def _read_items(dataset: Dataset, rows: Sequence[pb.Row], origins: Sequence[str]) -> pa.Table:
    """As `_read`, with the columns that only the items of a union have."""
    card, keys = dataset.card, {dataset.card.items.id: _read_ids(rows, "items")}
    if not isinstance(card, UnitedCard):
        return _read(dataset, "items", rows, keys, origins)
    items = _read(dataset, "items", rows, {**keys, ORIGIN: _texts(origins).dictionary_encode()}, origins)
    for attribute in card.shared:
        field = items.schema.field(attribute.column)
        values = coalesce(card, items, attribute).cast(field.type)
        items = items.set_column(items.column_names.index(field.name), field, values)
    return items


def _read_ids(rows: Sequence[pb.Row], field: str) -> pa.Array:
    for index, row in enumerate(rows):
        if not row.id.strip():
            raise ValueError(f"{field}[{index}].id: empty")
    return _texts(row.id for row in rows)


def _texts(values: Iterable[str]) -> pa.Array:
    return pa.array(list(values), TEXT)


def _read(
    dataset: Dataset,
    table: Table,
    rows: Sequence[pb.Row | pb.RecordedEvent],
    keys: dict[str, pa.Array],
    origins: Sequence[str],
) -> pa.Table:
    """ChangedRows as a part of a table, given its columns of ids, actions and times, and the dataset of a union that
    each row is of, which alone it has columns of; "" where it may have all."""
    by_field = {f"{table}[{index}].attributes": row.attributes for index, row in enumerate(rows)}
    for (field, values), origin in zip(by_field.items(), origins, strict=True):
        for column, value in values.items():
            if origin and column != dataset.card.events.request and not column.startswith(f"{origin}."):
                raise ValueError(f"{field}: '{column}' is none of {origin}, of which the row is")
            if any(not text.strip() for text in value.list.values):
                raise ValueError(f"{field}['{column}']: an empty text within the list; leave it out of the list")
    attributes = [attribute for attribute in _columns(dataset.card, table) if attribute.column not in keys]
    read = attribute_table(attributes, (), by_field)
    columns = {attribute.column: read[attribute.column].combine_chunks() for attribute in attributes} | keys
    schema: pa.Schema = getattr(dataset, table).schema
    arrays = [
        _cast(columns[field.name], field.type, table, "id" if field.name in keys else f"attributes['{field.name}']")
        if field.name in columns
        else pa.nulls(len(rows), field.type)
        for field in schema
    ]
    return pa.Table.from_arrays(arrays, schema=schema)


def _columns(card: Card, table: Table) -> Iterator[Attribute]:
    """The columns that a row of a table may have beside its keys: all that the card names, each once."""
    described = {attribute.column: attribute for attribute in getattr(card, table).attributes}
    kinds: dict[str | None, str] = {}
    if table == "events":
        kinds = {fact.column: "number" for group in GROUPS for fact in getattr(card.facts, group)}
        kinds |= {card.events.request: "category"}
    else:
        for origin in card.origins.values():
            if available := getattr(origin, table).available:
                kinds |= {available.from_: "date", available.until: "date"}
    yield from described.values()
    for column, kind in kinds.items():
        if column and column not in described:
            yield Attribute.model_validate({"column": column, "kind": kind})


def _cast(values: pa.Array, type_: pa.DataType, table: Table, field: str) -> pa.Array:
    """The values in the type of the catalogue's column. Raises ValueError for one that would be another there."""
    cast = _cast_back_and_forth(values, type_)
    if cast is None:
        row = next(row for row in range(len(values)) if _cast_back_and_forth(values.slice(row, 1), type_) is None)
        raise ValueError(f"{table}[{row}].{field}: {show(values[row])}; the catalogue's column is {type_}")
    return cast


def _cast_back_and_forth(values: pa.Array, type_: pa.DataType) -> pa.Array | None:
    try:
        cast = values.cast(type_)
        return cast if type_ == pa.bool_() or cast.cast(values.type).equals(values) else None
    except pa.ArrowInvalid:
        return None
