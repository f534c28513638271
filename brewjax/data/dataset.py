"""A company's tables: members, items and events as Parquet files, with a card that says how to speak about them."""

from __future__ import annotations

import dataclasses
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar, Literal, Self

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import pydantic

from brewjax.config import Config, ConfigError, Words, misplaced, nearest, refuse_twice

CARD = "dataset.yaml"


class Statistic(Config):
    """A number per item that grows with the events: what was known at a moment, never anything later.

    Give `count` (how many events of these actions the item had) or `mean` (their mean of an event attribute).
    """

    count: tuple[str, ...] | None = pydantic.Field(default=None, min_length=1)
    mean: Words | None = None

    @pydantic.model_validator(mode="after")
    def _exactly_one(self) -> Self:
        if (self.count is None) == (self.mean is None):
            raise ValueError("give either 'count' (a list of actions) or 'mean' (an event column)")
        refuse_twice(self.count or (), "action", "count")
        return self


class Attribute(Config):
    """One thing that is said of a member, an item or an event.

    Attributes:
      column: the Parquet column, or the attribute's name where `derive` makes its values.
      kind: text, category, list (of text), number or date.
      say: its name in the text; by default the column's, capitalised.
      percentile: a number said as its percentile, 1 to 100, among the training data.
      unit: said after a number, e.g. "years".
      max_words: a text or category longer than this is cut.
      where: said of items in the history, in questions, or both (items only).
      derive: computed from the events instead of read from a column (items only).
    """

    ALIASES: ClassVar = {"type": "kind", "field": "column", "name": "column", "key": "column", "label": "say"}

    column: Words
    kind: Literal["text", "category", "list", "number", "date"]
    display_name: str = ""
    percentile: bool = False
    unit: str = ""
    max_words: int | None = pydantic.Field(default=None, gt=0)
    where: tuple[Literal["history", "question"], ...] = pydantic.Field(("history", "question"), min_length=1)
    derive: Statistic | None = None

    @pydantic.model_validator(mode="after")
    def _options_fit_the_kind(self) -> Self:
        for option, kinds in OPTION_KINDS.items():
            if getattr(self, option) and self.kind not in kinds:
                raise misplaced(f"only for kind {' or '.join(kinds)}, and '{self.column}' is a {self.kind}", option)
        return self

    @property
    def name(self) -> str:
        return self.display_name or self.column.replace("_", " ").capitalize()


# The options of an attribute that mean something for some kinds only.
OPTION_KINDS = {
    "percentile": ("number",),
    "unit": ("number",),
    "max_words": ("text", "category"),
    "derive": ("number",),
}


class _Described(Config):
    """A table whose rows have attributes."""

    ALIASES: ClassVar = {"path": "file", "key": "id", "columns": "attributes", "fields": "attributes"}

    attributes: tuple[Attribute, ...] = ()

    @pydantic.model_validator(mode="after")
    def _attributes_differ(self) -> Self:
        refuse_twice([attribute.column for attribute in self.attributes], "column", "attributes")
        refuse_twice([attribute.name for attribute in self.attributes], "name", "attributes")
        return self


def _refuse_options_of_items(attributes: tuple[Attribute, ...]) -> None:
    for index, attribute in enumerate(attributes):
        if attribute.derive:
            raise misplaced("only items have derived attributes", "attributes", index, "derive")
        if len(attribute.where) == 1:
            raise misplaced(
                "only for attributes of items, which are in history and questions", "attributes", index, "where"
            )


class Members(_Described):
    """The members table: one row each."""

    ALIASES: ClassVar = {**_Described.ALIASES, "member_id": "id", "member": "id"}

    file: Words = "members.parquet"
    id: Words = "member_id"
    noun: Words = "member"

    @pydantic.model_validator(mode="after")
    def _no_options_of_items(self) -> Self:
        _refuse_options_of_items(self.attributes)
        return self


class Items(_Described):
    """The items table: one row each."""

    ALIASES: ClassVar = {**_Described.ALIASES, "item_id": "id", "item": "id"}

    file: Words = "items.parquet"
    id: Words = "item_id"
    noun: Words = "item"
    plural: Words = "items"
    attributes: tuple[Attribute, ...] = pydantic.Field(min_length=1)


class Action(Config):
    """How an action is said of the past: `The member {past} the following jobs`."""

    ALIASES: ClassVar = {"verb": "past", "say": "past", "text": "past"}

    past: Words


class Events(_Described):
    """The events table: who did what to which item, when (a timestamp column)."""

    ALIASES: ClassVar = {
        **_Described.ALIASES,
        "user": "member",
        "user_id": "member",
        "member_id": "member",
        "item_id": "item",
        "timestamp": "time",
        "date": "time",
        "type": "action",
    }

    file: Words = "events.parquet"
    member: Words = "member_id"
    item: Words = "item_id"
    action: Words = "action"
    time: Words = "time"
    actions: dict[str, Action] = pydantic.Field(min_length=1)

    @pydantic.field_validator("actions", mode="before")
    @classmethod
    def _words_for_each(cls, actions: Any) -> Any:
        if isinstance(actions, (list, str)):
            name = actions if isinstance(actions, str) else str(next(iter(actions), "viewed"))
            shape = f"{{{name}: {{past: has {name}}}}}"
            raise ValueError(f"expected words for each action, such as {shape}, found {actions!r}")
        return actions

    @pydantic.model_validator(mode="after")
    def _no_options_of_items(self) -> Self:
        _refuse_options_of_items(self.attributes)
        return self

    @pydantic.model_validator(mode="after")
    def _columns_differ(self) -> Self:
        used: dict[str, str] = {}
        for key in ("member", "item", "action", "time"):
            column = getattr(self, key)
            if column in used:
                raise misplaced(f"column '{column}' is the {used[column]} already; name another", key)
            used[column] = key
        return self


class Card(Config):
    """`dataset.yaml`: how to speak about the tables beside it."""

    ALIASES: ClassVar = {"license": "licence", "users": "members", "interactions": "events", "products": "items"}

    name: Words
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
        card = _load_card(path)
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


def _load_card(path: Path) -> Card:
    """The card of a dataset folder; ConfigError where that is no folder, or has none."""
    if path.is_dir() and not (path / CARD).exists():
        there = ", ".join(sorted(entry.name for entry in path.iterdir())[:10]) or "nothing"
        raise ConfigError(f"{path}: no {CARD} there, which says how to speak about the tables; there is: {there}")
    if path.exists() and not path.is_dir():
        raise ConfigError(f"{path}: a file; give the folder that holds {CARD} and its Parquet files")
    if not path.exists():
        near = (
            nearest(path.name, sorted(entry.name for entry in path.parent.iterdir())) if path.parent.is_dir() else None
        )
        hint = f"; did you mean '{path.parent / near}'?" if near else ""
        raise ConfigError(f"{path}: no such folder{hint}; a dataset is a folder with {CARD} and its Parquet files")
    return Card.load(path / CARD)


def write_tables(path: Path, **tables: pa.Table) -> None:
    """Writes `{name}.parquet` for each table into the folder."""
    for name, table in tables.items():
        pq.write_table(table, path / f"{name}.parquet")
