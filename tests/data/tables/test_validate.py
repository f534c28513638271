import datetime
import itertools
import re
from pathlib import Path

import hypothesis
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import strategies as st

from brewjax.data.tables.card import CARD, Card
from brewjax.data.tables.dataset import Dataset
from brewjax.data.tables.reading import TEXT, TEXTS
from brewjax.data.tables.validate import DatasetError, read_validated
from tests.tables import put, with_column, write_dataset


def problems(path: Path) -> list[str]:
    """The problems reported, one line each; the first line says only where and how many."""
    try:
        read_validated(path, Card.load(path / CARD))
    except DatasetError as error:
        first, *lines = str(error).splitlines()
        assert first.startswith(f"{path}: {len(lines)} problem")
        return [line.strip() for line in lines]
    return []


def typed(column: str, kind: pa.DataType):
    return lambda table: with_column(column, table[column].cast(kind))(table)


def without(column: str):
    return lambda table: table.drop_columns(column)


def renamed(column: str, name: str):
    return lambda table: table.rename_columns({column: name})


# What is broken -> the line that must say so. One fault per column, so that any of them can go together.
FAULTS = {
    ("members", "member_id"): (
        lambda table: pa.concat_tables([table, table.slice(1, 1)]),
        "members.parquet: column 'member_id': an id that an earlier row has in row 8 ('m1'); give each id one row",
    ),
    ("members", "position"): (
        renamed("position", "Position"),
        "members.parquet: no column 'position'; did you mean 'Position'?",
    ),
    ("members", "experience"): (
        typed("experience", pa.string()),
        "members.parquet: column 'experience': found string, '0' in row 0; expected whole numbers or floats "
        "(pandas.to_numeric(column) makes them)",
    ),
    ("items", "item_id"): (
        lambda table: pa.concat_tables([table, put("item_id", 0, None)(table.slice(0, 1))]),
        "items.parquet: column 'item_id': no id in row 40; every row needs one",
    ),
    ("items", "skills"): (
        put("skills", 6, ["SQL", None]),
        "items.parquet: column 'skills': a null within the list in row 6 (['SQL', None]); leave it out of the list",
    ),
    ("items", "salary"): (
        put("salary", 39, float("inf")),
        "items.parquet: column 'salary': not a number in row 39 (inf); leave it null where it is unknown",
    ),
    ("items", "posted"): (
        typed("posted", pa.string()),
        "items.parquet: column 'posted': found string, '2024-12-01' in row 0; expected dates or timestamps "
        "(pandas.to_datetime(column) makes them)",
    ),
    ("events", "member_id"): (
        put("member_id", 5, "m99"),
        "events.parquet: column 'member_id': unknown member in row 5 ('m99'); "
        "it must be in column 'member_id' of members.parquet",
    ),
    ("events", "item_id"): (
        put("item_id", 8, 7),
        "events.parquet: column 'item_id': unknown item in row 8 (7); it must be in column 'item_id' of items.parquet",
    ),
    ("events", "action"): (
        put("action", 3, "veiwed"),
        "events.parquet: column 'action': unknown action in row 3 ('veiwed'); the card has: viewed, applied",
    ),
    ("events", "time"): (
        put("time", 2, None),
        "events.parquet: column 'time': no time in row 2; every event needs one",
    ),
    ("events", "seconds"): (
        put("seconds", 1, float("nan")),
        "events.parquet: column 'seconds': not a number in row 1 (nan); leave it null where it is unknown",
    ),
}


def apply_all(changes: list):
    def change(table: pa.Table) -> pa.Table:
        for step in changes:
            table = step(table)
        return table

    return change


def test_a_valid_dataset_loads(tmp_path):
    dataset = Dataset.load(write_dataset(tmp_path))
    assert (len(dataset.members), len(dataset.items), len(dataset.events)) == (8, 40, 80)


@hypothesis.given(st.sets(st.sampled_from(sorted(FAULTS)), min_size=1))
@hypothesis.settings(max_examples=40, deadline=None)
def test_every_fault_is_reported_and_nothing_else(tmp_path_factory, broken):
    changes = {
        name: apply_all([FAULTS[f][0] for f in broken if f[0] == name]) for name in ("members", "items", "events")
    }
    lines = problems(write_dataset(tmp_path_factory.mktemp("faults"), **changes))
    assert sorted(lines) == sorted(FAULTS[fault][1] for fault in broken)


@hypothesis.given(cuts=st.sets(st.integers(1, 79), max_size=5), row=st.integers(0, 79))
@hypothesis.settings(max_examples=30, deadline=None)
def test_rows_of_a_folder_are_named_by_file(tmp_path_factory, cuts, row):
    path = write_dataset(tmp_path_factory.mktemp("folder"))
    events = put("action", row, "veiwed")(pq.read_table(path / "events.parquet"))
    (path / "events.parquet").unlink()
    (path / "events.parquet").mkdir()
    bounds = [0, *sorted(cuts), len(events)]
    for part, (start, end) in enumerate(itertools.pairwise(bounds)):
        pq.write_table(events.slice(start, end - start), path / "events.parquet" / f"part-{part}.parquet")
    part = int(np.searchsorted(bounds, row, side="right")) - 1
    assert problems(path) == [
        f"events.parquet: column 'action': unknown action in row {row - bounds[part]} of part-{part}.parquet "
        "('veiwed'); the card has: viewed, applied"
    ]


def test_three_rows_are_shown_and_the_rest_counted(tmp_path):
    path = write_dataset(tmp_path, events=apply_all([put("time", row, None) for row in range(10, 60)]))
    assert problems(path) == [
        "events.parquet: column 'time': no time in row 10, row 11, row 12 and 47 more; every event needs one"
    ]


@pytest.mark.parametrize("spoil", [lambda file: file.unlink(), lambda file: file.write_bytes(b"PAR1 no more")])
def test_a_missing_or_unreadable_file_does_not_hide_the_rest(tmp_path, spoil):
    path = write_dataset(tmp_path, events=put("action", 3, "veiwed"))
    spoil(path / "members.parquet")
    about_members, about_events = problems(path)
    assert about_members.startswith("members.parquet: ")
    assert "unknown action in row 3" in about_events


def test_a_misnamed_file_is_guessed(tmp_path):
    path = write_dataset(tmp_path, card=lambda text: text.replace("items:\n", "items:\n  file: itmes.parquet\n", 1))
    assert f"itmes.parquet: no such file or folder in {path}; did you mean 'items.parquet'?" in problems(path)


def test_an_empty_table_is_refused(tmp_path):
    assert problems(write_dataset(tmp_path, events=lambda table: table.slice(0, 0))) == [
        "events.parquet: no rows; expected at least one"
    ]
    lines = problems(write_dataset(tmp_path, members=lambda table: table.slice(0, 0)))
    assert lines[0] == "members.parquet: no rows; expected at least one"


def test_a_folder_without_parquet_files_is_refused(tmp_path):
    path = write_dataset(tmp_path)
    (path / "items.parquet").unlink()
    (path / "items.parquet").mkdir()
    assert problems(path) == ["items.parquet: a folder without Parquet files"]


@pytest.mark.parametrize(
    ("table", "change", "line"),
    [
        ("members", put("member_id", 0, None), "members.parquet: column 'member_id': no id in row 0"),
        ("events", put("member_id", 0, None), "events.parquet: column 'member_id': no member in row 0"),
        ("events", put("item_id", 0, None), "events.parquet: column 'item_id': no item in row 0"),
        ("events", put("action", 0, None), "events.parquet: column 'action': no action in row 0"),
        ("events", without("time"), "events.parquet: no column 'time'; there are: member_id, item_id, action, seconds"),
        ("events", typed("item_id", pa.float64()), "events.parquet: column 'item_id': found double"),
        ("events", typed("time", pa.int64()), "events.parquet: column 'time': found int64"),
        (
            "events",
            typed("item_id", pa.string()),
            "events.parquet: column 'item_id': found string where column 'item_id' of items.parquet is int64; "
            "make both the same",
        ),
        ("items", typed("title", pa.binary()), "items.parquet: column 'title': found binary"),
        ("items", with_column("skills", pa.array([1] * 40)), "items.parquet: column 'skills': found int64"),
    ],
)
def test_one_fault_one_line(tmp_path, table, change, line):
    (problem,) = problems(write_dataset(tmp_path, **{table: change}))
    assert problem.startswith(line)


def test_other_widths_encodings_and_zones_read_as_the_same_tables(tmp_path):
    plain = Dataset.load(write_dataset(tmp_path / "plain"))
    text = pa.dictionary(pa.int32(), pa.string())
    recoded = Dataset.load(
        write_dataset(
            tmp_path / "other",
            members=apply_all(
                [typed("member_id", pa.large_string()), typed("company", text), typed("experience", pa.int8())]
            ),
            items=apply_all(
                [
                    typed("item_id", pa.uint16()),
                    typed("posted", pa.date64()),
                    typed("skills", pa.large_list(pa.large_string())),
                ]
            ),
            events=apply_all(
                [
                    typed("member_id", text),
                    typed("item_id", pa.int32()),
                    typed("action", text),
                    typed("time", pa.timestamp("ns", "America/New_York")),
                ]
            ),
        )
    )
    for name in ("members", "items", "events"):
        assert getattr(plain, name).equals(getattr(recoded, name)), name


def test_unknown_attributes_may_be_null_even_all_of_them(tmp_path):
    columns = ("title", "skills", "salary", "posted")
    path = write_dataset(tmp_path, items=apply_all([with_column(column, pa.nulls(40)) for column in columns]))
    items = Dataset.load(path).items
    assert [items[column].type for column in columns] == [TEXT, TEXTS, pa.float64(), pa.date32()]


def test_a_date_can_be_a_timestamp(tmp_path):
    posted = pa.array([datetime.datetime(2025, 1, 1)] * 40, pa.timestamp("ms"))
    assert problems(write_dataset(tmp_path, items=with_column("posted", posted))) == []


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("mean: seconds", "mean: second,", "events have no column 'second'; did you mean 'seconds'?"),
        ("mean: seconds", "mean: action,", "column 'action' of events.parquet is string; only numbers have a mean"),
        ("count: [applied]", "count: [aplied]", "unknown action 'aplied'; did you mean 'applied'?"),
    ],
)
def test_faults_of_the_card_name_its_line(tmp_path, old, new, message):
    path = write_dataset(tmp_path, card=lambda text: text.replace(old, new.rstrip(",")))
    with pytest.raises(ValueError, match=re.escape(message)) as error:
        Dataset.load(path)
    number = 1 + next(i for i, text in enumerate((path / CARD).read_text().splitlines()) if new in text)
    assert f"{path / CARD}:{number}: " in str(error.value)


def test_a_column_that_only_a_mean_needs_is_checked_too(tmp_path):
    path = write_dataset(
        tmp_path,
        events=put("seconds", 1, float("nan")),
        card=lambda text: re.sub(r"  attributes:\n    - \{column: seconds.*\n", "", text),
    )
    assert problems(path) == [FAULTS["events", "seconds"][1]]


@pytest.mark.parametrize("kind", [pa.date32(), pa.timestamp("ns")])
def test_whole_days_may_be_of_january_1970(tmp_path, kind):
    posted = pa.array([datetime.date(1970, 1, 5)] * 40).cast(kind)
    assert problems(write_dataset(tmp_path, items=with_column("posted", posted))) == []


def test_a_few_events_may_be_within_a_minute(tmp_path):
    def soon(events: pa.Table) -> pa.Table:
        first = events.slice(0, 8)
        time = pa.array(1_700_000_000_000_000 + np.arange(8), pa.timestamp("us", "UTC"))
        return with_column("time", time)(first)

    assert problems(write_dataset(tmp_path, events=soon)) == []


@hypothesis.given(st.lists(st.integers(0, 79), min_size=1, max_size=5), st.booleans())
@hypothesis.settings(max_examples=20, deadline=None)
def test_every_repeated_event_is_counted(tmp_path_factory, rows, with_a_list):
    def repeat(events: pa.Table) -> pa.Table:
        if with_a_list:
            events = events.append_column("tags", pa.array([["x"] * (row % 3) for row in range(80)]))
        return pa.concat_tables([events, events.take(rows)])

    (line,) = problems(write_dataset(tmp_path_factory.mktemp("twice"), events=repeat))
    assert line.startswith(
        f"events.parquet: {len(rows)} of {80 + len(rows)} rows are the same in every column as an earlier"
    )
    assert "row 80" in line
