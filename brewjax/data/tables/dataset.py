"""`Dataset`: the validated tables of a company, members, items and events, with arrays that index one by another."""

from __future__ import annotations

import dataclasses
import datetime
import hashlib
from collections.abc import Iterable, Sequence
from functools import cached_property
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from brewjax.data.tables.card import CARD, Available, Card
from brewjax.data.tables.reading import TEXT, TIME
from brewjax.data.tables.union import UnitedCard, included_folders, load_card
from brewjax.data.tables.union_tables import ORIGIN, unite_tables
from brewjax.data.tables.validate import read_validated
from brewjax.fingerprint import hash_files, hash_json

PSEUDO_TIME = "brewjax_time"  # column that stands for the times of events without any
SECOND = 1_000_000  # microseconds
FOREVER = np.iinfo(np.int64).max - 1  # a time that never comes


@dataclasses.dataclass(frozen=True)
class EventSummary:
    """What is known of all events where a dataset holds only some of them.

    Attributes:
      moment: microseconds since 1970, as of which the rates are.
      last_event_time: of all events.
      first_event_time: int64 [items], see `Dataset.first_event_time`.
      rates: the share of events of some actions in all events before the moment.
    """

    moment: int
    last_event_time: int
    first_event_time: np.ndarray
    rates: dict[tuple[str, ...], float]


@dataclasses.dataclass(frozen=True)
class Dataset:
    """Validated tables. Inside brewjax members, items and events are identified by their row, not by their id.

    Attributes:
      path: the dataset folder, for error messages.
      card: `dataset.yaml`.
      members: one row per member.
      items: one row per item.
      events: sorted by member, then time; events of one time keep the order of the file. Events without times have a
        column `PSEUDO_TIME` that stands for their order.
      summary: of all events, if `events` are an excerpt of them (`excerpt.py`).
    """

    path: Path
    card: Card
    members: pa.Table
    items: pa.Table
    events: pa.Table
    summary: EventSummary | None = None

    @classmethod
    def load(cls, path: str | Path) -> Dataset:
        """Reads and validates a dataset folder.

        Args:
          path: a folder with `dataset.yaml`, and three tables in Parquet or CSV; or a union of such folders.

        Returns:
          The dataset, its events in order of time.

        Raises:
          ConfigError: the card is missing or wrong.
          DatasetError: the tables do not fit the card; lists every problem.
        """
        path = Path(path)
        card = load_card(path)
        if isinstance(card, UnitedCard):
            included = card.included(path).items()
            datasets = {name: cls.of_tables(*each, *read_validated(*each)) for name, each in included}
            return cls.of_tables(path, card, *unite_tables(card, datasets))
        return cls.of_tables(path, card, *read_validated(path, card))

    @classmethod
    def of_tables(cls, path: Path, card: Card, members: pa.Table, items: pa.Table, events: pa.Table) -> Dataset:
        """Makes a dataset of tables that fit a card.

        Args:
          path: the dataset folder, for error messages.
          card: of the tables.
          members: one row per member.
          items: one row per item.
          events: in any order; those of one member and time stay as they are.

        Returns:
          The dataset, its events in order of time.
        """
        if not card.events.time:
            events = events.append_column(PSEUDO_TIME, _pseudo_times(card, members, items, events))
        time = events[card.events.time or PSEUDO_TIME].cast(pa.timestamp("us")).cast(pa.int64()).to_numpy()
        member = pc.index_in(events[card.events.member], members[card.members.id].combine_chunks()).to_numpy()
        # Whole columns: Arrow takes a few rows of one in chunks by copying all of it.
        members, items = members.combine_chunks(), items.combine_chunks()
        return cls(path, card, members, items, events.take(np.lexsort((time, member))))

    @cached_property
    def event_member(self) -> np.ndarray:
        """int32 [events]: row of the member."""
        ids = self.members[self.card.members.id].combine_chunks()
        return pc.index_in(self.events[self.card.events.member], ids).to_numpy().astype(np.int32)

    @cached_property
    def event_item(self) -> np.ndarray:
        """int32 [events]: row of the item."""
        ids = self.items[self.card.items.id].combine_chunks()
        return pc.index_in(self.events[self.card.events.item], ids).to_numpy().astype(np.int32)

    @cached_property
    def item_origin(self) -> np.ndarray:
        """int32 [items]: the dataset of a union that each item is of, by its place among the card's `origins`."""
        if "" in self.card.origins:
            return np.zeros(len(self.items), np.int32)
        names = pa.array(self.card.origins, TEXT)
        return pc.index_in(self.items[ORIGIN].cast(TEXT), names).to_numpy().astype(np.int32)

    def item_card(self, row: int) -> Card:
        """Looks up the card from the side of an item's dataset, see `Card.origins`.

        Args:
          row: of the item.

        Returns:
          The card; of a dataset that is no union, its own.
        """
        return [*self.card.origins.values()][self.item_origin[int(row)]]

    @property
    def event_origin(self) -> np.ndarray:
        """int32 [events]: as `item_origin`, of the item of each event."""
        return self.item_origin[self.event_item]

    def items_of(self, action: str) -> np.ndarray:
        """Selects the items that events of an action can be on: in a union, those of the same dataset.

        Args:
          action: a key of the card's `events.actions`.

        Returns:
          bool [items].
        """
        return self.item_origin == list(self.card.origins).index(self.card.origin_of(action))

    @cached_property
    def event_action(self) -> np.ndarray:
        """int16 [events]: index of the action among the card's actions."""
        names = pa.array(self.card.events.actions, TEXT)
        return pc.index_in(self.events[self.card.events.action], names).to_numpy().astype(np.int16)

    def action_name(self, event: int) -> str:
        """Looks up the name of an event's action.

        Args:
          event: row of the event.

        Returns:
          A key of the card's `events.actions`.
        """
        return list(self.card.events.actions)[self.event_action[event]]

    def describe_moment(self, time: int) -> str:
        """Says a moment for people to read.

        Args:
          time: microseconds since 1970.

        Returns:
          For instance "2025-03-01 12:00:00 UTC"; "step 417" where events have an order and no times, by the name of its
          column; empty where they have neither.
        """
        events = self.card.events
        if events.time:
            return f"{datetime.datetime.fromtimestamp(time / SECOND, datetime.UTC):%Y-%m-%d %H:%M:%S} UTC"
        return f"{events.order} {time // SECOND:,}" if events.order else ""

    def has_action(self, actions: Iterable[str]) -> np.ndarray:
        """Selects events by their actions.

        Args:
          actions: keys of the card's `events.actions`.

        Returns:
          bool [events]: whether each event is of one of them.
        """
        is_selected = np.isin(list(self.card.events.actions), list(actions))
        return is_selected[self.event_action]

    @cached_property
    def event_time(self) -> np.ndarray:
        """int64 [events]: microseconds since 1970, UTC."""
        return self.events[self.card.events.time or PSEUDO_TIME].cast(pa.timestamp("us")).cast(pa.int64()).to_numpy()

    @cached_property
    def event_request(self) -> np.ndarray:
        """int64 [events]: the request that an event belongs to, by number; -1 if the card or the event has none."""
        column = self.card.events.request
        if column is None:
            return np.full(len(self.events), -1)
        codes = self.events[column].combine_chunks().dictionary_encode().indices
        return codes.fill_null(-1).to_numpy().astype(np.int64)

    @cached_property
    def time_order(self) -> np.ndarray:
        """int64 [events]: rows of the events in order of time."""
        return np.argsort(self.event_time, kind="stable")

    @cached_property
    def member_offsets(self) -> np.ndarray:
        """int64 [members + 1]: the events of member m are rows offsets[m] to offsets[m + 1]."""
        return np.searchsorted(self.event_member, np.arange(len(self.members) + 1))

    def member_rows(self, actions: tuple[str, ...]) -> tuple[np.ndarray, np.ndarray]:
        """Finds the events of some actions, by member; the result is kept for the next call.

        Args:
          actions: keys of the card's `events.actions`.

        Returns:
          Rows of the events, int64 [rows], and the offsets in them of each member's, int64 [members + 1].
        """
        if actions not in self._rows_by_actions:
            rows = np.flatnonzero(self.has_action(actions))
            offsets = np.searchsorted(self.event_member[rows], np.arange(len(self.members) + 1))
            self._rows_by_actions[actions] = rows, offsets
        return self._rows_by_actions[actions]

    @cached_property
    def _rows_by_actions(self) -> dict[tuple[str, ...], tuple[np.ndarray, np.ndarray]]:
        return {}

    @cached_property
    def first_event_time(self) -> np.ndarray:
        """int64 [items]: time of the first event with each item; the greatest int64 for an item without events."""
        if self.summary:
            return self.summary.first_event_time
        first = np.full(len(self.items), FOREVER)
        np.minimum.at(first, self.event_item, self.event_time)
        return first

    @cached_property
    def last_event_time(self) -> int:
        """Microseconds since 1970."""
        return self.summary.last_event_time if self.summary else int(self.event_time.max())

    @cached_property
    def item_life(self) -> tuple[np.ndarray, np.ndarray]:
        """Two int64 [items], microseconds since 1970: an item can be asked about from the first time on, and before the
        second. An item whose beginning the card does not state exists just after its first event: only then is it
        known."""
        begins, ends = self.first_event_time + 1, np.full(len(self.items), FOREVER)
        for index, card in enumerate(self.card.origins.values()):
            items = self.item_origin == index
            for times, stated in zip((begins, ends), _stated_life(self.items, card.items.available), strict=True):
                if stated is not None:
                    times[items] = stated[items]
        return begins, ends

    @cached_property
    def member_life(self) -> tuple[np.ndarray, np.ndarray]:
        """Two int64 [members], microseconds since 1970: a member can be asked about from the first time on, and before
        the second."""
        begins, ends = _stated_life(self.members, self.card.members.available)
        always = np.full(len(self.members), FOREVER)
        return -always if begins is None else begins, always if ends is None else ends

    @cached_property
    def member_hash(self) -> np.ndarray:
        """uint64 [members]: a hash of each member's id, the same wherever the member stands in the table."""
        return _hash_ids(self.members[self.card.members.id])

    @cached_property
    def item_hash(self) -> np.ndarray:
        """uint64 [items]: a hash of each item's id, the same wherever the item stands in the table."""
        return _hash_ids(self.items[self.card.items.id])

    @cached_property
    def members_by_hash(self) -> np.ndarray:
        """int64 [members]: rows of the members in order of their hashes."""
        return np.argsort(self.member_hash, kind="stable")

    @cached_property
    def items_by_hash(self) -> np.ndarray:
        """int64 [items]: rows of the items in order of their hashes."""
        return np.argsort(self.item_hash, kind="stable")

    def member_row(self, member: str) -> int:
        """Finds a member by id.

        Args:
          member: the id, written as text.

        Returns:
          The member's row.

        Raises:
          ValueError: no member has this id; the message holds a few ids that exist.
        """
        ids = self.members[self.card.members.id]
        row = pc.index(ids.cast(TEXT), member).as_py()
        if row < 0:
            known = ", ".join(f"'{known_id}'" for known_id in ids[:3].to_pylist())
            raise ValueError(f"{self.path}: no member '{member}'; ids look like {known}")
        return row

    def member_id(self, row: int) -> str:
        """Looks up a member's id.

        Args:
          row: of the member.

        Returns:
          The id, as text.
        """
        return str(self.members[self.card.members.id][int(row)].as_py())

    def item_rows(self, items: Sequence[str]) -> np.ndarray:
        """Finds items by id.

        Args:
          items: the ids, written as text.

        Returns:
          int64 [items], the row of each.

        Raises:
          ValueError: no item has one of these ids.
        """
        ids = self.items[self.card.items.id].cast(TEXT).combine_chunks()
        rows = pc.index_in(pa.array(items, TEXT), value_set=ids)
        if rows.null_count:
            raise ValueError(f"{self.path}: no item '{items[pc.index(rows.is_null(), True).as_py()]}'")
        return rows.to_numpy().astype(np.int64)

    def item_id(self, row: int) -> str:
        """Looks up an item's id.

        Args:
          row: of the item.

        Returns:
          The id, as text.
        """
        return str(self.items[self.card.items.id][int(row)].as_py())

    def item_name(self, row: int) -> str:
        """Names an item for people to read.

        Args:
          row: of the item.

        Returns:
          The item's first text attribute, or its id where that is empty.
        """
        text_columns = (a.column for a in self.item_card(row).items.attributes if a.kind == "text")
        column = next(text_columns, None)
        name = self.items[column][int(row)].as_py() if column else None
        return name if name and name.strip() else self.item_id(row)

    def event_column(self, name: str) -> pa.ChunkedArray:
        """Looks up a column of the events.

        Args:
          name: of the column; "action" is the action column, whatever its name in the file.

        Returns:
          The column [events], in the order of the events.

        Raises:
          ValueError: there is no such column. The events of a request have only the columns that the card names.
        """
        name = self.card.events.action if name == "action" else name
        if name not in self.events.column_names:
            raise ValueError(f"{self.path}: events have no column '{name}'")
        return self.events[name]


def _stated_life(table: pa.Table, available: Available | None) -> tuple[np.ndarray | None, np.ndarray | None]:
    """What a card says of the rows of a table, two int64 [rows]: None for what it does not state; an unknown beginning
    is long ago, an unknown end never."""

    def times(column: str | None, unknown: int) -> np.ndarray | None:
        if column is None:
            return None
        values = table[column].cast(pa.timestamp("us")).cast(pa.int64())
        return pc.fill_null(values, unknown).to_numpy()

    if available is None:
        return None, None
    return times(available.from_, -FOREVER), times(available.until, FOREVER)


def _pseudo_times(card: Card, members: pa.Table, items: pa.Table, events: pa.Table) -> pa.Array:
    """Times for events without any. They grow with `order`, a second a step, if there is one. Otherwise each member has
    a period of its own, in random order, so that a split of time splits members; the events in it are in random order.
    """
    if card.events.order:
        return pc.multiply(events[card.events.order].cast(pa.int64()), SECOND).cast(TIME)
    row, item = (
        pc.index_in(events[column], table[part.id].combine_chunks()).to_numpy()
        for column, table, part in ((card.events.member, members, card.members), (card.events.item, items, card.items))
    )
    member_rank = np.argsort(np.argsort(_hash_ids(members[card.members.id]), kind="stable"))
    within = np.lexsort((_hash_ids(items[card.items.id])[item], row))
    sizes = np.bincount(row, minlength=len(members))
    rank = np.empty(len(row), np.int64)
    rank[within] = np.arange(len(row)) - np.repeat(np.cumsum(sizes) - sizes, sizes)
    return pa.array((member_rank[row] * (int(sizes.max(initial=0)) + 1) + rank) * SECOND).cast(TIME)


def _hash_ids(ids: pa.ChunkedArray) -> np.ndarray:
    """uint64 hashes of ids as texts (BLAKE2b)."""
    texts = ids.cast(TEXT).to_pylist()
    digests = b"".join(hashlib.blake2b(text.encode(), digest_size=8).digest() for text in texts)
    return np.frombuffer(digests, "<u8").astype(np.uint64)


def hash_dataset(folder: Path) -> str:
    """SHA-256, in hexadecimal digits, of a dataset folder: its card and tables; of a union, those that it includes."""
    if (folder / CARD).exists() and (included := included_folders(folder)):
        hashes = {name: hash_dataset(path) for name, path in included.items()}
        return hash_json([hash_files(folder, [folder / CARD]), hashes])
    tables = (path for pattern in ("*.parquet", "*.csv", "*.csv.gz") for path in folder.rglob(pattern))
    return hash_files(folder, [folder / CARD, *tables])


def dataset_names(folder: Path) -> list[tuple[str, str]]:
    """Names a dataset, and those that it includes if it is a union.

    Args:
      folder: of the dataset.

    Returns:
      The name in the card and `hash_dataset` of each, the dataset's own first.

    Raises:
      ConfigError: a card is missing or wrong.
    """
    folders = [folder, *included_folders(folder).values()]
    return [(load_card(each).name, hash_dataset(each)) for each in folders]


def write_tables(path: Path, **tables: pa.Table) -> None:
    """Writes each of `tables` into the folder `path` as `{name}.parquet`."""
    for name, table in tables.items():
        pq.write_table(table, path / f"{name}.parquet")
