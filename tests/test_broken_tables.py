"""Broken tables, each through the real command line: the message names file, column, row, what is there and what would
be right, in one line and without a traceback."""

from __future__ import annotations

import datetime
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.csv
import pyarrow.parquet as pq
import pytest

from tests.command_line import check_parts
from tests.tables import put, with_column, write_dataset


def from_columns(**columns: object) -> Callable[[pa.Table], pa.Table]:
    def change(table: pa.Table) -> pa.Table:
        for name, values in columns.items():
            table = (
                with_column(name, values(table[name]))(table) if callable(values) else with_column(name, values)(table)
            )
        return table

    return change


def times(make: Callable[[np.ndarray], object]) -> Callable[[pa.Table], pa.Table]:
    """Event times from their seconds since 1970."""
    return from_columns(time=lambda column: make(column.cast(pa.int64()).to_numpy() // 1_000_000))


def twice(table: pa.Table) -> pa.Table:
    return pa.concat_tables([table, table])


EPOCH_NS = lambda seconds: pa.array(seconds, pa.timestamp("ns"))  # noqa: E731  # as pandas.to_datetime(seconds) does

# The table that is changed, how, and what the message must hold.
TABLES = {
    "no_rows": ("events", lambda table: table.slice(0, 0), ("events.parquet: no rows; expected at least one",)),
    "id_null": (
        "members",
        put("member_id", 1, None),
        ("members.parquet: column 'member_id': no id in row 1; every row needs one",),
    ),
    "id_twice": (
        "items",
        put("item_id", 3, 100),
        ("items.parquet: column 'item_id': an id that an earlier row has in row 3 (100); give each id one row",),
    ),
    "id_empty": (
        "members",
        put("member_id", 1, ""),
        ("members.parquet: column 'member_id': an empty id in row 1 ('')",),
    ),
    "id_float": (
        "events",
        from_columns(item_id=lambda c: c.cast(pa.float64())),
        (
            "events.parquet: column 'item_id': found double, ",
            "ids are whole numbers or strings, never floats",
            'column.astype("Int64")',
        ),
    ),
    "id_text_for_number": (
        "events",
        from_columns(item_id=lambda c: c.cast(pa.string())),
        ("column 'item_id': found string where column 'item_id' of items.parquet is int64; make both the same",),
    ),
    "member_unknown": (
        "events",
        put("member_id", 5, "m99"),
        ("unknown member in row 5 ('m99'); it must be in column 'member_id' of members.parquet",),
    ),
    "item_unknown": (
        "events",
        put("item_id", 5, 9),
        ("unknown item in row 5 (9); it must be in column 'item_id' of items.parquet",),
    ),
    "action_unknown": (
        "events",
        put("action", 5, "veiwed"),
        ("column 'action': unknown action in row 5 ('veiwed'); the card has: viewed, applied",),
    ),
    "action_brackets": ("events", put("action", 0, "[applied]"), ("unknown action in row 0 ('[applied]')",)),
    "action_closing_brackets": ("events", put("action", 0, "[/applied]"), ("unknown action in row 0 ('[/applied]')",)),
    "action_emoji": ("events", put("action", 0, ":fire:"), ("unknown action in row 0 (':fire:')",)),
    "action_null": ("events", put("action", 5, None), ("column 'action': no action in row 5; every event needs one",)),
    "action_number": (
        "events",
        from_columns(action=pa.array([1] * 80)),
        ("column 'action': found int64, 1 in row 0; expected strings",),
    ),
    "time_null": ("events", put("time", 5, None), ("column 'time': no time in row 5; every event needs one",)),
    "time_text": (
        "events",
        from_columns(time=pa.array(["2025-01-01"] * 80)),
        ("found string, '2025-01-01' in row 0; expected timestamps (pandas.to_datetime(column) makes them)",),
    ),
    "time_day": (
        "events",
        from_columns(time=pa.array([datetime.date(2025, 1, 1)] * 80)),
        ("found date32[day]", "expected timestamps (pandas.to_datetime(column) makes them)"),
    ),
    "time_seconds": (
        "events",
        times(pa.array),
        ("column 'time': found int64, ", 'pandas.to_datetime(column, unit="s") makes them of such numbers'),
    ),
    "time_milliseconds": ("events", times(lambda s: pa.array(s * 1000)), ('pandas.to_datetime(column, unit="ms")',)),
    "time_microseconds": ("events", times(lambda s: pa.array(s * 10**6)), ('pandas.to_datetime(column, unit="us")',)),
    "time_nanoseconds": ("events", times(lambda s: pa.array(s * 10**9)), ('pandas.to_datetime(column, unit="ns")',)),
    "time_float": (
        "events",
        times(lambda s: pa.array(s + 0.5)),
        ("column 'time': found double, ", 'pandas.to_datetime(column, unit="s")'),
    ),
    "time_of_day": (
        "events",
        from_columns(time=pa.array([datetime.time(1)] * 80)),
        ("found time64[us], 01:00:00 in row 0; expected timestamps",),
    ),
    "time_duration": (
        "events",
        from_columns(time=pa.array([1] * 80, pa.duration("ns"))),
        ("found duration[ns], 1 in row 0; expected timestamps",),
    ),
    "seconds_as_nanoseconds": (
        "events",
        times(EPOCH_NS),
        (
            "column 'time': all 80 times are in January 1970, from 1970-01-01 00:00:01.7",
            'pandas.to_datetime(column, unit="s")',
        ),
    ),
    "milliseconds_as_nanoseconds": (
        "events",
        times(lambda s: EPOCH_NS(s * 1000)),
        ("all 80 times are in January 1970", 'unit="ms"'),
    ),
    "microseconds_as_nanoseconds": (
        "events",
        times(lambda s: EPOCH_NS(s * 10**6)),
        ("all 80 times are in January 1970", 'unit="us"'),
    ),
    "milliseconds_as_seconds": (
        "events",
        times(lambda s: pa.array(s * 1000 * 10**6, pa.timestamp("us"))),
        ("all 80 times are after the year 2199", "wrong unit"),
    ),
    "time_zero": (
        "events",
        put("time", 7, datetime.datetime(1970, 1, 1, tzinfo=datetime.UTC)),
        ("a time of 0, which is 1970, in row 7", "leave out such events"),
    ),
    "time_in_9999": (
        "events",
        put("time", 7, datetime.datetime(9999, 12, 31, tzinfo=datetime.UTC)),
        ("a time after the year 2199 in row 7",),
    ),
    "all_at_once": (
        "events",
        lambda table: pa.concat_tables(
            [
                from_columns(time=pa.array(np.arange(80) + offset, pa.timestamp("us", "UTC")))(table)
                for offset in (1_700_000_000_000_000, 1_700_000_001_000_000)
            ]
        ),
        ("all 160 events lie within 1.00008 seconds, from 2023-11-14 22:13:20 on",),
    ),
    "every_event_twice": (
        "events",
        twice,
        ("80 of 160 rows are the same in every column as an earlier one: row 80, row 81, row 82 ..; keep one of each",),
    ),
    "one_event_twice": (
        "events",
        lambda table: pa.concat_tables([table, table.slice(3, 1)]),
        ("events.parquet: 1 of 81 rows are the same in every column as an earlier one: row 80; keep one",),
    ),
    "number_nan": (
        "events",
        put("seconds", 4, float("nan")),
        ("column 'seconds': not a number in row 4 (nan); leave it null where it is unknown",),
    ),
    "number_timedelta": (
        "items",
        from_columns(salary=pa.array([1] * 40, pa.duration("ns"))),
        ("column 'salary': found duration[ns], 1 in row 0; expected whole numbers or floats (pandas: column.dt.total",),
    ),
    "number_text": (
        "items",
        from_columns(salary=pa.array(["1e3", " 2.5"] * 20)),
        ("column 'salary': found string, '1e3' in row 0; expected whole numbers or floats (pandas.to_numeric(column)",),
    ),
    "number_words": (
        "items",
        from_columns(salary=pa.array(["a lot"] * 40)),
        ("column 'salary': found string, 'a lot' in row 0; expected whole numbers or floats",),
    ),
    "number_bool": (
        "items",
        from_columns(salary=pa.array([True] * 40)),
        ("column 'salary': found bool, True in row 0; expected whole numbers or floats (set kind: category)",),
    ),
    "number_struct": (
        "items",
        from_columns(salary=pa.array([{"a": 1}] * 40)),
        ("column 'salary': found struct<a: int64>, {'a': 1} in row 0; expected whole numbers",),
    ),
    "number_too_large": (
        "items",
        from_columns(salary=pa.array([2**64 - 1] * 40, pa.uint64())),
        ("column 'salary': found uint64, 18446744073709551615 in row 0",),
    ),
    "category_float": (
        "items",
        from_columns(company=pa.array([1.5] * 40)),
        ("column 'company': found double, 1.5 in row 0; expected strings, whole numbers or booleans",),
    ),
    "list_null": (
        "items",
        put("skills", 6, ["SQL", None]),
        ("column 'skills': a null within the list in row 6 (['SQL', None]); leave it out of the list",),
    ),
    "list_empty_text": (
        "items",
        put("skills", 6, ["SQL", " "]),
        ("column 'skills': an empty text within the list in row 6 (['SQL', ' ']); leave it out of the list",),
    ),
    "list_of_numbers": (
        "items",
        from_columns(skills=pa.array([[1]] * 40)),
        ("column 'skills': found list<", "[1] in row 0; expected lists of strings"),
    ),
    "text_bytes": (
        "items",
        from_columns(title=pa.array([b"x"] * 40)),
        ("column 'title': found binary, b'x' in row 0; expected strings",),
    ),
    "date_seconds": (
        "items",
        from_columns(posted=pa.array([1_700_000_000] * 40)),
        ("column 'posted': found int64", 'pandas.to_datetime(column, unit="s")'),
    ),
    "date_as_nanoseconds": (
        "items",
        from_columns(posted=EPOCH_NS([1_700_000_000 + n for n in range(40)])),
        ("column 'posted': all 40 times are in January 1970", 'unit="s"'),
    ),
}


@pytest.mark.parametrize("case", TABLES)
def test_a_broken_table(case, refuse, tmp_path):
    name, change, parts = TABLES[case]
    folder = write_dataset(tmp_path / "jobs [old]", **{name: change})
    message = refuse("data", "check", folder)
    check_parts(message, parts)
    assert f"error: {folder}: " in message
    assert f"in the dataset {name}.parquet: " in message


def csv_for_parquet(path: Path) -> None:
    pa.csv.write_csv(pq.read_table(path).select(["member_id", "position"]), path)


def cut_short(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-100])


def to_folder(*files: tuple[str, bytes]) -> Callable[[Path], None]:
    def spoil(path: Path) -> None:
        path.unlink()
        path.mkdir()
        for name, content in files:
            (path / name).write_bytes(content)

    return spoil


def two_columns_of_a_name(path: Path) -> None:
    table = pq.read_table(path)
    pq.write_table(table.rename_columns(["member_id", "position", "position", "location", "experience"]), path)


# What is done to members.parquet, and what the message must hold.
FILES = {
    "missing": (
        Path.unlink,
        ("members.parquet: no such file or folder in ", "there are: dataset.yaml, events.parquet, items.parquet"),
    ),
    "empty": (lambda path: path.write_bytes(b""), ("members.parquet: an empty file; expected Parquet",)),
    "csv": (
        csv_for_parquet,
        (
            'members.parquet: not Parquet: it begins with \'"member_id","position"\'',
            "if it is CSV, let its name end with .csv",
        ),
    ),
    "json": (
        lambda path: path.write_text('{"member_id": 1}'),
        ("members.parquet: not Parquet: it begins with '{\"member_id\": 1}'",),
    ),
    "zip": (
        lambda path: path.write_bytes(b"PK\x03\x04" + bytes(100)),
        ("members.parquet: not Parquet: it begins with 'PK",),
    ),
    "cut_short": (
        cut_short,
        ("members.parquet: truncated Parquet: its end is missing; write or copy it again",),
    ),
    "damaged": (
        lambda path: path.write_bytes(b"PAR1" + bytes(100) + b"PAR1"),
        ("members.parquet: not readable as Parquet: ",),
    ),
    "empty_folder": (to_folder(), ("members.parquet: a folder without Parquet files",)),
    "csv_in_folder": (
        to_folder(("part.csv", b"a,b\n1,2\n")),
        ("members.parquet: part.csv: not Parquet: it begins with 'a,b'",),
    ),
    "column_twice": (
        two_columns_of_a_name,
        ("members.parquet: two columns have the same name; give each a name of its own",),
    ),
}


@pytest.mark.parametrize("case", FILES)
def test_a_broken_file(case, refuse, tmp_path):
    spoil, parts = FILES[case]
    folder = write_dataset(tmp_path / "jobs")
    spoil(folder / "members.parquet")
    message = refuse("data", "check", folder)
    check_parts(message, parts)
    assert f"{folder}: 1 problem in the dataset" in message
