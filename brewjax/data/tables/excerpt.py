"""An excerpt of a dataset: the events of a few members and items, exactly as if all events had been read.

What prompts say of a member and of items depends on their own events, on when each item was first seen, and on a few
sums over all events, which are taken in a pass over three columns. Where a card has facts that depend on more, or
tables that cannot be read in part, everything is read.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.dataset

from brewjax.data.tables.card import Card
from brewjax.data.tables.dataset import FOREVER, Dataset, EventSummary
from brewjax.data.tables.facts import Fact, FactGroup
from brewjax.data.tables.reading import TEXT, UnreadableError, open_table, plain
from brewjax.data.tables.union import UnitedCard, load_card

ROWS = 1 << 22  # of events that are summarised at a time
FILES = (".parquet", "")  # endings of what can be read in part: a file, or a folder of files


def load_excerpt(path: str | Path, members: Sequence[str], moment: int | None = None) -> Dataset:
    """Reads what questions to members as of one moment need, except for the events of items: see `with_items`.

    Values are read without being checked, as `Dataset.load` checks them.

    Args:
      path: the dataset folder.
      members: ids, written as text.
      moment: microseconds since 1970; by default just after the last event.

    Returns:
      The members' events and an `EventSummary`; or the whole dataset, where less would not do.

    Raises:
      ConfigError: the card is missing or wrong.
      ValueError: there is no such member.
    """
    path = Path(path)
    card = load_card(path)
    if _can_be_partial(path, card):
        try:
            return _read_excerpt(path, card, members, moment)
        except (OSError, KeyError, pa.ArrowException, UnreadableError):
            pass  # what is wrong is named by:
    return Dataset.load(path)


def _read_excerpt(path: Path, card: Card, members: Sequence[str], moment: int | None) -> Dataset:
    member_table, item_table = (_plain(open_table(path, part.file)[0]) for part in (card.members, card.items))
    summary = _summarize(path, card, item_table[card.items.id], moment)
    dataset = Dataset(path, card, member_table, item_table, pa.table({}), summary)
    rows = pa.array([dataset.member_row(member) for member in members])
    chosen = dataset.members[card.members.id].take(rows)
    return dataclasses.replace(dataset, events=_read_events(dataset, {card.events.member: chosen}))


def with_items(dataset: Dataset, items: np.ndarray) -> Dataset:
    """Reads the events of items too, if a dataset is an excerpt.

    Args:
      dataset: an excerpt, or a whole dataset, which is returned as it is.
      items: int [items], rows of the items table.

    Returns:
      The excerpt, with every event of its members or of the items.
    """
    if dataset.summary is None:
        return dataset
    card = dataset.card
    members = dataset.events[card.events.member].unique()
    if any(fact.less == "items" for _, fact in card.facts.declared()):  # of the items in the members' histories
        items = np.union1d(items, dataset.event_item)
    chosen = dataset.items[card.items.id].take(pa.array(items))
    rows = {card.events.member: pa.chunked_array([members]), card.events.item: chosen}
    return dataclasses.replace(dataset, events=_read_events(dataset, rows))


def _can_be_partial(path: Path, card: Card) -> bool:
    if isinstance(card, UnitedCard):
        return False
    files = list((card.events.files or {"": card.events.file}).values())
    if card.events.time is None or any((path / file).suffix not in FILES for file in files):
        return False
    return all(_is_local(group, fact) for group, fact in card.facts.declared())


def _is_local(group: FactGroup, fact: Fact) -> bool:
    """Whether a fact depends on no event but those of its member, of its item and of the items in the member's history;
    and on shares of all events, which are whole numbers and so add up to the same in any order."""
    if fact.together or fact.neighbors or (fact.shrink and fact.mean and not fact.less):
        return False
    return fact.less != "members" or (group != "items" and not fact.among)


def _plain(table: pa.Table) -> pa.Table:
    return pa.table({name: plain(table[name]) for name in table.column_names})


def _sources(path: Path, card: Card) -> Iterator[tuple[pa.dataset.Dataset, str | None]]:
    """Yields each file or folder of events, with the action of all its events if the card states it."""
    files: list[tuple[str | None, str]] = [*(card.events.files or {}).items()] or [(None, card.events.file)]
    for action, file in files:
        part = path / file
        as_codes = pa.dataset.ParquetReadOptions(dictionary_columns=[] if action else [card.events.action])
        parquet = pa.dataset.ParquetFileFormat(read_options=as_codes)
        yield pa.dataset.dataset(part, format=parquet, partitioning="hive" if part.is_dir() else None), action


def _summarize(path: Path, card: Card, item_ids: pa.ChunkedArray, moment: int | None) -> EventSummary:
    events, ids = card.events, item_ids.combine_chunks()
    first, last, count = np.full(len(item_ids), FOREVER), -FOREVER, 0
    hits = {fact.rate: 0 for _, fact in card.facts.declared() if fact.rate and fact.shrink and not fact.less}
    assert events.time is not None
    for source, action in _sources(path, card):
        columns = [events.item, events.time, *([events.action] if hits and action is None else [])]
        for table in _tables(source.scanner(columns=columns).to_batches()):
            times = plain(table[events.time]).cast(pa.int64()).to_numpy()
            np.minimum.at(first, pc.index_in(plain(table[events.item]), ids).to_numpy(), times)
            last = max(last, int(times.max()))
            past = times < (FOREVER if moment is None else moment)
            count += int(past.sum())
            for actions in hits:
                hits[actions] += int((past & _has_action(table, events.action, action, actions)).sum())
    rates = {actions: total / count if count else np.nan for actions, total in hits.items()}
    return EventSummary(last + 1 if moment is None else moment, last, first, rates)


def _has_action(table: pa.Table, column: str, action: str | None, actions: tuple[str, ...]) -> np.ndarray | bool:
    """bool [rows]: whether events are of one of `actions`; `action` is that of all rows, where the card states it."""
    if action is not None:
        return action in actions
    values = table[column]  # codes, which would be texts after `plain`
    type_ = values.type.value_type if pa.types.is_dictionary(values.type) else values.type
    return pc.is_in(values, pa.array(actions, type_)).to_numpy()


def _tables(batches: Iterator[pa.RecordBatch]) -> Iterator[pa.Table]:
    """Yields the rows of batches in tables of about `ROWS` rows."""
    waiting: list[pa.RecordBatch] = []
    for batch in batches:
        waiting.append(batch)
        if sum(map(len, waiting)) >= ROWS:
            yield pa.Table.from_batches(waiting)
            waiting = []
    if any(map(len, waiting)):
        yield pa.Table.from_batches(waiting)


def _read_events(dataset: Dataset, values: dict[str, pa.ChunkedArray]) -> pa.Table:
    """The events that have one of the `values` in any of these columns, in the order of `Dataset.events`."""
    card, tables = dataset.card, []
    for source, action in _sources(dataset.path, card):
        conditions = [_is_in(source, column, of_column) for column, of_column in values.items()]
        condition = conditions[0]
        for further in conditions[1:]:
            condition = condition | further
        table = _plain(source.to_table(filter=condition))
        if action is not None:
            table = table.append_column(card.events.action, pa.array([action] * len(table), TEXT))
        tables.append(table)
    events = pa.concat_tables(tables, promote_options="permissive")
    time = events[card.events.time].cast(pa.int64()).to_numpy()
    member = pc.index_in(events[card.events.member], dataset.members[card.members.id].combine_chunks()).to_numpy()
    return events.take(np.lexsort((time, member)))


def _is_in(source: pa.dataset.Dataset, column: str, values: pa.ChunkedArray) -> pc.Expression:
    type_, field = source.schema.field(column).type, pc.field(column)
    if pa.types.is_dictionary(type_):
        type_, field = type_.value_type, field.cast(type_.value_type)
    return field.isin(values.combine_chunks().cast(type_))
