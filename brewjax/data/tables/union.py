"""The card of a union: a dataset that is made of others with the same members, such as a network's jobs and posts.

A union has no tables of its own. Members are joined by id; everything else is kept apart by the name of its dataset:
the action `applied` of the dataset that is included as `jobs` is `jobs.applied`, its column `salary` is `jobs.salary`.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, Self

import pydantic
import yaml
from pydantic_core import PydanticCustomError

from brewjax.config import Config, ConfigError, Words, describe, misplaced, read_text, suggest_path
from brewjax.data.tables.card import CARD, Attribute, Card, Events, Members
from brewjax.data.tables.facts import GROUPS, Fact, FactGroup, Facts

ITEM_ID, REQUEST = "item_id", "request"  # columns of a union's tables
RESERVED = ("member", "item")  # conditions begin the columns of these tables so


class UnionCard(Config):
    """`dataset.yaml` of a union of datasets with the same members; it has no tables of its own."""

    name: Words
    """The union's name, in reports and messages."""
    licence: str = ""
    """The terms of use."""
    include: dict[str, Words] = pydantic.Field(min_length=1)
    """The datasets by their names in the union: folders, as seen from the union's own. What a dataset has gets its name
    in front: actions, columns, facts and the ids of items, as in `jobs.applied`."""
    facts: Facts = Facts()
    """Numbers derived from the events of several datasets; the facts of the datasets' own cards are kept. A column of
    items without a dataset's name, as in `by: field`, is that of all datasets that have it."""

    @pydantic.field_validator("include")
    @classmethod
    def _plain_names(cls, include: dict[str, str]) -> dict[str, str]:
        for name in include:
            if not re.fullmatch(r"[a-z0-9_-]+", name) or name in RESERVED:
                message = f"'{name}': expected small letters, digits, - and _ alone; not {' or '.join(RESERVED)}"
                raise misplaced(message, name)
        return include


class UnitedCard(Card):
    """What a union's own card and those that it includes say together.

    `origins` has the same from the side of each dataset.
    """

    _union: UnionCard = pydantic.PrivateAttr()
    _cards: dict[str, Card] = pydantic.PrivateAttr()
    _origins: dict[str, Card] = pydantic.PrivateAttr()
    _facts: dict[str, Facts] = pydantic.PrivateAttr()
    _shared: tuple[Attribute, ...] = pydantic.PrivateAttr()

    @classmethod
    def of_cards(cls, union: UnionCard, cards: Mapping[str, Card]) -> Self:
        """Unites cards.

        Args:
          union: names them.
          cards: as they are in their own folders, by name.

        Returns:
          The card of the union.

        Raises:
          ConfigError: cards disagree on the members, events have no times, or a fact of the union is wrong.
        """
        for name, card in cards.items():
            if card.events.time is None:
                raise union.error("its events have no times, which put the events of a union in order", "include", name)
        members = _join_members(union, cards)
        named = {name: _with_name(name, card) for name, card in cards.items()}
        items = [a for card in named.values() for a in card.items.attributes]
        shared = tuple(_shared_attributes(union, cards, {attribute.column for attribute in items}))
        events = Events(
            request=REQUEST if any(card.events.request for card in cards.values()) else None,
            actions={key: action for card in named.values() for key, action in card.events.actions.items()},
        ).model_copy(update={"attributes": tuple(a for card in named.values() for a in card.events.attributes)})
        _check_facts(union, named, members, (*items, *shared), events)
        facts = {**_tell_apart(members, {name: card.facts for name, card in named.items()}), "": union.facts}
        names = {"id": ITEM_ID, "noun": "item", "plural": "items", "available": None}
        united = cls.model_construct(
            name=union.name,
            licence=union.licence,
            members=members,
            items=next(iter(cards.values())).items.model_copy(update={**names, "attributes": tuple(items)}),
            events=events,
            facts=_concatenate(facts.values(), facts.values()),
        )
        united._union, united._cards, united._facts, united._shared = union, dict(cards), facts, shared
        united._origins = {
            name: card.model_copy(
                update={"members": members, "facts": _concatenate(facts.values(), (facts[name], union.facts))}
            )
            for name, card in named.items()
        }
        return united

    def included(self, folder: Path) -> dict[str, tuple[Path, Card]]:
        """Lists the datasets of the union.

        Args:
          folder: of the union.

        Returns:
          The folder of each by name, and the card as it is there.
        """
        return {name: (folder / self._union.include[name], card) for name, card in self._cards.items()}

    @property
    def origins(self) -> Mapping[str, Card]:
        """See `Card.origins`."""
        return self._origins

    @property
    def shared(self) -> tuple[Attribute, ...]:
        """The attributes of items that facts of the union name without a dataset, as of all datasets that have them."""
        return self._shared

    def error(self, message: str, *location: str | int) -> ConfigError:
        """As `Config.error`, of the union's own card.

        Args:
          message: what is wrong.
          location: the keys that lead to it.

        Returns:
          The error, which names file, line and key.
        """
        return self._union.error(message, *location)

    @property
    def facts_by_origin(self) -> Mapping[str, Facts]:
        """See `Card.facts_by_origin`."""
        return self._facts

    def save(self, path: Path) -> None:
        """Writes what `load_card` reads: the union's own card, and those that it includes in folders beside it.

        Args:
          path: of the union's own card.
        """
        include = {name: name for name in self._cards}
        self._union.model_copy(update={"include": include}).save(path)
        for name, card in self._cards.items():
            (path.parent / name).mkdir(exist_ok=True)
            card.save(path.parent / name / CARD)


def load_card(folder: Path) -> Card:
    """Reads the card of a dataset folder.

    Args:
      folder: that holds `dataset.yaml` and the tables.

    Returns:
      The card, checked by itself; whether the tables fit it is not read. Of a union it is a `UnitedCard`.

    Raises:
      ConfigError: `folder` is not a folder or has no card, or the card is wrong; names file, line and key.
    """
    return parse_card(_read(folder), folder)


def parse_card(text: str, folder: Path) -> Card:
    """As `load_card`, of a text that may not be in the folder yet.

    Args:
      text: of the card.
      folder: of the dataset; a union includes others from there on.

    Returns:
      As `load_card`.

    Raises:
      ConfigError: as `load_card`.
    """
    path = str(folder / CARD)
    if not _is_union(text):
        return Card.parse(text, path)
    union, cards = UnionCard.parse(text, path), {}
    for name, included in union.include.items():
        card = _read(folder / included)
        if _is_union(card):
            raise union.error(f"{folder / included} is a union; include the datasets of it", "include", name)
        cards[name] = Card.parse(card, str(folder / included / CARD))
    return UnitedCard.of_cards(union, cards)


def included_folders(folder: Path) -> dict[str, Path]:
    """Finds the datasets of a union.

    Args:
      folder: of a dataset.

    Returns:
      Their folders by name; none if the dataset is no union.

    Raises:
      ConfigError: there is no card, or that of a union is wrong.
    """
    text = _read(folder)
    include = UnionCard.parse(text, str(folder / CARD)).include if _is_union(text) else {}
    return {name: folder / included for name, included in include.items()}


def _read(folder: Path) -> str:
    """The text of the folder's card."""
    if folder.is_dir() and not (folder / CARD).exists():
        present = ", ".join(sorted(entry.name for entry in folder.iterdir())[:10]) or "nothing"
        raise ConfigError(f"{folder}: no {CARD} there, which describes the tables; there is: {present}")
    if folder.exists() and not folder.is_dir():
        raise ConfigError(f"{folder}: a file; give the folder that holds {CARD} and its Parquet files")
    if not folder.exists():
        raise ConfigError(
            f"{folder}: no such folder{suggest_path(folder)}; a dataset is a folder with {CARD} and its Parquet files"
        )
    return read_text(folder / CARD)


def _is_union(text: str) -> bool:
    """Whether a card includes others. One that is no YAML is none: reading it says what is wrong."""
    try:
        values = yaml.safe_load(text)
    except yaml.YAMLError:
        return False
    return isinstance(values, dict) and "include" in values


def _join_members(union: UnionCard, cards: Mapping[str, Card]) -> Members:
    """The members as all cards describe them."""
    first, *further = cards
    attributes = {attribute.column: (first, attribute) for attribute in cards[first].members.attributes}
    lives = {name: card.members.available for name, card in cards.items() if card.members.available}
    for name in further:
        members = cards[name].members
        for attribute in members.attributes:
            home, known = attributes.setdefault(attribute.column, (name, attribute))
            if attribute != known:
                message = f"its card describes the members' '{attribute.column}' in another way than that of '{home}'"
                raise union.error(f"{message}; say the same in both", "include", name)
        if members.noun != cards[first].members.noun:
            nouns = f"'{members.noun}', where that of '{first}' says '{cards[first].members.noun}'"
            raise union.error(f"its card calls a member {nouns}; say the same in both", "include", name)
    for name, life in lives.items():
        if life != next(iter(lives.values())):
            message = f"its card's members.available is not that of '{next(iter(lives))}'; say the same in both"
            raise union.error(message, "include", name)
    try:
        return Members(
            id=cards[first].members.id,
            noun=cards[first].members.noun,
            available=next(iter(lives.values()), None),
            attributes=tuple(attribute for _, attribute in attributes.values()),
        )
    except pydantic.ValidationError as error:
        raise union.error(f"the members of all together: {describe(error.errors()[0])}", "include") from None


def _with_name(name: str, card: Card) -> Card:
    """The card with the name of its dataset in front of its actions, columns and facts; members stay as they are."""

    def full(word: str | None) -> str | None:
        return word and f"{name}.{word}"

    def attribute(plain: Attribute) -> Attribute:
        return plain.model_copy(update={"column": full(plain.column), "display_name": plain.name})

    def fact(group: FactGroup, plain: Fact) -> Fact:
        columns = ["mean", "neighbors", "by", "distance", "similarity", *(["age"] if group == "items" else [])]
        update: dict[str, Any] = {key: full(getattr(plain, key)) for key in columns}
        for key in ("count", "rate", "days_since", "share", "together"):
            actions = getattr(plain, key)
            update[key] = actions and tuple(map(full, actions))
        return plain.model_copy(update={**update, "name": full(plain.name), "display_name": plain.stated_name})

    items, events = card.items, card.events
    life = items.available
    return card.model_copy(
        update={
            "items": items.model_copy(
                update={
                    "id": ITEM_ID,
                    "attributes": tuple(map(attribute, items.attributes)),
                    "available": life
                    and life.model_copy(update={"from_": full(life.from_), "until": full(life.until)}),
                }
            ),
            "events": events.model_copy(
                update={
                    "request": events.request and REQUEST,
                    "actions": {f"{name}.{key}": action for key, action in events.actions.items()},
                    "attributes": tuple(map(attribute, events.attributes)),
                }
            ),
            "facts": card.facts.model_copy(
                update={group: tuple(fact(group, plain) for plain in getattr(card.facts, group)) for group in GROUPS}
            ),
        }
    )


def _shared_attributes(union: UnionCard, cards: Mapping[str, Card], known: set[str]) -> Iterator[Attribute]:
    """The attributes of items that facts of the union name without a dataset."""
    columns = [
        column
        for group, fact in union.facts.declared()
        for column in (fact.by, fact.distance, fact.age if group == "items" else None)
        if column and column not in known
    ]
    for column in dict.fromkeys(columns):
        having = {name: a for name, card in cards.items() for a in card.items.attributes if a.column == column}
        kinds = {name: attribute.kind for name, attribute in having.items()}
        if len(set(kinds.values())) > 1:
            listed = ", ".join(f"a {kind} in '{name}'" for name, kind in kinds.items())
            raise union.error(f"the items' '{column}' is {listed}; a fact of all needs one kind", "facts")
        for attribute in [*having.values()][:1]:
            yield attribute.model_copy(update={"percentile": False, "buckets": None})


def _check_facts(
    union: UnionCard, named: Mapping[str, Card], members: Members, items: tuple[Attribute, ...], events: Events
) -> None:
    """The union's own facts fit what is united, and none reads as what a dataset states already."""
    try:
        union.facts.check(members.attributes, items, events)
    except PydanticCustomError as error:
        context = error.context or {}
        raise union.error(context["message"], *context["location"]) from None
    for group in GROUPS:
        for index, fact in enumerate(getattr(union.facts, group)):
            if fact.similarity:
                message = "a union has no vectors of its own; state the fact in the card of a dataset that has"
                raise union.error(message, "facts", group, index, "similarity")
            for name, card in named.items():
                if fact.stated_name in [known.stated_name for _, known in card.facts.declared()]:
                    message = f"'{name}' has a fact '{fact.name}' already; call it something else"
                    raise union.error(message, "facts", group, index, "name")


def _tell_apart(members: Members, facts: Mapping[str, Facts]) -> dict[str, Facts]:
    """The facts of each dataset; those of members that read alike get the name of their dataset behind their own."""
    names = [attribute.name for attribute in members.attributes]
    counts = Counter([*names, *(fact.stated_name for of_dataset in facts.values() for fact in of_dataset.members)])

    def apart(name: str, fact: Fact) -> Fact:
        alike = counts[fact.stated_name] > 1
        return fact.model_copy(update={"display_name": f"{fact.stated_name} ({name})"}) if alike else fact

    return {
        name: of_dataset.model_copy(update={"members": tuple(apart(name, fact) for fact in of_dataset.members)})
        for name, of_dataset in facts.items()
    }


def _concatenate(of_members: Iterable[Facts], of_others: Iterable[Facts]) -> Facts:
    """The facts of members of some, and all other facts of others."""
    groups = {group: of_members if group == "members" else of_others for group in GROUPS}
    return Facts().model_copy(
        update={group: tuple(f for each in facts for f in getattr(each, group)) for group, facts in groups.items()}
    )
