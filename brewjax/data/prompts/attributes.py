"""Renders the rows of one table: their attributes, and the facts that are derived from the events."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Collection, Iterable, Sequence
from typing import Any, Literal

import numpy as np
import pyarrow as pa

from brewjax.data.prompts.numbers import age, format_number
from brewjax.data.prompts.styles import Style, code
from brewjax.data.tables.card import Attribute, Card
from brewjax.data.tables.dataset import Dataset
from brewjax.data.tables.facts import Fact, FactGroup
from brewjax.data.tables.statistics import FactSource, Percentiles, Table
from brewjax.data.tasks.target import target_sign
from brewjax.data.tasks.task import Task

Where = Literal["history", "question"]
TENTHS = 10  # of styles that name numbers by kind,
TARGET = "_target"  # and what they add to the name of a fact that is of what the task asks for
TEXTUAL = ("text", "category", "list")  # kinds of attributes that can be truncated
TAKE = 100  # rows of a column that are read in the time of one `take`


@dataclasses.dataclass(frozen=True)
class StatedFact:
    """A fact, as an attribute that prompts state; `kind` is its name in styles that name numbers by kind."""

    group: FactGroup
    fact: Fact
    attribute: Attribute
    kind: str

    @classmethod
    def of(cls, group: FactGroup, fact: Fact) -> StatedFact:
        """The fact as a number under its name, capitalised."""
        attribute = Attribute(column=fact.name, kind="number", buckets=fact.buckets, where=("question",))
        return cls(group, fact, attribute, fact.kind_of(group))


@dataclasses.dataclass(frozen=True)
class RowsAsOf:
    """Rows of a table to render, each as of a time.

    Attributes:
      rows: int [rows], of the table.
      times: int64 [rows], microseconds since 1970 as of which ages and facts are computed.
      members: int [rows], rows of the members table, for facts of pairs; None leaves these facts out.
      omitted_facts: other facts that are left out, such as "pairs.genre stars".
    """

    rows: np.ndarray
    times: np.ndarray
    members: np.ndarray | None = None
    omitted_facts: Collection[str] = ()


class RowRenderer:
    """Renders the attributes and facts of the rows of one table.

    Args:
      dataset: the tables.
      table: which of them.
      percentiles: scales fitted on training data.
      source: where facts come from.
      clean: makes a text of a table safe in a prompt.
      kinds: the kinds of numbers that are stated in styles that name them by kind; by default all.
    """

    def __init__(
        self,
        dataset: Dataset,
        table: Table,
        percentiles: Percentiles,
        source: FactSource,
        clean: Callable[[str], str],
        kinds: Collection[str] | None = None,
    ):
        self._table, self._percentiles, self._source, self._clean = table, percentiles, source, clean
        self._kinds = kinds
        self._has_times = dataset.card.events.time is not None
        self.attributes: tuple[Attribute, ...] = getattr(dataset.card, table).attributes
        data: pa.Table = getattr(dataset, table)
        self._columns = {a.column: data[a.column] for a in self.attributes}
        self._lists: dict[str, list[Any]] = {}  # of columns, where rows were read so often that a list is cheaper
        self._spent = dict.fromkeys(self._columns, 0)  # on reading rows one by one, in rows of a whole column
        groups: dict[Table, tuple[FactGroup, ...]] = {
            "members": ("members",), "items": ("items", "pairs"), "events": ("events",)
        }  # fmt: skip
        facts = dataset.card.facts
        self.facts = [StatedFact.of(group, fact) for group in groups[table] for fact in getattr(facts, group)]

    def render(
        self,
        rows: RowsAsOf,
        style: Style,
        where: Where,
        longest: int | None = None,
        columns: Sequence[str] | None = None,
        task: Task | None = None,
    ) -> list[list[str]]:
        """The facts of each row, as texts.

        Unknown values are left out, or empty in a style in which the position of a value stands for its name.

        Args:
          task: whose prompt it is, for styles that say which facts are of what a task asks for.
          longest: characters that texts are truncated to.
          columns: only these attributes, and no facts; by default all.
        """
        by_row: list[list[str]] = [[] for _ in rows.rows]
        for attribute in self.attributes:
            shown = where in attribute.where and (columns is None or attribute.column in columns)
            if shown and (attribute.num_buckets or not style.buckets_only):
                values, kind = self.values(attribute, rows.rows), attribute_kind(self._table)
                self._render(by_row, f"{self._table}.{attribute.column}", attribute, kind, values, rows, style, longest)
        if columns is None and (where == "question" or self._table == "events"):
            for stated in self.facts:
                key = f"{stated.group}.{stated.fact.name}"
                stated_here = (stated.fact.buckets or not style.buckets_only) and key not in rows.omitted_facts
                if stated_here and (stated.group != "pairs" or rows.members is not None):
                    numbers = self.fact_values(stated, rows)
                    sign = target_sign(task, stated.fact) if task and style.marks_target else 0
                    kind = stated.kind + TARGET if sign else stated.kind
                    self._render(by_row, key, stated.attribute, kind, numbers, rows, style, longest, sign < 0)
        return by_row

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

    def fact_values(self, stated: StatedFact, rows: RowsAsOf) -> list[float]:
        """The number of a fact of each row, NaN where it is unknown."""
        if self._table == "events":
            return self._source.event_values(stated.fact, rows.rows).tolist()
        members = rows.rows if self._table == "members" else rows.members
        items = rows.rows if self._table == "items" else np.zeros(len(rows.rows), np.int64)
        if members is None:
            members = np.zeros(len(rows.rows), np.int64)
        return self._source.values(stated.group, stated.fact, members, items, rows.times).tolist()

    def longest(self, row: int, time: int, style: Style) -> str:
        """The column whose text is the longest of a row."""
        sizes = {}
        for attribute in self.attributes:
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
        values: Sequence[Any],
        rows: RowsAsOf,
        style: Style,
        longest: int | None,
        from_above: bool = False,
    ) -> None:
        """Appends a value of each row to the row's texts; `from_above`: tenths by kind are counted down."""
        named = "{name}" in style.fact
        num_buckets = attribute.num_buckets
        if style.by_kind and self._kinds is not None and kind not in self._kinds:
            return
        if num_buckets:
            template = (style.percentile if num_buckets == 100 else style.bucket).replace("{buckets}", str(num_buckets))
            name = kind if style.by_kind else attribute.name if named else code(attribute.name)
            numbers = np.array([np.nan if value is None else value for value in values], np.float64)
            known = np.flatnonzero(~np.isnan(numbers))
            for row, bucket in zip(
                known.tolist(), self._percentiles.buckets(key, numbers[known]).tolist(), strict=True
            ):
                tenth = -(-bucket * TENTHS // num_buckets)
                tenth = 1 + TENTHS - tenth if from_above else tenth
                by_row[row].append(template.format(name=name, bucket=tenth if style.by_kind else bucket))
            return
        for texts, value, time in zip(by_row, values, rows.times.tolist(), strict=True):
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
                return str(self._percentiles.bucket(key, value))
            number = format_number(value)
            return f"{number} {attribute.unit}".strip() if not style.short else number
        if attribute.kind == "date":
            if not self._has_times:  # there is no moment to count from
                return str(np.datetime64(int(value), "us").astype("M8[D]"))
            elapsed = time - value
            if elapsed < 0:
                return f"in {render_age(-elapsed, style)}"
            return render_age(elapsed, style) + ("" if style.short else " ago")
        if attribute.kind == "list":
            return ("," if style.short else ", ").join(text for entry in value if (text := self._clean(str(entry))))
        text = self._clean(str(value))
        return " ".join(text.split(" ")[: attribute.max_words]) if attribute.max_words else text


def attribute_kind(table: Table) -> str:
    """What styles that name numbers by kind call an attribute."""
    return f"{table.removesuffix('s')}_number"


def stated_kinds(card: Card, tasks: Sequence[Task], styles: Iterable[Style]) -> set[str]:
    """Finds the kinds of numbers that prompts state.

    Args:
      card: of the dataset.
      tasks: asked of it.
      styles: of the prompts; those that do not name numbers by kind have none.

    Returns:
      Names such as "pair_mean_by" and "item_rate_target".
    """
    kinds = set()
    tables: tuple[Table, ...] = ("members", "items", "events")
    for style in styles:
        if style.by_kind:
            for table in tables:
                if any(attribute.num_buckets for attribute in getattr(card, table).attributes):
                    kinds.add(attribute_kind(table))
            for group, fact in card.facts.declared():
                marked = [bool(style.marks_target and target_sign(task, fact)) for task in tasks]
                kinds |= {fact.kind_of(group) + TARGET * mark for mark in marked}
    return kinds


def is_unknown(value: Any) -> bool:
    """Whether an attribute has no value: null, an empty list, or NaN."""
    return value is None or value == [] or (isinstance(value, float) and math.isnan(value))


def render_age(microseconds: int, style: Style) -> str:
    """A span of time in words, for instance "2 days", or "2d" in a short style."""
    count, unit = age(microseconds)
    if style.short:
        return f"{count}{'mo' if unit == 'month' else unit[0]}"
    return f"{count} {unit}{'' if count == 1 else 's'}"


def _read_values(column: pa.ChunkedArray, kind: str) -> list[Any]:
    """The values of a column; dates as microseconds since 1970."""
    return (column.cast(pa.timestamp("us")).cast(pa.int64()) if kind == "date" else column).to_pylist()
