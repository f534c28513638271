"""The declaration of facts: numbers derived from the events as of a moment, of members, items, pairs or events.

A fact is declared in the card and never code. `statistics.py` computes it: from strictly older events, by the same
function in training, evaluation and serving.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, ClassVar, Literal, Self

import pydantic

from brewjax.config import Config, Days, Words, misplaced, refuse_twice, suggest

if TYPE_CHECKING:
    from brewjax.data.tables.card import Attribute, Events

FactGroup = Literal["members", "items", "pairs", "events"]
GROUPS: tuple[FactGroup, ...] = ("members", "items", "pairs", "events")

# What a fact may be, and the groups that can have it.
KINDS: dict[str, tuple[FactGroup, ...]] = {
    "count": ("members", "items", "pairs"),
    "mean": ("members", "items", "pairs", "events"),
    "rate": ("members", "items", "pairs"),
    "days_since": ("members", "items", "pairs"),
    "age": ("members", "items"),
    "share": ("pairs",),
    "distance": ("pairs",),
    "together": ("pairs",),
    "neighbors": ("pairs",),
    "similarity": ("pairs",),
}


class Fact(Config):
    """A number that changes with the events, or with time. Exactly one of `count`, `mean`, `rate`, `days_since`, `age`,
    `share`, `distance`, `together`, `neighbors` and `similarity` says which."""

    ALIASES: ClassVar = {"average": "mean", "recency": "days_since", "since": "days_since", "neighbours": "neighbors"}

    name: Words
    """The fact's name in requests, reports and, by default, in prompts; unique within its group."""
    display_name: str = ""
    """The fact's name in prompts; by default `name`, capitalised, with spaces for underscores."""
    count: tuple[str, ...] | None = pydantic.Field(default=None, min_length=1)
    """The number of events of these actions, for instance `[applied]`."""
    mean: Words | None = None
    """The mean of a numeric event column over the events that have a value, for instance `stars`."""
    rate: tuple[str, ...] | None = pydantic.Field(default=None, min_length=1)
    """How many of the events are of these actions, for instance `[clicked]`: 0 to 1."""
    days_since: tuple[str, ...] | None = pydantic.Field(default=None, min_length=1)
    """The days since the last event of these actions."""
    age: Words | None = None
    """Of a member or an item: the days since the date in one of its attributes, for instance `released`; below 0 before
    it."""
    share: tuple[str, ...] | None = pydantic.Field(default=None, min_length=1)
    """Of a pair: the share of the member's events of these actions with items that share a value of `by`."""
    distance: Words | None = None
    """Of a pair: how far the item's number or date (in days) is from its mean over the member's events."""
    together: tuple[str, ...] | None = pydantic.Field(default=None, min_length=1)
    """Of a pair: how similar the item is to those that the member took by these actions, by the cosine of the sets of
    members who took them (Sarwar et al., WWW 2001, with binary ratings); the sum over the member's items."""
    neighbors: Words | None = None
    """Of a pair: the member's mean of an event column over similar items, less the items' means, weighted by how alike
    members rated them (item-based collaborative filtering: Sarwar et al., WWW 2001, adjusted cosine)."""
    similarity: Words | None = None
    """Of a pair: the inner product of the vectors of member and item in this file of the dataset's folder, each the
    latest at the moment, for instance `vectors.parquet`, which `brewjax retrieve vectors` writes."""
    days: Days | None = None
    """Only events of the last so many days count (`count`, `mean`, `rate` and `share`)."""
    less: Literal["items", "members"] | None = None
    """Of a mean or rate: subtracts from each value the mean of its item, or of its member, until then."""
    shrink: float = pydantic.Field(default=0, ge=0)
    """Of a mean or rate: draws it towards that of all events (towards 0 with `less`), as if by so many events more."""
    by: Words | None = None
    """Of a pair: counts the member's events with items that share a value of this attribute of the item, averaged over
    the item's values."""
    among: Words | None = None
    """Of a pair: counts the item's events of members who share a value of this attribute of the member, averaged over
    the member's values."""
    buckets: int | None = pydantic.Field(default=10, ge=2, le=1000)
    """Renders the number as one of so many buckets, each with an equal share of the training data; null: as it is."""

    @pydantic.model_validator(mode="after")
    def _options_fit(self) -> Self:
        kinds_set = [kind for kind in KINDS if getattr(self, kind) is not None]
        if len(kinds_set) != 1:
            both = f", not {' and '.join(kinds_set)}" if kinds_set else ""
            raise ValueError(f"give one of {', '.join(KINDS)}{both}")
        for option, kinds in {
            "days": ("count", "mean", "rate", "share"),
            "less": ("mean", "rate"),
            "shrink": ("mean", "rate", "neighbors"),
            "by": ("count", "mean", "rate", "share"),
            "among": ("count", "mean", "rate"),
        }.items():
            if getattr(self, option) and self.kind not in kinds:
                raise misplaced(f"only for {' or '.join(kinds)}, and '{self.name}' is a {self.kind}", option)
        if self.by and self.among:
            raise misplaced("give 'by' (the item's attribute) or 'among' (the member's), not both", "among")
        for kind in ("count", "rate", "days_since", "share", "together"):
            refuse_twice(getattr(self, kind) or (), "action", kind)
        return self

    @property
    def stated_name(self) -> str:
        """The fact's name in prompts."""
        return self.display_name or self.name.replace("_", " ").capitalize()

    @property
    def kind(self) -> str:
        """Which of KINDS the fact is."""
        return next(kind for kind in KINDS if getattr(self, kind) is not None)

    def kind_of(self, group: FactGroup) -> str:
        """What the fact is, whatever it is called: "pair_mean_by" is a mean over a pair's events by an attribute.

        Args:
          group: what the card lists the fact under.

        Returns:
          The group in the singular, the kind, and the options that are set, with underscores between them.
        """
        options = [option for option in ("less", "by", "among", "days") if getattr(self, option)]
        return "_".join([group.removesuffix("s"), self.kind, *options])

    @property
    def actions(self) -> tuple[str, ...]:
        """The actions that the fact names, keys of the card's `events.actions`; empty for a kind of fact that names
        none."""
        return self.count or self.rate or self.days_since or self.share or self.together or ()

    @property
    def column(self) -> str | None:
        """The event column whose values count; None for a kind of fact that reads no column of events."""
        return self.mean or self.neighbors


class Facts(Config):
    """The facts of a dataset, by what they are of. Prompts state those of the member in the profile, those of the item
    and of the pair in each question, and those of an event in the history."""

    members: tuple[Fact, ...] = ()
    """Facts of the member, for instance `{name: generosity, mean: stars, less: items, shrink: 5}`."""
    items: tuple[Fact, ...] = ()
    """Facts of the item, for instance `{name: popularity, count: [applied]}`."""
    pairs: tuple[Fact, ...] = ()
    """Facts of member and item together, for instance `{name: skills in common, share: [applied], by: skills}`."""
    events: tuple[Fact, ...] = ()
    """Facts of a past event, for instance `{name: surprise, mean: stars, less: items}`: the event's own value, less
    the mean of its item until then."""

    def declared(self) -> Iterator[tuple[FactGroup, Fact]]:
        """Goes through the facts of all groups.

        Yields:
          The group and the fact, in the order of `GROUPS`, then of the card.
        """
        for group in GROUPS:
            for fact in getattr(self, group):
                yield group, fact

    def check(self, members: tuple[Attribute, ...], items: tuple[Attribute, ...], events: Events) -> None:
        """Checks facts against the attributes and actions of the card.

        Args:
          members: attributes of members.
          items: attributes of items.
          events: their columns and actions.

        Raises:
          PydanticCustomError: `misplaced`, at the first fact that the tables cannot have.
        """
        names: Mapping[FactGroup, list[str]] = {
            "members": [attribute.name for attribute in members],
            "items": [attribute.name for attribute in items],
            "pairs": [attribute.name for attribute in items] + [fact.stated_name for fact in self.items],
            "events": [attribute.name for attribute in events.attributes],
        }
        for group in GROUPS:
            facts: tuple[Fact, ...] = getattr(self, group)
            for index, fact in enumerate(facts):
                location = ("facts", group, index)
                if group not in KINDS[fact.kind]:
                    groups = " and ".join(KINDS[fact.kind])
                    raise misplaced(f"only {groups} have a {fact.kind}", *location, fact.kind)
                if fact.stated_name in [*names[group], *(earlier.stated_name for earlier in facts[:index])]:
                    raise misplaced(f"the name '{fact.name}' is given twice", *location, "name")
                if group == "events" and (fact.less is None or fact.days or fact.shrink):
                    raise misplaced("a fact of an event is its own value 'less' a mean, without more", *location)
                if group in ("members", "items") and fact.less == group:
                    raise misplaced(f"less the means of {group}, the mean of {group} is nothing", *location, "less")
                if group != "pairs" and (fact.by or fact.among):
                    raise misplaced("only for facts of pairs", *location, "by" if fact.by else "among")
                if fact.kind == "share" and not fact.by:
                    raise misplaced("a share needs 'by', an attribute of the item", *location)
                if (fact.days or fact.kind == "days_since") and events.time is None:
                    raise misplaced("events without times have no days", *location)
                for option, attributes, kinds in (
                    ("by", items, ("category", "list")),
                    ("among", members, ("category", "list")),
                    ("distance", items, ("number", "date")),
                    ("age", items if group == "items" else members, ("date",)),
                ):
                    if column := getattr(fact, option):
                        _check_attribute(column, attributes, kinds, *location, option)
                for position, action in enumerate(fact.actions):
                    if action not in events.actions:
                        hint = suggest(action, events.actions)
                        raise misplaced(f"unknown action '{action}'; {hint}", *location, fact.kind, position)


def _check_attribute(
    column: str, attributes: tuple[Attribute, ...], kinds: tuple[str, ...], *location: str | int
) -> None:
    kind_by_column = {attribute.column: attribute.kind for attribute in attributes}
    if column not in kind_by_column:
        hint = suggest(column, kind_by_column, listing="attributes")
        raise misplaced(f"no attribute '{column}'; {hint}", *location)
    if kind_by_column[column] not in kinds:
        raise misplaced(f"'{column}' is a {kind_by_column[column]}; expected a {' or a '.join(kinds)}", *location)
