"""The tables of a union, of those of the datasets that it includes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import pyarrow as pa
import pyarrow.compute as pc

from brewjax.config import suggest
from brewjax.data.tables.card import Attribute
from brewjax.data.tables.facts import GROUPS
from brewjax.data.tables.reading import DAY, FLOAT, INTEGER, TEXT, TEXTS, TIME, show, show_type
from brewjax.data.tables.union import REQUEST, UnitedCard
from brewjax.data.tables.validate import KINDS, comparable

if TYPE_CHECKING:
    from brewjax.data.tables.dataset import Dataset

ORIGIN = "origin"  # column of the items: the name of their dataset in the union


def unite_tables(card: UnitedCard, datasets: Mapping[str, Dataset]) -> tuple[pa.Table, pa.Table, pa.Table]:
    """Unites the tables of datasets.

    Args:
      card: of the union.
      datasets: by name, as the union includes them.

    Returns:
      Members, joined by id; items, with a column `ORIGIN`; and events, dataset after dataset.

    Raises:
      ConfigError: two datasets disagree on a member, or facts of the union do not fit the tables.
    """
    members = _join_members(card, datasets)
    items = pa.concat_tables([_items(card, *each) for each in datasets.items()], promote_options="default")
    for attribute in card.shared:
        items = items.append_column(attribute.column, coalesce(card, items, attribute))
    events = pa.concat_tables([_events(card, *each) for each in datasets.items()], promote_options="default")
    _check_facts(card, events)
    return members, items, events


def _join_members(card: UnitedCard, datasets: Mapping[str, Dataset]) -> pa.Table:
    """Every member once, in order of their first dataset, with what all datasets know."""
    key = card.members.id
    first, *further = datasets
    own_ids = {name: dataset.members[dataset.card.members.id] for name, dataset in datasets.items()}
    for name in further:
        if own_ids[name].type != own_ids[first].type:
            types = f"{show_type(own_ids[name].type)}, where those of '{first}' are {show_type(own_ids[first].type)}"
            raise card.error(f"the ids of its members are {types}; make both the same", "include", name)
    ids = pa.chunked_array([chunk for each in own_ids.values() for chunk in each.chunks]).unique()
    columns: dict[str, pa.ChunkedArray | pa.Array] = {key: ids}
    homes: dict[str, str] = {}
    for name, dataset in datasets.items():
        rows = pc.index_in(ids, own_ids[name].combine_chunks())
        for column in dataset.members.column_names:
            if column == dataset.card.members.id:
                continue
            if column == key:
                message = f"its members have a column '{column}', which is their id in '{first}'; rename one"
                raise card.error(message, "include", name)
            values = dataset.members[column].take(rows)
            if column in columns:
                values = _agreed(card, ids, column, columns[column], values, (homes[column], name))
            columns[column] = values
            homes.setdefault(column, name)
    return pa.table(columns)


def _agreed(
    card: UnitedCard,
    ids: pa.Array,
    column: str,
    known: pa.ChunkedArray,
    values: pa.ChunkedArray,
    names: tuple[str, str],
) -> pa.ChunkedArray:
    """What is known of each member by the datasets before, or else by a further one; they must not disagree."""
    if known.type != values.type:
        for types, common in (((INTEGER, FLOAT), FLOAT), ((DAY, TIME), TIME)):
            if known.type in types and values.type in types:
                known, values = known.cast(common), values.cast(common)
    if known.type == values.type:
        both = pc.and_(known.is_valid(), values.is_valid())
        rows = pc.indices_nonzero(pc.and_kleene(both, pc.not_equal(comparable(known), comparable(values))))
        if not len(rows):
            return pc.coalesce(known, values)
        row = rows[0].as_py()
        difference = f"{show(known[row])} and {show(values[row])} of member {show(ids[row])}"
        count = f", and {len(rows) - 1:,} more members" if len(rows) > 1 else ""
    else:
        difference, count = f"{show_type(known.type)} and {show_type(values.type)}", ""
    home, name = names
    message = f"'{home}' and '{name}' disagree on the members' column '{column}': {difference}{count}"
    raise card.error(f"{message}; make both the same, or rename one", "include", name)


def _items(card: UnitedCard, name: str, dataset: Dataset) -> pa.Table:
    own_id = dataset.card.items.id
    ids = with_name(name, dataset.items[own_id])
    origin = pa.array([name] * len(ids), TEXT).dictionary_encode()
    return pa.table({card.items.id: ids, ORIGIN: origin, **_further(name, dataset.items, [own_id])})


def _events(card: UnitedCard, name: str, dataset: Dataset) -> pa.Table:
    columns, events, united = dataset.card.events, dataset.events, card.events
    table = {
        united.member: events[columns.member],
        united.item: with_name(name, events[columns.item]),
        united.action: with_name(name, events[columns.action]),
        united.time or "": events[columns.time],
    }
    if columns.request:
        table[REQUEST] = with_name(name, events[columns.request])
    roles = [columns.member, columns.item, columns.action, columns.time, columns.request]
    return pa.table({**table, **_further(name, events, roles)})


def with_name(name: str, values: pa.Array | pa.ChunkedArray) -> pa.Array | pa.ChunkedArray:
    """Puts the `name` of a dataset in front of its ids or actions (`values`), as they are called in the union."""
    return pc.binary_join_element_wise(pa.scalar(name, TEXT), values.cast(TEXT), pa.scalar(".", TEXT))


def _further(name: str, table: pa.Table, known: Sequence[str | None]) -> dict[str, pa.ChunkedArray]:
    """The columns but for the `known` ones, as they are called in the union."""
    return {f"{name}.{column}": table[column] for column in table.column_names if column not in known}


def coalesce(card: UnitedCard, items: pa.Table, attribute: Attribute) -> pa.ChunkedArray:
    """Makes the column of an attribute that several datasets have.

    Args:
      card: of the union.
      items: with the columns of the datasets.
      attribute: one of the card's `shared`.

    Returns:
      Of each item its own dataset's value.
    """
    common = {"category": TEXT, "id": TEXT, "number": FLOAT, "date": TIME}.get(attribute.kind, TEXTS)
    columns = [
        items[each.column].cast(common)
        for name, origin in card.origins.items()
        for each in origin.items.attributes
        if each.column == f"{name}.{attribute.column}"
    ]
    return pc.coalesce(*columns)


def _check_facts(card: UnitedCard, events: pa.Table) -> None:
    """The union's own facts are of columns that events have, with numbers in them."""
    for group in GROUPS:
        for index, fact in enumerate(getattr(card.facts_by_origin[""], group)):
            if fact.column and fact.column not in events.column_names:
                hint = suggest(fact.column, events.column_names)
                raise card.error(f"events have no column '{fact.column}'; {hint}", "facts", group, index, fact.kind)
            if fact.column and events[fact.column].type not in KINDS["number"][0]:
                message = (
                    f"column '{fact.column}' holds {show_type(events[fact.column].type)}; only numbers have a mean"
                )
                raise card.error(message, "facts", group, index, fact.kind)
