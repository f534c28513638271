"""A company's tables: members, items and events as Parquet files, with a card that says how to speak about them."""

from __future__ import annotations

import dataclasses
from functools import cached_property
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from brewjax.data.tables.card import Card, load_card
from brewjax.data.tables.validate import read_validated


@dataclasses.dataclass(frozen=True)
class Dataset:
    """Validated tables. Members and items are known inside brewjax by their row; events by theirs in `events`.

    Attributes:
      events: sorted by member, then time (ties keep the order of the file).
    """

    path: Path
    card: Card
    members: pa.Table
    items: pa.Table
    events: pa.Table

    @classmethod
    def load(cls, path: str | Path) -> Dataset:
        """Reads and validates a dataset folder; raises DatasetError listing every problem found."""
        path = Path(path)
        card = load_card(path)
        members, items, events = read_validated(path, card)
        rows = lambda ids, table, key: pc.index_in(ids, table[key].combine_chunks())  # noqa: E731
        columns = pa.table(
            {
                "member": rows(events[card.events.member], members, card.members.id),
                "time": events[card.events.time].cast(pa.timestamp("us")).cast(pa.int64()),
                "row": pa.array(np.arange(len(events))),
            }
        )
        order = pc.sort_indices(columns, [("member", "ascending"), ("time", "ascending"), ("row", "ascending")])
        return cls(path, card, members, items, events.take(order))

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
    def event_action(self) -> np.ndarray:
        """str [events]."""
        return self.events[self.card.events.action].to_numpy()

    @cached_property
    def event_time(self) -> np.ndarray:
        """int64 [events]: microseconds since 1970, UTC."""
        return self.events[self.card.events.time].cast(pa.timestamp("us")).cast(pa.int64()).to_numpy()

    @cached_property
    def member_offsets(self) -> np.ndarray:
        """int64 [members + 1]: the events of member m are rows offsets[m] to offsets[m + 1]."""
        return np.searchsorted(self.event_member, np.arange(len(self.members) + 1))

    def member_row(self, member: str) -> int:
        """Row of the member with this id, given as text; ValueError with a few real ids where there is none."""
        ids = self.members[self.card.members.id]
        found = pc.index(ids.cast(pa.string()), member).as_py()
        if found < 0:
            known = ", ".join(f"'{known_id}'" for known_id in ids[:3].to_pylist())
            raise ValueError(f"{self.path}: no member '{member}'; ids look like {known}")
        return found

    def member_id(self, row: int) -> str:
        """The id of a member, as text."""
        return str(self.members[self.card.members.id][int(row)].as_py())

    def item_id(self, row: int) -> str:
        """The id of an item, as text."""
        return str(self.items[self.card.items.id][int(row)].as_py())

    def item_name(self, row: int) -> str:
        """What a person calls an item: its first text attribute, or its id where it has none."""
        texts = (a.column for a in self.card.items.attributes if a.kind == "text")
        column = next(texts, None)
        name = self.items[column][int(row)].as_py() if column else None
        return name if name and name.strip() else self.item_id(row)

    def event_column(self, name: str) -> pa.ChunkedArray:
        """An event column by name; the action column answers to "action" whatever it is called in the file.

        ValueError where there is none: a request's events have only what the card says of them.
        """
        name = self.card.events.action if name == "action" else name
        if name not in self.events.column_names:
            raise ValueError(f"{self.path}: events have no column '{name}'")
        return self.events[name]


def write_tables(path: Path, **tables: pa.Table) -> None:
    """Writes `{name}.parquet` for each table into the folder."""
    for name, table in tables.items():
        pq.write_table(table, path / f"{name}.parquet")
