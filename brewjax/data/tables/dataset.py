"""`Dataset`: the validated tables of a company, members, items and events, with arrays that index one by another."""

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
    """Validated tables. Inside brewjax members, items and events are identified by their row, not by their id.

    Attributes:
      path: the dataset folder, for error messages.
      card: `dataset.yaml`.
      members: one row per member.
      items: one row per item.
      events: sorted by member, then time; events of one time keep the order of the file.
    """

    path: Path
    card: Card
    members: pa.Table
    items: pa.Table
    events: pa.Table

    @classmethod
    def load(cls, path: str | Path) -> Dataset:
        """Reads and validates a dataset folder.

        Raises:
          ConfigError: the card is missing or wrong.
          DatasetError: the tables do not fit the card; lists every problem.
        """
        path = Path(path)
        card = load_card(path)
        members, items, events = read_validated(path, card)
        columns = pa.table(
            {
                "member": pc.index_in(events[card.events.member], members[card.members.id].combine_chunks()),
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
        """str [events]: name of the action."""
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
        """The row of the member whose id, written as text, is `member`.

        Raises:
          ValueError: no member has this id; the message holds a few ids that exist.
        """
        ids = self.members[self.card.members.id]
        row = pc.index(ids.cast(pa.string()), member).as_py()
        if row < 0:
            known = ", ".join(f"'{known_id}'" for known_id in ids[:3].to_pylist())
            raise ValueError(f"{self.path}: no member '{member}'; ids look like {known}")
        return row

    def member_id(self, row: int) -> str:
        """The id of a member, as text."""
        return str(self.members[self.card.members.id][int(row)].as_py())

    def item_id(self, row: int) -> str:
        """The id of an item, as text."""
        return str(self.items[self.card.items.id][int(row)].as_py())

    def item_name(self, row: int) -> str:
        """A name for people to read: the item's first text attribute, or its id where that is empty."""
        text_columns = (a.column for a in self.card.items.attributes if a.kind == "text")
        column = next(text_columns, None)
        name = self.items[column][int(row)].as_py() if column else None
        return name if name and name.strip() else self.item_id(row)

    def event_column(self, name: str) -> pa.ChunkedArray:
        """An event column by name; "action" is the action column, whatever its name in the file.

        Raises:
          ValueError: there is no such column. The events of a request have only the columns that the card names.
        """
        name = self.card.events.action if name == "action" else name
        if name not in self.events.column_names:
            raise ValueError(f"{self.path}: events have no column '{name}'")
        return self.events[name]


def write_tables(path: Path, **tables: pa.Table) -> None:
    """Writes each table into the folder `path` as `{name}.parquet`."""
    for name, table in tables.items():
        pq.write_table(table, path / f"{name}.parquet")
