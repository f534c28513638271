"""Conditions of task files on columns of events, members and items: a value, a list of values, or a range."""

from __future__ import annotations

import datetime
import math
from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from brewjax.config import suggest
from brewjax.data.tables.dataset import Dataset
from brewjax.data.tables.reading import TEXT, show, show_type

RANGE = {"min": pc.greater_equal, "max": pc.less_equal, "above": pc.greater, "below": pc.less}
MEMBER, ITEM = "member.", "item."  # prefixes of columns of these tables; others are of the events
SHOWN = 5  # values of a column that an error lists if a condition matches none

Conditions = Mapping[str, Any]


def matches(dataset: Dataset, conditions: Conditions, events: np.ndarray) -> np.ndarray:
    """bool [events]: whether events (int [events], rows of the events table) fulfil all conditions.

    Raises:
      ValueError: a value is not of its column's type, or a column does not exist.
    """
    match = np.ones(len(events), bool)
    for column, condition in conditions.items():
        match &= _holds(event_values(dataset, column, events), condition)
    return match


def row_matches(dataset: Dataset, conditions: Conditions, prefix: str) -> np.ndarray:
    """bool [rows]: whether the rows of the members (`prefix` MEMBER) or items (ITEM) fulfil the conditions on them."""
    table = dataset.members if prefix == MEMBER else dataset.items
    match = np.ones(len(table), bool)
    for column, condition in conditions.items():
        if column.startswith(prefix):
            match &= _holds(table[column.removeprefix(prefix)], condition)
    return match


def event_values(dataset: Dataset, column: str, events: np.ndarray) -> pa.ChunkedArray:
    """The values of a column of each event: of its own, of its member's (`member.age`) or its item's (`item.price`)."""
    if column.startswith(MEMBER):
        return dataset.members[column.removeprefix(MEMBER)].take(pa.array(dataset.event_member[events]))
    if column.startswith(ITEM):
        return dataset.items[column.removeprefix(ITEM)].take(pa.array(dataset.event_item[events]))
    return dataset.event_column(column).take(pa.array(events))


def known_columns(dataset: Dataset) -> list[str]:
    """The columns that a condition can be on."""
    event_columns = [name for name in dataset.events.column_names if name != dataset.card.events.action]
    return [
        "action",
        *event_columns,
        *(ITEM + name for name in dataset.items.column_names),
        *(MEMBER + name for name in dataset.members.column_names),
    ]


def check_column(column: str, known: Iterable[str]) -> None:
    """Checks that a condition is on a column that there is.

    Args:
      column: of the condition.
      known: the columns that there are.

    Raises:
      ValueError: there is none of this name; says what was meant.
    """
    if column not in known:
        raise ValueError(f"events have no column '{column}'; {suggest(column, known, listing='they have')}")


def check_condition(condition: Any, type_: pa.DataType) -> None:
    """Checks that a column can fulfil a condition.

    Args:
      condition: a value, a list of values, or a range.
      type_: of the column.

    Raises:
      ValueError: no column of this type can; says what would be right.
    """
    if isinstance(condition, dict):
        for key, value in condition.items():
            if key not in RANGE:
                raise ValueError(f"'{key}' is no bound; {suggest(str(key), RANGE, listing='bounds')}")
            if not (pa.types.is_integer(type_) or pa.types.is_floating(type_) or pa.types.is_temporal(type_)):
                raise ValueError(f"this column holds {show_type(type_)}; only numbers and dates have a range")
            _check_type(value, type_)
        if not condition:
            raise ValueError(f"an empty range; give {', '.join(RANGE)}")
        return
    for value in as_list(condition):
        _check_type(value, type_)


def describe(dataset: Dataset, column: str, condition: Any, events: np.ndarray) -> str:
    """A condition, and a few values that its column has in `events`, for an error."""
    values = event_values(dataset, column, events).unique().drop_null()
    shown = ", ".join(show(value) for value in values[:SHOWN]) + (", .." if len(values) > SHOWN else "")
    return f"{column}: {condition!r} (there is: {shown or 'nothing'})"


def as_list(condition: Any) -> list[Any]:
    """The values of a condition that is no range."""
    return condition if isinstance(condition, list) else [condition]


def _holds(values: pa.ChunkedArray, condition: Any) -> np.ndarray:
    type_ = values.type
    if isinstance(condition, dict):
        holds = [RANGE[key](values, pa.scalar(_as_type(value, type_), type_)) for key, value in condition.items()]
        return np.logical_and.reduce([pc.fill_null(mask, False).to_numpy() for mask in holds])
    answers = pa.array([_as_type(value, type_) for value in as_list(condition)], type_)
    return pc.is_in(values, value_set=answers).to_numpy()


def _check_type(value: Any, type_: pa.DataType) -> None:
    """ValueError, with what would be right, if a column of this type cannot hold the value."""
    if pa.types.is_nested(type_):
        raise ValueError(f"this column holds {show_type(type_)}; a label matches columns of single values")
    if value is None:
        raise ValueError("an unknown value matches nothing; leave null out")
    if isinstance(value, (list, dict)):
        raise ValueError(f"found {value!r}; give one value, or a list of values")
    text, number = isinstance(value, str), isinstance(value, (int, float)) and not isinstance(value, bool)
    if pa.types.is_boolean(type_) and not isinstance(value, bool):
        raise ValueError(f"this column holds true and false, found {value!r}")
    if type_ == TEXT and not text:
        shown = str(value).lower() if isinstance(value, bool) else value
        raise ValueError(f'this column holds texts, found {shown}; put it in quotes: "{shown}"')
    if (pa.types.is_integer(type_) or pa.types.is_floating(type_)) and not number:
        bare = f"; write it without quotes: {value}" if text and is_number(value) else ""
        raise ValueError(f"this column holds numbers, found {value!r}{bare}")
    _as_type(value, type_)


def _as_type(value: Any, type_: pa.DataType) -> Any:
    """Converts a value of a task file to the type of its column; ValueError if that is impossible.

    Categories are text in a server's request, even if they are numbers in the task, so a text column takes numbers.
    """
    if type_ == TEXT:
        return str(value)
    if pa.types.is_integer(type_) and isinstance(value, float):
        if not value.is_integer():
            raise ValueError(f"this column holds whole numbers, found {value!r}")
        return int(value)
    if pa.types.is_date(type_) or pa.types.is_timestamp(type_):
        try:
            time = datetime.datetime.fromisoformat(str(value))
        except ValueError:
            raise ValueError(f"this column holds dates, found {value!r}; expected one such as 1998-03-07") from None
        if pa.types.is_date(type_):
            return time.date()
        time = time.replace(tzinfo=time.tzinfo or datetime.UTC)
        return time if type_.tz else time.astimezone(datetime.UTC).replace(tzinfo=None)
    if not (pa.types.is_integer(type_) or pa.types.is_floating(type_) or pa.types.is_boolean(type_)):
        raise ValueError(
            f"this column holds {show_type(type_)}; a label matches texts, numbers, dates, or true and false"
        )
    return value


def is_number(text: str) -> bool:
    """Whether a text is a finite number."""
    try:
        return math.isfinite(float(text))
    except ValueError:
        return False
