"""A member who is typed is read as if the tables had it."""

from __future__ import annotations

import dataclasses
import datetime

import numpy as np
import pyarrow as pa
import pytest

from brewjax.data.tables.dataset import Dataset
from brewjax.explore.cases import Case, make_case
from brewjax.explore.explorer import Explorer
from brewjax.explore.typed_member import add_member
from tests.explore.conftest import ZOOKEEPER
from tests.tables import append, put, write_dataset

LINES = ["viewed: 101 | seconds=30", "", f"applied: {ZOOKEEPER}", "viewed: zookeeper | seconds=5"]


def test_it_is_read_as_if_the_tables_had_it(explorer, jobs, bundle, tmp_path):
    """Its history and its facts, and those of the items that it had events with."""
    typed = explorer.context(typed_events=LINES, items=5).change(profile={"position": "Nurse"})
    days = [datetime.timedelta(days=days) for days in (3, 2, 1)]
    last = np.datetime64(jobs.last_event_time + 1, "us").item().replace(tzinfo=datetime.UTC)
    rows = [
        {"member_id": "new", "item_id": item, "action": action, "time": last - before, "seconds": seconds}
        for item, action, seconds, before in zip(
            (101, ZOOKEEPER, ZOOKEEPER), ("viewed", "applied", "viewed"), (30, None, 5), days, strict=True
        )
    ]
    folder = write_dataset(
        tmp_path,
        members=append([{"member_id": "new", "position": "Nurse"}]),
        items=put("title", ZOOKEEPER - 100, "Zookeeper"),
        events=append(rows),
    )
    stored = Explorer(bundle, Dataset.load(folder)).context("new", items=typed.item_ids)
    assert typed.text == stored.text
    assert "Zookeeper" in "".join(typed.text.events)
    assert typed.describe_events(typed.in_budget) == stored.describe_events(stored.in_budget)


def test_a_member_without_events(explorer):
    context = explorer.context(typed_events=[], items=3)
    assert not len(context.example.history)
    assert len(context.rank()) == 3


def test_a_new_id_is_an_id(jobs):
    """Of the column's type, and nobody's."""
    assert add_member(jobs, [], 0).member_id(-1) == "new"
    for ids, new in ((["new", *"abcdefg"], "new'"), (range(8), "8")):
        members = jobs.members.set_column(0, "member_id", pa.array(ids))
        dataset = dataclasses.replace(jobs, members=members, events=jobs.events.slice(0, 0))
        assert add_member(dataset, [], 0).member_id(-1) == new


def test_a_case_holds_what_was_typed(explorer):
    context = explorer.context(typed_events=LINES, items=3, note="Calm.").change(profile={"location": "Oslo"})
    line = make_case(context).model_dump_json(exclude_defaults=True)
    assert '"member"' not in line
    assert Case.parse(line).context(explorer).text == context.text


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("Zookeeper", "line 1: 'Zookeeper' begins with no action; viewed:, applied:"),
        ("viewed: Astronaut", "line 1: no job has the id or name 'Astronaut'"),
        ("viewed: nurse", "line 1: .* jobs are 'nurse': .*; give the id"),
        ("viewed: 101 | second=3", "line 1: 'second=3': expected COLUMN=VALUE; did you mean 'seconds'"),
        ("viewed: 101 | seconds=long", "line 1: seconds: 'long' is no number"),
    ],
)
def test_what_is_wrong_is_named(explorer, line, message):
    with pytest.raises(ValueError, match=message):
        explorer.context(typed_events=[line], items=3)


def test_a_member_is_of_the_tables_or_typed(explorer):
    for settings in ({}, {"member": "m5", "typed_events": []}):
        with pytest.raises(ValueError, match="either a member's id or typed events"):
            explorer.context(**settings)
