"""TODO."""

from __future__ import annotations

from pathlib import Path
from typing import Any, ClassVar, Literal, Self

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
      say: its name in the text; by default the column's, capitalised.
    """

    ALIASES: ClassVar = {
        "type": "kind",
        "field": "column",
        "name": "column",
        "key": "column",
        "label": "display_name",
        "say": "display_name",
    }

    column: Words
    """The Parquet column, or the attribute's name where `derive` makes its values."""
    kind: Literal["text", "category", "list", "number", "date"]
    """Text, category, list (of text), number or date."""
    display_name: str = ""
    percentile: bool = False
    """A number said as its percentile, 1 to 100, among the training data."""
    unit: str = ""
    """Said after a number, e.g. "years"."""
    max_words: int | None = pydantic.Field(default=None, gt=0)
    """A text or category longer than this is cut."""
    where: tuple[Literal["history", "question"], ...] = pydantic.Field(("history", "question"), min_length=1)
    """Said of items in the history, in questions, or both (items only)."""
    derive: Statistic | None = None
    """Computed from the events instead of read from a column (items only)."""

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


def load_card(path: Path) -> Card:
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
