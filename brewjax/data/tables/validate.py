"""Reads a dataset's tables and checks them against its card; reports every problem at once, by file, column and row."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterable
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from brewjax.config import suggest
from brewjax.data.tables.card import Card
from brewjax.data.tables.facts import GROUPS
from brewjax.data.tables.reading import DAY, FLOAT, INTEGER, TEXT, TEXTS, TIME, UnreadableError, open_table, plain, show

HASH_FACTOR = 0x9E3779B97F4A7C15  # odd, so that no bit of a hash is lost when it is multiplied
SHOWN = 3  # rows listed of each kind of problem
MIN_TIMES = 10  # events; a log of at least so many that spans less than a minute is refused
MINUTE, YEAR = 60_000_000, 31_557_600_000_000  # microseconds
LATEST = 230 * YEAR  # microseconds since 1970; a time after this, in the year 2200, is a mistake

# Texts that pandas.to_datetime and pandas.to_numeric read.
DATE = r"^\s*\d{4}-\d{1,2}-\d{1,2}([ T]\d{1,2}:\d{2}(:\d{2}(\.\d+)?)?)?(Z|[+-]\d{2}:?\d{2})?\s*$"
NUMBER = r"^\s*[+-]?(\d+\.?\d*|\.\d+)([eE][+-]?\d+)?\s*$"

# The types that a column of each kind may have after `plain` (a column of nulls gets the first), and the error's words.
KINDS = {
    "id": ((INTEGER, TEXT), "ids are whole numbers or strings, never floats"),
    "time": ((TIME,), "expected timestamps"),
    "order": ((INTEGER,), "expected whole numbers"),
    "text": ((TEXT,), "expected strings"),
    "category": ((TEXT, INTEGER, pa.bool_()), "expected strings, whole numbers or booleans"),
    "list": ((TEXTS,), "expected lists of strings"),
    "number": ((FLOAT, INTEGER), "expected whole numbers or floats"),
    "date": ((DAY, TIME), "expected dates or timestamps"),
}


class DatasetError(ValueError):
    """Tables that do not fit their card; the message lists every problem, one per line."""


def read_validated(path: Path, card: Card) -> tuple[pa.Table, pa.Table, pa.Table]:
    """Reads members, items and events from the dataset folder `path`; each is a Parquet or
    CSV file, or a folder of Parquet files.

    Returns:
      The three tables. Integers are int64, other numbers float64, texts string, times timestamp[us, UTC] (times without
      a zone are read as UTC) and days date32, whatever widths and encodings the files have.

    Raises:
      DatasetError: lists every problem of the tables, and of what the card states about them.
    """
    members, items = _Table(path, card.members.file), _Table(path, card.items.file)
    events = _Table(path, card.events.file, card.events.files, card.events.action)
    members.check_own_id(card.members.id)
    items.check_own_id(card.items.id)
    events.check_reference(card.events.member, "member", members, card.members.id)
    events.check_reference(card.events.item, "item", items, card.items.id)
    _check_actions(events, card)
    _check_times(events, card)
    _check_duplicates(events, card)
    for table, part in ((members, card.members), (items, card.items), (events, card.events)):
        for attribute in part.attributes:
            _check_attribute(table, attribute.column, attribute.kind)
    for table, available in ((members, card.members.available), (items, card.items.available)):
        for column in (available and available.from_, available and available.until):
            if column:
                _check_attribute(table, column, "date")
    if card.events.request:
        events.read(card.events.request, "id")
    card_problems = list(_fact_problems(card, events))
    # A column may be named twice, as an attribute and by a fact: its problems are reported once.
    problems = list(dict.fromkeys([*members.problems, *items.problems, *events.problems, *card_problems]))
    if problems:
        count = "1 problem" if len(problems) == 1 else f"{len(problems)} problems"
        raise DatasetError("\n  ".join([f"{path}: {count} in the dataset", *problems]))
    return members.table, items.table, events.table


class _Table:
    """A table and its problems. An unreadable file is one problem, and then a table without columns."""

    def __init__(self, folder: Path, file: str, files: dict[str, str] | None = None, action_column: str = ""):
        self.file = ", ".join(files.values()) if files else file
        self.problems: list[str] = []
        self.table = pa.table({})
        self.types: dict[str, pa.DataType] = {}  # as they are in the file, by column
        self.readable = False
        self.parts = [(0, "")]  # first row and name of each file of a folder
        try:
            table, self.parts = _open_each(folder, files, action_column) if files else open_table(folder, file)
        except UnreadableError as error:
            self.problems.append(str(error))
            return
        if len(table) == 0:
            self.problems.append(f"{file}: no rows; expected at least one")
        self.types = {field.name: field.type for field in table.schema}
        self.table = pa.table({name: plain(table[name]) for name in self.types})
        self.readable = True

    def read(self, column: str, kind: str) -> pa.ChunkedArray | None:
        """The column; None, with a problem noted, if it is missing or not of this kind."""
        if not self.readable:
            return None
        if column not in self.types:
            self.problems.append(f"{self.file}: no column '{column}'; {suggest(column, self.types)}")
            return None
        values = self.table[column]
        types, expected = KINDS[kind]
        if pa.types.is_null(values.type):
            values = values.cast(types[0])
            self.table = self.table.set_column(self.table.column_names.index(column), column, values)
        if values.type not in types:
            actual = f"found {self.types[column]}" + (f", {show(values[0])} in row 0" if len(values) else "")
            hint = _suggest_cast(values, kind)
            self.problems.append(f"{self.file}: column '{column}': {actual}; {expected}{hint and f' ({hint})'}")
            return None
        return values

    def refuse(self, column: str, wrong: pa.ChunkedArray | pa.Array, problem: str, advice: str) -> None:
        """Notes a problem of the rows where `wrong` is true, the first few with their values."""
        rows = pc.indices_nonzero(wrong)
        if len(rows) == 0:
            return
        values = self.table[column].take(rows[:SHOWN])
        shown = [
            self.locate_row(row) + (f" ({show(value)})" if value.is_valid else "")
            for row, value in zip(rows[:SHOWN].to_pylist(), values, strict=True)
        ]
        more = f" and {len(rows) - SHOWN:,} more" if len(rows) > SHOWN else ""
        self.problems.append(f"{self.file}: column '{column}': {problem} in {', '.join(shown)}{more}; {advice}")

    def locate_row(self, row: int) -> str:
        """Names a row in an error: counted from 0, within its file."""
        first, name = self.parts[bisect_right(self.parts, row, key=lambda part: part[0]) - 1]
        return f"row {row - first}" + (f" of {name}" if name else "")

    def check_own_id(self, column: str) -> None:
        """Every row has an id, and no two have the same."""
        ids = self.read(column, "id")
        if ids is None:
            return
        self.refuse(column, ids.is_null(), "no id", "every row needs one")
        if ids.type == TEXT:
            self.refuse(column, pc.equal(pc.utf8_trim_whitespace(ids), ""), "an empty id", "every row needs one")
        first = pc.index_in(ids, ids.combine_chunks())
        repeated = pc.and_(ids.is_valid(), pc.not_equal(first, pa.array(np.arange(len(ids)))))
        self.refuse(column, repeated, "an id that an earlier row has", "give each id one row")

    def check_reference(self, column: str, noun: str, target: _Table, target_column: str) -> None:
        """Every value of `column` is an id in `target_column` of the members or items table."""
        ids = self.read(column, "id")
        if ids is None:
            return
        self.refuse(column, ids.is_null(), f"no {noun}", f"every event needs the id of its {noun}")
        known = target.table[target_column] if target_column in target.table.column_names else None
        if known is None or known.type not in KINDS["id"][0] or ids.null_count == len(ids):
            return
        home = f"column '{target_column}' of {target.file}"
        if ids.type != known.type:
            actual, expected = self.types[column], target.types[target_column]
            self.problems.append(
                f"{self.file}: column '{column}': found {actual} where {home} is {expected}; make both the same"
            )
            return
        unknown = pc.and_(ids.is_valid(), pc.invert(pc.is_in(ids, value_set=known)))
        self.refuse(column, unknown, f"unknown {noun}", f"it must be in {home}")


def _open_each(folder: Path, files: dict[str, str], action_column: str) -> tuple[pa.Table, list[tuple[int, str]]]:
    """The tables of several actions as one, with a column of the actions; and the first row and name of each file."""
    tables, parts, rows = [], [], 0
    for action, file in files.items():
        table, table_parts = open_table(folder, file)
        if action_column in table.column_names:
            raise UnreadableError(f"{file}: a column '{action_column}', where the card's 'files' says the action")
        plain_table = pa.table({name: plain(table[name]) for name in table.column_names})
        tables.append(plain_table.append_column(action_column, pa.array([action] * len(table), TEXT)))
        parts += [(rows + first, f"{file}/{name}" if name else file) for first, name in table_parts]
        rows += len(table)
    try:
        return pa.concat_tables(tables, promote_options="permissive"), parts
    except pa.ArrowException as error:
        raise UnreadableError(f"{', '.join(files.values())}: columns of one name and several types: {error}") from None


def _check_actions(events: _Table, card: Card) -> None:
    column = card.events.action
    actions = events.read(column, "text")
    if actions is None:
        return
    known = pa.array(card.events.actions, TEXT)
    events.refuse(column, actions.is_null(), "no action", "every event needs one")
    unknown = pc.and_(actions.is_valid(), pc.invert(pc.is_in(actions, value_set=known)))
    events.refuse(column, unknown, "unknown action", f"the card has: {', '.join(card.events.actions)}")


def _check_times(events: _Table, card: Card) -> None:
    column = card.events.time
    if column is None:
        order = events.read(card.events.order, "order") if card.events.order else None
        if card.events.order and order is not None:
            events.refuse(card.events.order, order.is_null(), "no place in the order", "every event needs one")
        return
    times = events.read(column, "time")
    if times is None:
        return
    events.refuse(column, times.is_null(), "no time", "every event needs one")
    known_times = _microseconds(times)
    if hint := _mistaken_unit(known_times):
        events.problems.append(f"{events.file}: column '{column}': {hint}")
    elif len(known_times) >= MIN_TIMES and np.ptp(known_times) < MINUTE:
        span = f"lie within {np.ptp(known_times) / 1e6:g} seconds, from {_iso(known_times.min())} on"
        events.problems.append(
            f"{events.file}: column '{column}': all {len(known_times):,} events {span}; expected the times at which "
            "they happened, over days or more"
        )
    elif len(known_times) and np.median(known_times) > 10 * YEAR:
        events.refuse(
            column, pc.equal(times.cast(pa.int64()), 0), "a time of 0, which is 1970,", "leave out such events"
        )
        late = pc.greater(times.cast(pa.int64()), LATEST)
        events.refuse(column, late, "a time after the year 2199", "give the time at which it happened")


def _check_duplicates(events: _Table, card: Card) -> None:
    """No two events are the same in every column: a copy in the history would give the answer to the other away."""
    time = card.events.time or card.events.order
    if time is None:  # without any order equal rows are no mistake: a member may buy a thing twice
        return
    keys = [card.events.member, card.events.item, card.events.action, time]
    if not len(events.table) or any(key not in events.table.column_names for key in keys):
        return
    suspects = _rows_alike([comparable(events.table[key]) for key in keys])
    if not len(suspects):
        return
    few = events.table.take(suspects)
    columns = [comparable(column) for column in few.columns if not pa.types.is_null(column.type)]
    rows = pa.table([*columns, suspects], [str(number) for number in range(len(columns) + 1)])
    *keys, row = rows.column_names
    first = rows.group_by(keys, use_threads=False).aggregate([(row, "min")])[f"{row}_min"].to_numpy()
    repeated = np.setdiff1d(suspects, first)
    if count := len(repeated):
        shown = ", ".join(events.locate_row(row) for row in repeated[:SHOWN].tolist())
        nested = any(pa.types.is_nested(column.type) for column in events.table.columns)
        hint = "" if nested else " (pandas: events.drop_duplicates())"
        events.problems.append(
            f"{events.file}: {count:,} of {len(events.table):,} rows are the same in every column as an earlier one: "
            f"{shown}{' ..' if count > SHOWN else ''}; keep one of each{hint}"
        )


def _rows_alike(columns: list[pa.ChunkedArray]) -> np.ndarray:
    """int64: the rows that may equal another row in all columns, in ascending order: those whose hash another row has.
    To group all rows by their values takes far more memory than to sort a number of each."""
    hashes = np.zeros(len(columns[0]), np.uint64)
    for column in columns:
        if column.type in (INTEGER, TIME):
            codes = column.cast(pa.int64()).fill_null(0)
        else:
            codes = pc.index_in(column, column.unique())
        hashes = hashes * np.uint64(HASH_FACTOR) + codes.to_numpy().astype(np.uint64)
    ordered = np.sort(hashes)
    return np.flatnonzero(np.isin(hashes, ordered[1:][ordered[1:] == ordered[:-1]]))


def comparable(column: pa.ChunkedArray) -> pa.ChunkedArray:
    """Makes values that Arrow can compare and group.

    Args:
      column: of any type.

    Returns:
      The column itself, or as distinct texts if Arrow cannot group by its type.
    """
    if column.type in (INTEGER, FLOAT, TEXT, DAY, TIME):
        return column
    if column.type == TEXTS:
        return pc.binary_join(column, pa.scalar("\x1f", TEXT))
    return pa.chunked_array([[*map(show, column)]], TEXT)


def _microseconds(times: pa.ChunkedArray) -> np.ndarray:
    """int64: the dates or timestamps that are not null, as microseconds since 1970."""
    return times.drop_null().cast(TIME).cast(pa.int64()).to_numpy()


def _mistaken_unit(times: np.ndarray) -> str:
    """Describes a column whose numbers were read in the wrong unit: every time (microseconds) lies in January 1970, or
    centuries ahead. Empty if that is not so."""
    # Whole days are real dates: a column of birthdays may hold a single one, in January 1970.
    if not len(times) or not (times % (24 * 60 * MINUTE)).any():
        return ""
    low, high = times.min(), times.max()
    if low >= 0 and high < YEAR / 12:
        span = f"from {_iso(low)} to {_iso(high)}" if low < high else f"at {_iso(low)}"
        # The factor by which a present-day time in each unit is too small when pandas reads it as nanoseconds.
        units = {"s": 10**9, "ms": 10**6, "us": 10**3, "D": 86_400 * 10**9}
        fitting = [unit for unit, factor in units.items() if 5 * YEAR < np.median(times) * factor < LATEST]
        hint = f'pandas.to_datetime(column, unit="{fitting[0]}")' if fitting else "give pandas.to_datetime their unit"
        return f"all {len(times):,} times are in January 1970, {span}, as of numbers read in the wrong unit; {hint}"
    if low > LATEST:
        return (
            f"all {len(times):,} times are after the year 2199, from {_iso(low)} on, as of numbers read in the wrong "
            'unit; give pandas.to_datetime the unit that they are in, for instance unit="ms"'
        )
    return ""


def _iso(time: int) -> str:
    """Renders a time (microseconds since 1970) in UTC, for instance 2025-01-02 12:00:00."""
    return str(np.datetime64(int(time), "us")).replace("T", " ").removesuffix(".000000")


def _suggest_cast(values: pa.ChunkedArray, kind: str) -> str:
    """How pandas casts a column of another type to this kind; empty if no cast is sure to work."""
    type_ = values.type
    if kind in ("time", "date"):
        if type_ in (INTEGER, FLOAT):
            largest = pc.max(pc.abs(values)).as_py() or 0
            unit = next((unit for unit, limit in (("s", 1e11), ("ms", 1e14), ("us", 1e17)) if largest < limit), "ns")
            return f'pandas.to_datetime(column, unit="{unit}") makes them of such numbers'
        dates = type_ == DAY or (type_ == TEXT and _all_match(values, DATE))
        return "pandas.to_datetime(column) makes them" if dates else ""
    if kind == "id" and type_ == FLOAT:
        return 'pandas: column.astype("Int64")'
    if pa.types.is_duration(type_) and kind == "number":
        return "pandas: column.dt.total_seconds()"
    if kind == "number" and type_ == TEXT and _all_match(values, NUMBER):
        return "pandas.to_numeric(column) makes them"
    if kind == "list" and type_ == TEXT:
        return 'pandas: column.str.split(",")'
    if kind == "text" and type_ == INTEGER:
        return "pandas: column.astype(str); or set kind: category"
    if kind == "number" and type_ == pa.bool_():
        return "set kind: category"
    return ""


def _all_match(values: pa.ChunkedArray, pattern: str) -> bool:
    """Whether all texts that are not null match, so that the hint is sure to work."""
    return bool(pc.all(pc.match_substring_regex(values, pattern)).as_py())


def _check_attribute(table: _Table, column: str, kind: str) -> None:
    values = table.read(column, kind)
    if values is None:
        return
    if kind == "number":
        table.refuse(column, pc.invert(pc.is_finite(values)), "not a number", "leave it null where it is unknown")
    elif kind == "list":
        rows = pc.list_parent_indices(values).filter(pc.list_flatten(values).is_null())
        table.refuse(column, _rows_in(values, rows), "a null within the list", "leave it out of the list")
        empty = pc.equal(pc.utf8_trim_whitespace(pc.list_flatten(values)), "")
        rows = pc.list_parent_indices(values).filter(empty)
        table.refuse(column, _rows_in(values, rows), "an empty text within the list", "leave it out of the list")
    elif kind == "date" and (hint := _mistaken_unit(_microseconds(values))):
        table.problems.append(f"{table.file}: column '{column}': {hint}")


def _rows_in(values: pa.ChunkedArray, rows: pa.Array) -> pa.Array:
    """bool [len(values)]: whether each row is one of `rows`."""
    return pc.is_in(pa.array(np.arange(len(values))), value_set=rows)


def _fact_problems(card: Card, events: _Table) -> Iterable[str]:
    """Yields the problems of the event columns that facts name, each with the card's file and line."""
    for group in GROUPS:
        for index, fact in enumerate(getattr(card.facts, group)):
            column, location = fact.column, ("facts", group, index, fact.kind)
            if column is None or not events.readable:
                continue
            type_ = events.types.get(column)
            if type_ is None:
                yield str(card.error(f"events have no column '{column}'; {suggest(column, events.types)}", *location))
            elif events.table[column].type not in KINDS["number"][0]:
                error = f"column '{column}' of {events.file} is {type_}; only numbers have a mean"
                yield str(card.error(error, *location))
            else:
                _check_attribute(events, column, "number")
