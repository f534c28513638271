"""A company's tables: members, items and events as Parquet files, with a card that says how to speak about them."""

from __future__ import annotations

import dataclasses
from functools import cached_property
from pathlib import Path
from typing import Literal

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import pydantic

from brewjax.config import Config

CARD = "dataset.yaml"


class Statistic(Config):
    """A number per item that grows with the events: what was known at a moment, never anything later.

    Give `count` (how many events of these actions the item had) or `mean` (their mean of an event attribute).
    """

    count: tuple[str, ...] | None = None
    mean: str | None = None

    @pydantic.model_validator(mode="after")
    def _one_of(self) -> Statistic:
        if (self.count is None) == (self.mean is None):
            raise ValueError("give either 'count' (a list of actions) or 'mean' (an event attribute)")
        return self


class Attribute(Config):
    """One thing that is said of a member, an item or an event.

    Attributes:
      column: the Parquet column, or the attribute's name where `derive` makes its values.
      kind: text, category, list (of text), number or date.
      say: its name in the text; by default the column's, capitalised.
      percentile: a number said as its percentile, 1 to 100, among the training data.
      unit: said after a number, e.g. "years".
      max_words: a text longer than this is cut.
      where: said of items in the history, in questions, or both.
      derive: computed from the events instead of read from a column (items only).
    """

    column: str
    kind: Literal["text", "category", "list", "number", "date"]
    say: str = ""
    percentile: bool = False
    unit: str = ""
    max_words: int | None = pydantic.Field(default=None, gt=0)
    where: tuple[Literal["history", "question"], ...] = ("history", "question")
    derive: Statistic | None = None

    @property
    def name(self) -> str:
        return self.say or self.column.replace("_", " ").capitalize()


class Members(Config):
    """The members table: one row each."""

    file: str = "members.parquet"
    id: str = "member_id"
    noun: str = "member"
    attributes: tuple[Attribute, ...] = ()


class Items(Config):
    """The items table: one row each."""

    file: str = "items.parquet"
    id: str = "item_id"
    noun: str = "item"
    plural: str = "items"
    attributes: tuple[Attribute, ...]


class Action(Config):
    """How an action is said of the past: `The member {past} the following jobs`."""

    past: str


class Events(Config):
    """The events table: who did what to which item, when (a timestamp column)."""

    file: str = "events.parquet"
    member: str = "member_id"
    item: str = "item_id"
    action: str = "action"
    time: str = "time"
    actions: dict[str, Action]
    attributes: tuple[Attribute, ...] = ()


class Card(Config):
    """`dataset.yaml`: how to speak about the tables beside it."""

    name: str
    licence: str = ""
    members: Members = Members()
    items: Items
    events: Events


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
        from brewjax.data.validate import read_validated

        path = Path(path)
        card = Card.load(path / CARD)
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
            raise ValueError(
                f"{self.path}: no member '{member}'; ids look like {', '.join(map(str, ids[:3].to_pylist()))}"
            )
        return found

    def item_name(self, row: int) -> str:
        """What a person calls an item: its first text attribute, or its id."""
        texts = [a.column for a in self.card.items.attributes if a.kind == "text"]
        return str(self.items[(texts or [self.card.items.id])[0]][int(row)].as_py())

    def event_column(self, name: str) -> np.ndarray:
        """An event column by name; the action column answers to "action" whatever it is called in the file.

        ValueError where there is none: a request's events have only what the card says of them.
        """
        if name == "action":
            return self.event_action
        if name not in self.events.column_names:
            raise ValueError(f"{self.path}: events have no column '{name}'")
        return self.events[name].to_numpy()


def write_tables(path: Path, **tables: pa.Table) -> None:
    """Writes `{name}.parquet` for each table into the folder."""
    for name, table in tables.items():
        pq.write_table(table, path / f"{name}.parquet")
