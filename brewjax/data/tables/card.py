"""The card of a dataset, `dataset.yaml`: which files and columns the tables have, and in which words they are rendered.

The card is what a company writes instead of code. Everything that can be wrong with it alone is refused here; what does
not fit the tables is found by `validate`. Facts, which are derived from the events, have a file of their own.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar, Literal, Self

import pydantic

from brewjax.config import Config, Words, misplaced, refuse_twice, suggest
from brewjax.data.tables.facts import Facts

CARD = "dataset.yaml"


class Attribute(Config):
    """One fact that prompts state about a member, an item or an event."""

    ALIASES: ClassVar = {
        "type": "kind",
        "field": "column",
        "name": "column",
        "key": "column",
        "label": "display_name",
        "say": "display_name",
    }

    column: Words
    """The column of the table."""
    kind: Literal["text", "category", "list", "number", "date", "id"]
    """How values are read and rendered: a text, a category, a list of texts, a number, a date, or an id, which is a
    token of its own, "film#12", in the style `ids`, and nothing in others."""
    display_name: str = ""
    """The attribute's name in prompts; by default the column's name, capitalised, with spaces for underscores."""
    percentile: bool = False
    """Whether a number is rendered as its percentile, 1 to 100, among the training data."""
    buckets: int | None = pydantic.Field(default=None, ge=2, le=1000)
    """Renders a number as one of so many buckets, each with an equal share of the training data."""
    vocabulary: int | None = pydantic.Field(default=None, ge=1)
    """How many ids have a number of their own, by default 10,000: those with the most events in training; every other
    is number 0, new ones as well."""
    unit: str = ""
    """Rendered after a number, for instance "years"."""
    max_words: int | None = pydantic.Field(default=None, gt=0)
    """A text or category of more words is truncated to this many."""
    where: tuple[Literal["history", "question"], ...] = pydantic.Field(("history", "question"), min_length=1)
    """Whether items have the attribute in the history, in questions, or in both (items only)."""

    @pydantic.model_validator(mode="after")
    def _options_fit_the_kind(self) -> Self:
        for option, kinds in OPTION_KINDS.items():
            if getattr(self, option) and self.kind not in kinds:
                raise misplaced(f"only for kind {' or '.join(kinds)}, and '{self.column}' is a {self.kind}", option)
        if self.percentile and self.buckets:
            raise misplaced("give 'percentile' (which is 100 buckets) or 'buckets', not both", "buckets")
        return self

    @property
    def num_buckets(self) -> int | None:
        """How many buckets a number is rendered in, 100 for percentiles; None if it is rendered as it is."""
        return 100 if self.percentile else self.buckets

    @property
    def name(self) -> str:
        """The attribute's name in prompts, features and reports."""
        return self.display_name or self.column.replace("_", " ").capitalize()


# Options of an attribute that only some kinds have.
OPTION_KINDS = {
    "percentile": ("number",),
    "buckets": ("number",),
    "vocabulary": ("id",),
    "unit": ("number",),
    "max_words": ("text", "category"),
}


class _Described(Config):
    """A table whose rows have attributes."""

    ALIASES: ClassVar = {"path": "file", "key": "id", "columns": "attributes", "fields": "attributes"}

    attributes: tuple[Attribute, ...] = ()
    """The facts that prompts state about each row, in this order."""

    @pydantic.model_validator(mode="after")
    def _attributes_differ(self) -> Self:
        refuse_twice([attribute.column for attribute in self.attributes], "column", "attributes")
        refuse_twice([attribute.name for attribute in self.attributes], "name", "attributes")
        return self


def _refuse_options_of_items(attributes: tuple[Attribute, ...]) -> None:
    for index, attribute in enumerate(attributes):
        if len(attribute.where) == 1:
            raise misplaced(
                "only for attributes of items, which are in history and questions", "attributes", index, "where"
            )


class Available(Config):
    """The life of an item or member: it is asked about only within it."""

    ALIASES: ClassVar = {"since": "from", "start": "from", "end": "until", "to": "until"}

    from_: Words | None = pydantic.Field(default=None, alias="from")
    """Date column with the time from which the row exists; null: from its first event on."""
    until: Words | None = None
    """Date column with the time at which the row ceases to exist; null: never."""

    @pydantic.model_validator(mode="after")
    def _something_given(self) -> Self:
        if self.from_ is None and self.until is None:
            raise ValueError("give 'from', 'until' or both: date columns of the table")
        return self


class Members(_Described):
    """The members table: one row per member."""

    ALIASES: ClassVar = {**_Described.ALIASES, "member_id": "id", "member": "id"}

    file: Words = "members.parquet"
    """Parquet file of the members, or a folder of such files, within the dataset folder."""
    id: Words = "member_id"
    """Column with each member's unique id."""
    noun: Words = "member"
    """What prompts call a member, for instance "user"."""
    available: Available | None = None
    """Date columns between which a member can be asked about; by default always."""

    @pydantic.model_validator(mode="after")
    def _no_options_of_items(self) -> Self:
        _refuse_options_of_items(self.attributes)
        return self


class Items(_Described):
    """The items table: one row per item."""

    ALIASES: ClassVar = {**_Described.ALIASES, "item_id": "id", "item": "id"}

    file: Words = "items.parquet"
    """Parquet file of the items, or a folder of such files, within the dataset folder."""
    id: Words = "item_id"
    """Column with each item's unique id."""
    noun: Words = "item"
    """What prompts call an item, for instance "job"."""
    plural: Words = "items"
    """What prompts call several items, for instance "jobs"."""
    available: Available | None = None
    """Date columns between which an item exists: negatives, candidates and rankings hold no other. By default an item
    exists from its first event on."""
    attributes: tuple[Attribute, ...] = pydantic.Field(min_length=1)
    """The facts that prompts state about each item, in this order; at least one."""


class Action(Config):
    """The words for one action."""

    ALIASES: ClassVar = {"verb": "past", "say": "past", "text": "past"}

    past: Words
    """The action in the past tense, as in `The member {past} the following jobs`: "has applied to"."""


class Events(_Described):
    """The events table: one row per action of a member on an item at a time."""

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
    """Parquet or CSV file of the events, or a folder of such files, within the dataset folder."""
    files: dict[str, Words] | None = pydantic.Field(default=None, min_length=1)
    """In place of `file`: a file for each action, whose rows are all of that action; there is no `action` column."""
    member: Words = "member_id"
    """Column with the id of the member who acted."""
    item: Words = "item_id"
    """Column with the id of the item that was acted on."""
    action: Words = "action"
    """Column with the name of the action, one of `actions`."""
    time: Words | None = "time"
    """Timestamp column with the time of the event; null where the events have none."""
    order: Words | None = None
    """In place of `time`: column of whole numbers that grow with the events of a member and of an item. Without both,
    events have no order: members are split instead of time, and history is what else a member did."""
    request: Words | None = None
    """Column with the id of the list that an event belongs to (an impression, a search, a choice set)."""
    actions: dict[str, Action] = pydantic.Field(min_length=1)
    """Every action that the table may hold, by name, with its words."""

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
        if self.time and self.order and "time" not in self.model_fields_set:
            self.__dict__["time"] = None
        if self.time and self.order:
            raise misplaced("give 'time' or 'order', not both", "order")
        for name in self.files or ():
            if name not in self.actions:
                hint = suggest(name, self.actions, listing="actions")
                raise misplaced(f"no action '{name}' under 'actions'; {hint}", "files", name)
        used: dict[str, str] = {}
        for key in ("member", "item", "action", "time", "order", "request"):
            column = getattr(self, key)
            if column is None:
                continue
            if column in used:
                raise misplaced(f"column '{column}' is the {used[column]} already; name another", key)
            used[column] = key
        return self


class Card(Config):
    """`dataset.yaml`: what the tables in the same folder hold, and how prompts describe it."""

    ALIASES: ClassVar = {"license": "licence", "users": "members", "interactions": "events", "products": "items"}

    name: Words
    """The dataset's name, in reports and messages."""
    licence: str = ""
    """The terms of use, which `brewjax data fetch` prints."""
    members: Members = Members()
    """The members table and its attributes."""
    items: Items
    """The items table and its attributes."""
    events: Events
    """The events table, its columns, actions and attributes."""
    facts: Facts = Facts()
    """Numbers derived from the events, as of a moment, that prompts state; `brewjax data facts` proposes them."""

    @pydantic.model_validator(mode="after")
    def _facts_fit(self) -> Self:
        self.facts.check(self.members.attributes, self.items.attributes, self.events)
        return self

    @property
    def origins(self) -> Mapping[str, Card]:
        """The card from the side of each dataset of a union, by its name: with its items and actions, the facts of its
        items, and all members with all their facts. A card that is no union's has itself, as ""."""
        return {"": self}

    @property
    def facts_by_origin(self) -> Mapping[str, Facts]:
        """The facts that each dataset of a union has, by its name, and as "" those of the union itself; of a card that
        is no union's all facts, as ""."""
        return {"": self.facts}

    def differing_part(self, card: Card) -> str:
        """Compares cards by what they say of the tables; names and licences do not matter.

        Args:
          card: another one.

        Returns:
          The first part that differs, such as "items"; empty if none does.
        """
        if [*self.origins] != [*card.origins]:
            return "include"
        pairs = [(self, card), *zip(self.origins.values(), card.origins.values(), strict=True)]
        parts = ("members", "items", "events", "facts")
        return next((part for part in parts if any(getattr(a, part) != getattr(b, part) for a, b in pairs)), "")

    def origin_of(self, action: str) -> str:
        """Looks up which dataset of a union has an action.

        Args:
          action: a key of `events.actions`.

        Returns:
          A key of `origins`.
        """
        return next(name for name, card in self.origins.items() if action in card.events.actions)

    def side_of(self, action: str) -> Card:
        """The card from the side of the dataset that has an action, see `origins`."""
        return self.origins[self.origin_of(action)]
