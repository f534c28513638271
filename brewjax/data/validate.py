"""Reads a dataset's tables and holds them against its card: every problem at once, with file, column, row and value."""

from __future__ import annotations

import difflib
from bisect import bisect_right
from collections.abc import Iterable
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.dataset

from brewjax.data.dataset import Card

SHOWN = 3  # rows listed of each kind of problem

TEXT, INTEGER, FLOAT, DAY, TEXTS = pa.string(), pa.int64(), pa.float64(), pa.date32(), pa.list_(pa.string())
TIME = pa.timestamp("us", "UTC")

# What a column of each kind may be, after `_plain` (nothing but nulls is read as the first), and how to say so.
KINDS = {
    "id": ((INTEGER, TEXT), "ids are whole numbers or strings, never floats"),
    "time": ((TIME,), "expected timestamps (pandas.to_datetime makes them)"),
    "text": ((TEXT,), "expected strings"),
    "category": ((TEXT, INTEGER, pa.bool_()), "expected strings, whole numbers or booleans"),
    "list": ((TEXTS,), "expected lists of strings"),
    "number": ((FLOAT, INTEGER), "expected whole numbers or floats"),
    "date": ((DAY, TIME), "expected dates or timestamps"),
}


class DatasetError(ValueError):
    """Tables that do not fit their card; the message lists every problem, one a line."""


def read_validated(path: Path, card: Card) -> tuple[pa.Table, pa.Table, pa.Table]:
    """Reads members, items and events from the dataset folder `path`; each is a Parquet file or a folder of them.

    In the tables returned integers are int64, other numbers float64, texts string, times timestamp[us, UTC] (those
    without a zone are taken as UTC) and days date32, whichever widths and encodings the files have.

    Raises DatasetError listing every problem found in the tables and in what the card says of them.
    """
    members, items, events = (_Table(path, part.file) for part in (card.members, card.items, card.events))
    members.check_own_id(card.members.id)
    items.check_own_id(card.items.id)
    events.check_reference(card.events.member, "member", members, card.members.id)
    events.check_reference(card.events.item, "item", items, card.items.id)
    _check_actions(events, card)
    if (times := events.read(card.events.time, "time")) is not None:
        events.refuse(card.events.time, times.is_null(), "no time", "every event needs one")
    for table, part in ((members, card.members), (items, card.items), (events, card.events)):
        for attribute in part.attributes:
            if not attribute.derive:
                _check_attribute(table, attribute.column, attribute.kind)
    about_card = list(_card_problems(card, events))
    # The same column may be named twice, as an attribute and under `derive`: say what is wrong with it once.
    problems = list(dict.fromkeys([*members.problems, *items.problems, *events.problems, *about_card]))
    if problems:
        count = "1 problem" if len(problems) == 1 else f"{len(problems)} problems"
        raise DatasetError("\n  ".join([f"{path}: {count} in the dataset", *problems]))
    return members.table, items.table, events.table


class _Table:
    """A table and what was found wrong with it. An unreadable file is a problem and then a table without columns."""

    def __init__(self, folder: Path, file: str):
        self.file = file
        self.problems: list[str] = []
        self.table = pa.table({})
        self.found: dict[str, pa.DataType] = {}  # the types in the file, by column
        self.readable = False
        self.parts = [(0, "")]  # first row and name of each file of a folder
        path = folder / file
        if not path.exists():
            there = sorted(p.name for p in folder.iterdir()) if folder.is_dir() else []
            self.problems.append(f"{file}: no such file or folder in {folder}; {_hint(file, there)}")
            return
        try:
            source = pa.dataset.dataset(path, format="parquet", partitioning="hive" if path.is_dir() else None)
            rows = [fragment.count_rows() for fragment in source.get_fragments()]
            table = source.to_table()
        except (OSError, pa.ArrowException) as error:
            self.problems.append(f"{file}: not readable as Parquet: {str(error).splitlines()[0]}")
            return
        if path.is_dir():
            if not source.files:
                self.problems.append(f"{file}: a folder without Parquet files")
                return
            names = [str(Path(name).relative_to(path)) for name in source.files]
            self.parts = list(zip(np.cumsum([0, *rows[:-1]]).tolist(), names, strict=True))
        if len(table) == 0:
            self.problems.append(f"{file}: no rows; expected at least one")
        self.found = {field.name: field.type for field in table.schema}
        self.table = pa.table({name: _plain(table[name]) for name in self.found})
        self.readable = True

    def read(self, column: str, kind: str) -> pa.ChunkedArray | None:
        """The column, or None after noting that it is missing or not of this kind."""
        if not self.readable:
            return None
        if column not in self.found:
            self.problems.append(f"{self.file}: no column '{column}'; {_hint(column, self.found)}")
            return None
        values = self.table[column]
        types, expected = KINDS[kind]
        if pa.types.is_null(values.type):
            values = values.cast(types[0])
            self.table = self.table.set_column(self.table.column_names.index(column), column, values)
        if values.type not in types:
            found = f"found {self.found[column]}" + (f", {values[0].as_py()!r:.40} in row 0" if len(values) else "")
            self.problems.append(f"{self.file}: column '{column}': {found}; {expected}")
            return None
        return values

    def refuse(self, column: str, wrong: pa.ChunkedArray | pa.Array, what: str, right: str) -> None:
        """Notes the rows where `wrong` is true, the first few with their values."""
        rows = pc.indices_nonzero(wrong)
        if len(rows) == 0:
            return
        values = self.table[column].take(rows[:SHOWN]).to_pylist()
        shown = [
            self._place(row) + ("" if value is None else f" ({value!r:.60})")
            for row, value in zip(rows[:SHOWN].to_pylist(), values, strict=True)
        ]
        more = f" and {len(rows) - SHOWN:,} more" if len(rows) > SHOWN else ""
        self.problems.append(f"{self.file}: column '{column}': {what} in {', '.join(shown)}{more}; {right}")

    def _place(self, row: int) -> str:
        first, name = self.parts[bisect_right(self.parts, row, key=lambda part: part[0]) - 1]
        return f"row {row - first}" + (f" of {name}" if name else "")

    def check_own_id(self, column: str) -> None:
        ids = self.read(column, "id")
        if ids is None:
            return
        self.refuse(column, ids.is_null(), "no id", "every row needs one")
        first = pc.index_in(ids, ids.combine_chunks())
        again = pc.and_(ids.is_valid(), pc.not_equal(first, pa.array(np.arange(len(ids)))))
        self.refuse(column, again, "an id that an earlier row has", "give each id one row")

    def check_reference(self, column: str, noun: str, other: _Table, other_column: str) -> None:
        """Events name their member and item by the ids of the other table."""
        ids = self.read(column, "id")
        if ids is None:
            return
        self.refuse(column, ids.is_null(), f"no {noun}", f"every event needs the id of its {noun}")
        known = other.table[other_column] if other_column in other.table.column_names else None
        if known is None or known.type not in KINDS["id"][0] or ids.null_count == len(ids):
            return
        home = f"column '{other_column}' of {other.file}"
        if ids.type != known.type:
            found, expected = self.found[column], other.found[other_column]
            self.problems.append(
                f"{self.file}: column '{column}': found {found} where {home} is {expected}; make both the same"
            )
            return
        unknown = pc.and_(ids.is_valid(), pc.invert(pc.is_in(ids, value_set=known)))
        self.refuse(column, unknown, f"unknown {noun}", f"it must be in {home}")


def _check_actions(events: _Table, card: Card) -> None:
    column = card.events.action
    actions = events.read(column, "text")
    if actions is None:
        return
    known = pa.array(card.events.actions, pa.string())
    events.refuse(column, actions.is_null(), "no action", "every event needs one")
    unknown = pc.and_(actions.is_valid(), pc.invert(pc.is_in(actions, value_set=known)))
    events.refuse(column, unknown, "unknown action", f"the card has: {', '.join(card.events.actions)}")


def _check_attribute(table: _Table, column: str, kind: str) -> None:
    values = table.read(column, kind)
    if values is None:
        return
    if kind == "number":
        table.refuse(column, pc.invert(pc.is_finite(values)), "not a number", "leave it null where it is unknown")
    elif kind == "list":
        rows = pc.list_parent_indices(values).filter(pc.list_flatten(values).is_null())
        wrong = pc.is_in(pa.array(np.arange(len(values))), value_set=rows)
        table.refuse(column, wrong, "a null within the list", "leave it out of the list")


def _card_problems(card: Card, events: _Table) -> Iterable[str]:
    """What `derive` asks for that cannot be had; each names the card's file and line."""
    for part in ("members", "events"):
        for index, attribute in enumerate(getattr(card, part).attributes):
            if attribute.derive:
                yield str(card.error("only items have derived attributes", part, "attributes", index, "derive"))
    for index, attribute in enumerate(card.items.attributes):
        if not (derive := attribute.derive):
            continue
        place = ("items", "attributes", index, "derive")
        if attribute.kind != "number":
            yield str(card.error(f"makes a number; write 'kind: number', not '{attribute.kind}'", *place))
        for position, action in enumerate(derive.count or ()):
            if action not in card.events.actions:
                error = f"unknown action '{action}'; {_hint(action, card.events.actions)}"
                yield str(card.error(error, *place, "count", position))
        if derive.mean and events.readable:
            found = events.found.get(derive.mean)
            if found is None:
                error = f"events have no column '{derive.mean}'; {_hint(derive.mean, events.found)}"
                yield str(card.error(error, *place, "mean"))
            elif events.table[derive.mean].type not in KINDS["number"][0]:
                error = f"column '{derive.mean}' of {events.file} is {found}; only numbers have a mean"
                yield str(card.error(error, *place, "mean"))
            else:
                _check_attribute(events, derive.mean, "number")


def _plain(column: pa.ChunkedArray) -> pa.ChunkedArray:
    """The column as the one type that brewjax uses for its kind of value; any other type is left as it is."""
    kind = column.type
    if pa.types.is_dictionary(kind):
        column, kind = column.cast(kind.value_type), kind.value_type
    tests = {
        INTEGER: pa.types.is_integer(kind),
        FLOAT: pa.types.is_floating(kind) or pa.types.is_decimal(kind),
        TEXT: _is_text(kind),
        TEXTS: (pa.types.is_list(kind) or pa.types.is_large_list(kind)) and _is_text(kind.value_type),
        DAY: pa.types.is_date(kind),
        TIME: pa.types.is_timestamp(kind),
    }
    for plain, fits in tests.items():
        if fits:
            try:
                return column.cast(plain, safe=plain != TIME)  # nanoseconds are cut to microseconds
            except pa.ArrowInvalid:  # an unsigned integer over 2^63: refused by its kind, where one is asked for
                return column
    return column


def _is_text(kind: pa.DataType) -> bool:
    return pa.types.is_string(kind) or pa.types.is_large_string(kind)


def _hint(name: str, known: Iterable[str]) -> str:
    near = difflib.get_close_matches(name, list(known), n=1)
    return f"did you mean '{near[0]}'?" if near else f"there are: {', '.join(known) or 'none'}"
