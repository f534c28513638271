"""Renders the rows of one table: their attributes, and the facts that are derived from the events."""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from typing import Any, Literal, NamedTuple

import numpy as np
import pyarrow as pa

from brewjax.data.prompts.numbers import ages, format_number
from brewjax.data.prompts.styles import Style, code
from brewjax.data.tables.card import Attribute, Card
from brewjax.data.tables.dataset import Dataset
from brewjax.data.tables.facts import Fact, FactGroup
from brewjax.data.tables.scales import Scales
from brewjax.data.tables.statistics import FactSource, Table

Where = Literal["history", "question"]
TENTHS = 10  # of styles that name numbers by kind
TEXTUAL = ("text", "category", "list")  # kinds of attributes that can be truncated
TAKE = 100  # rows of a column that are read in the time of one `take`
CACHED_ROWS = 1 << 17  # whose texts are kept, for each style and place


@dataclasses.dataclass(frozen=True)
class StatedFact:
    """A fact, as an attribute that prompts state; `kind` is its name in styles that name numbers by kind."""

    group: FactGroup
    fact: Fact
    attribute: Attribute
    kind: str

    @property
    def key(self) -> str:
        """Of the fact's scale, and of its numbers where they were computed before."""
        return f"{self.group}.{self.fact.name}"

    @classmethod
    def of(cls, group: FactGroup, fact: Fact) -> StatedFact:
        """The fact as a number under its name in prompts."""
        name = fact.stated_name
        attribute = Attribute(
            column=fact.name, kind="number", display_name=name, buckets=fact.buckets, where=("question",)
        )
        return cls(group, fact, attribute, fact.kind_of(group))


@dataclasses.dataclass(frozen=True)
class RowsAsOf:
    """Rows of a table to render, each as of a time.

    Attributes:
      rows: int [rows], of the table.
      times: int64 [rows], microseconds since 1970 as of which ages and facts are computed.
      members: int [rows], rows of the members table, for facts of pairs; None leaves these facts out.
      facts: the numbers of all facts by key, float64 [rows] each; None where they are yet to be computed.
    """

    rows: np.ndarray
    times: np.ndarray
    members: np.ndarray | None = None
    facts: Mapping[str, np.ndarray] | None = None

    def select(self, indices: np.ndarray) -> RowsAsOf:
        """Some of the rows, by `indices`: int positions."""
        members = None if self.members is None else self.members[indices]
        facts = None if self.facts is None else {key: numbers[indices] for key, numbers in self.facts.items()}
        return RowsAsOf(self.rows[indices], self.times[indices], members, facts)


class _Stated(NamedTuple):
    """What prompts state of a row."""

    attributes: tuple[Attribute, ...]
    facts: list[StatedFact]


class RowRenderer:
    """Renders the attributes and facts of the rows of one table; in a union, of each row those of its dataset.

    Args:
      dataset: the tables.
      table: which of them.
      scales: fitted to training data.
      source: where facts come from.
      clean: makes a text of a table safe in a prompt.
      kinds: the kinds of numbers that are stated in styles that name them by kind; by default all.
    """

    def __init__(
        self,
        dataset: Dataset,
        table: Table,
        scales: Scales,
        source: FactSource,
        clean: Callable[[str], str],
        kinds: Collection[str] | None = None,
    ):
        self._table, self._scales, self._source, self._clean = table, scales, source, clean
        self._kinds = kinds
        self._has_times = dataset.card.events.time is not None
        groups: dict[Table, tuple[FactGroup, ...]] = {
            "members": ("members",), "items": ("items", "pairs"), "events": ("events",)
        }  # fmt: skip
        cards = [dataset.card] if table == "members" else [*dataset.card.origins.values()]
        self._stated = [
            _Stated(
                getattr(card, table).attributes,
                [StatedFact.of(group, fact) for group in groups[table] for fact in getattr(card.facts, group)],
            )
            for card in cards
        ]
        self._origin: np.ndarray | None = None  # of each row, its place in `_stated`, if there are several
        if len(cards) > 1:
            self._origin = dataset.item_origin if table == "items" else dataset.event_origin
        data: pa.Table = getattr(dataset, table)
        attributes = [attribute for stated in self._stated for attribute in stated.attributes]
        self._columns = {a.column: data[a.column] for a in attributes}
        # By style and place, the texts of rows' attributes that no time changes: prompts repeat the same items.
        self._texts: dict[tuple[Style, Where], dict[int, list[str]]] = {}
        self._lists: dict[str, list[Any]] = {}  # of columns, where rows were read so often that a list is cheaper
        self._spent = dict.fromkeys(self._columns, 0)  # on reading rows one by one, in rows of a whole column

    def render(
        self,
        rows: RowsAsOf,
        style: Style,
        where: Where,
        longest: int | None = None,
        columns: Sequence[str] | None = None,
    ) -> list[list[str]]:
        """The facts of each row, as texts.

        Unknown values are left out, or empty in a style in which the position of a value stands for its name.

        Args:
          longest: characters that texts are truncated to.
          columns: only these attributes, and no facts; by default all.
        """
        by_row: list[list[str]] = [[] for _ in rows.rows]
        for index, stated in enumerate(self._stated):
            if self._origin is None:
                self._render_alike(by_row, stated, rows, style, where, longest, columns)
            elif len(alike := np.flatnonzero(self._origin[rows.rows] == index)):
                texts = [by_row[row] for row in alike]
                self._render_alike(texts, stated, rows.select(alike), style, where, longest, columns)
        return by_row

    def _render_alike(
        self,
        by_row: list[list[str]],
        stated: _Stated,
        rows: RowsAsOf,
        style: Style,
        where: Where,
        longest: int | None,
        columns: Sequence[str] | None,
    ) -> None:
        """Appends what is stated of each of `rows` to the texts of `by_row`; for the other arguments see `render`."""
        shown = [
            attribute
            for attribute in stated.attributes
            if where in attribute.where
            and (columns is None or attribute.column in columns)
            and _is_stated(attribute, style, where)
        ]
        # Events are rendered once, and so are texts of a length, or of some columns.
        is_repeated = self._table != "events" and longest is None and columns is None
        if is_repeated and all(attribute.kind != "date" for attribute in shown):
            for texts, attribute_texts in zip(by_row, self._static_texts(shown, rows, style, where), strict=True):
                texts += attribute_texts
        else:
            self._render_attributes(by_row, shown, rows, style, longest)
        if columns is None and (where == "question" or self._table == "events"):
            for number in stated.facts:
                stated_here = number.fact.buckets or not style.buckets_only
                if stated_here and (number.group != "pairs" or rows.members is not None):
                    values = self.fact_values(number, rows)
                    self._render(by_row, number.key, number.attribute, number.kind, values, rows, style, longest)

    def _static_texts(
        self, shown: Sequence[Attribute], rows: RowsAsOf, style: Style, where: Where
    ) -> Iterator[list[str]]:
        """Yields the texts of the attributes of each row, from what was rendered before."""
        cache = self._texts.setdefault((style, where), {})
        row_numbers = rows.rows.tolist()
        missing = [row for row in dict.fromkeys(row_numbers) if row not in cache]
        if len(cache) + len(missing) > CACHED_ROWS:
            self._texts[style, where] = cache = {}  # replaced, not cleared: a concurrent call may be reading it
            missing = list(dict.fromkeys(row_numbers))
        if missing:
            by_row: list[list[str]] = [[] for _ in missing]
            missing_rows = RowsAsOf(np.array(missing), np.zeros(len(missing), np.int64))
            self._render_attributes(by_row, shown, missing_rows, style, None)
            cache.update(zip(missing, by_row, strict=True))
        return (cache[row] for row in row_numbers)

    def _render_attributes(
        self, by_row: list[list[str]], shown: Sequence[Attribute], rows: RowsAsOf, style: Style, longest: int | None
    ) -> None:
        """Appends the texts of some attributes of each of `rows` to the texts of `by_row`."""
        for attribute in shown:
            values, kind = self.values(attribute, rows.rows), attribute_kind(self._table)
            self._render(by_row, f"{self._table}.{attribute.column}", attribute, kind, values, rows, style, longest)

    def stated_of(self, row: int) -> tuple[tuple[Attribute, ...], list[StatedFact]]:
        """The attributes and facts that a row can have, in the order of prompts."""
        return self._stated[0 if self._origin is None else self._origin[row]]

    def values(self, attribute: Attribute, rows: np.ndarray) -> list[Any]:
        """The value of an attribute of each row (int [rows])."""
        column, name = self._columns[attribute.column], attribute.column
        if name not in self._lists:
            # A request reads a few rows of a large table. Whoever reads many is faster with a list.
            self._spent[name] += len(rows) + TAKE
            if self._spent[name] < len(column):
                return _read_values(column.take(pa.array(rows)), attribute.kind)
            self._lists[name] = _read_values(column, attribute.kind)
        values = self._lists[name]
        return [values[row] for row in rows]

    def all_facts(self, rows: RowsAsOf) -> dict[str, np.ndarray]:
        """Computes the facts of many rows at once, which is several times as fast as of a few at a time.

        Args:
          rows: with members, unless they are members.

        Returns:
          By key, float64 [rows]: the number of each row's fact, NaN where it is unknown or where its row has none.
        """
        numbers: dict[str, np.ndarray] = {}
        for index, stated in enumerate(self._stated):
            alike = np.arange(len(rows.rows))
            if self._origin is not None:
                alike = np.flatnonzero(self._origin[rows.rows] == index)
            rows_alike = rows.select(alike)
            for fact in stated.facts:
                of_fact = numbers.setdefault(fact.key, np.full(len(rows.rows), np.nan))
                of_fact[alike] = self.fact_values(fact, rows_alike)
        return numbers

    def fact_values(self, stated: StatedFact, rows: RowsAsOf) -> np.ndarray:
        """float64 [rows]: the number of a fact of each row, NaN where it is unknown."""
        if rows.facts is not None:
            return rows.facts[stated.key]
        if self._table == "events":
            return self._source.event_values(stated.fact, rows.rows)
        members = rows.rows if self._table == "members" else rows.members
        items = rows.rows if self._table == "items" else np.zeros(len(rows.rows), np.int64)
        if members is None:
            members = np.zeros(len(rows.rows), np.int64)
        return self._source.values(stated.group, stated.fact, members, items, rows.times)

    def longest(self, row: int, time: int, style: Style) -> str:
        """The column whose text is the longest of a row."""
        sizes = {}
        for attribute in self.stated_of(row)[0]:
            if "question" in attribute.where:
                (value,) = self.values(attribute, np.array([row]))
                key = f"{self._table}.{attribute.column}"
                sizes[attribute.column] = len(self._render_value(key, attribute, value, time, style))
        return max(sizes, key=sizes.__getitem__, default="instruction")

    def _render(
        self,
        by_row: list[list[str]],
        key: str,
        attribute: Attribute,
        kind: str,
        values: Sequence[Any] | np.ndarray,
        rows: RowsAsOf,
        style: Style,
        longest: int | None,
    ) -> None:
        """Appends a value of each row to the row's texts."""
        named = "{name}" in style.fact
        num_buckets = attribute.num_buckets
        if style.by_kind and self._kinds is not None and kind not in self._kinds:
            return
        if num_buckets:
            template = (style.percentile if num_buckets == 100 else style.bucket).replace("{buckets}", str(num_buckets))
            name = kind if style.by_kind else attribute.name if named else code(attribute.name)
            numbers = values
            if not isinstance(numbers, np.ndarray):
                numbers = np.array([np.nan if value is None else value for value in values], np.float64)
            known = np.flatnonzero(~np.isnan(numbers))
            for row, bucket in zip(known.tolist(), self._scales.buckets(key, numbers[known]).tolist(), strict=True):
                tenth = -(-bucket * TENTHS // num_buckets)
                by_row[row].append(template.format(name=name, bucket=tenth if style.by_kind else bucket))
            return
        if attribute.kind == "id":
            for texts, value in zip(by_row, values, strict=True):
                if value is not None:
                    number = self._scales.number(key, value)
                    texts.append(style.bucket.format(name=code(attribute.name), bucket=number))
            return
        plain = values.tolist() if isinstance(values, np.ndarray) else values
        for texts, value, time in zip(by_row, plain, rows.times.tolist(), strict=True):
            text = self._render_value(key, attribute, value, time, style)
            if attribute.kind in TEXTUAL:
                text = text[:longest].rstrip()
            if text or not named:
                texts.append(style.fact.format(name=attribute.name, value=text))

    def _render_value(self, key: str, attribute: Attribute, value: Any, time: int, style: Style) -> str:
        if is_unknown(value):
            return ""
        if attribute.kind == "number":
            if attribute.num_buckets:
                return str(self._scales.bucket(key, value))
            number = format_number(value)
            return f"{number} {attribute.unit}".strip() if not style.short else number
        if attribute.kind == "date":
            if not self._has_times:  # there is no moment to count from
                return str(np.datetime64(int(value), "us").astype("M8[D]"))
            elapsed = time - value
            (age,) = render_ages(np.array([abs(elapsed)]), style)
            if elapsed < 0:
                return f"in {age}"
            return age + ("" if style.short else " ago")
        if attribute.kind == "list":
            return ("," if style.short else ", ").join(text for entry in value if (text := self._clean(str(entry))))
        text = self._clean(str(value))
        return " ".join(text.split(" ")[: attribute.max_words]) if attribute.max_words else text


def _is_stated(attribute: Attribute, style: Style, where: Where) -> bool:
    if attribute.kind == "id":
        return style.ids
    if style.ids and attribute.kind in ("category", "list"):
        return where == "question"  # an event of the history is two tokens
    return bool(attribute.num_buckets) or not style.buckets_only


def attribute_kind(table: Table) -> str:
    """What styles that name numbers by kind call an attribute."""
    return f"{table.removesuffix('s')}_number"


def stated_kinds(card: Card) -> set[str]:
    """Finds the kinds of numbers that prompts state in styles that name them by kind.

    Args:
      card: of the dataset.

    Returns:
      Names such as "pair_mean_by" and "item_rate".
    """
    tables: tuple[Table, ...] = ("members", "items", "events")
    bucketed = (table for table in tables if any(a.num_buckets for a in getattr(card, table).attributes))
    facts = (stated for side in card.origins.values() for stated in side.facts.declared())
    return {attribute_kind(table) for table in bucketed} | {fact.kind_of(group) for group, fact in facts}


def is_unknown(value: Any) -> bool:
    """Whether an attribute has no value: null, an empty list, or NaN."""
    return value is None or value == [] or (isinstance(value, float) and math.isnan(value))


def render_ages(microseconds: np.ndarray, style: Style) -> list[str]:
    """Spans of time (int64) in words, for instance "2 days", or "2d" in a short style."""
    return [_render_span(count, unit, style.short) for count, unit in ages(microseconds)]


@functools.lru_cache(maxsize=1 << 14)
def _render_span(count: int, unit: str, short: bool) -> str:
    if short:
        return f"{count}{'mo' if unit == 'month' else unit[0]}"
    return f"{count} {unit}{'' if count == 1 else 's'}"


def _read_values(column: pa.ChunkedArray, kind: str) -> list[Any]:
    """The values of a column; dates as microseconds since 1970."""
    return (column.cast(pa.timestamp("us")).cast(pa.int64()) if kind == "date" else column).to_pylist()
