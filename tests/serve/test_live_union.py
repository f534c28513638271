"""A union that is changed while it is served is, to the bit, that of the tables which hold the changes."""

from __future__ import annotations

import asyncio
import datetime
from collections.abc import Callable, Iterator

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from brewjax.bundle.bundle import Bundle
from brewjax.data.tables.dataset import Dataset, write_tables
from brewjax.data.tasks.task import Task
from brewjax.serve import ranker_pb2 as pb
from brewjax.serve.catalogue import Catalogue
from brewjax.serve.live import LiveCatalogues
from brewjax.serve.members import render_member
from brewjax.serve.store import FileStore
from tests.data.conftest import moment
from tests.data.test_union import make_task, write_network
from tests.serve.conftest import make_bundle
from tests.serve.test_live_catalogue import NOW, assert_refused, attributes, event, with_changes

HISTORY = "jobs.viewed, jobs.applied, posts.viewed, posts.liked"
WRITTEN = datetime.datetime(2025, 1, 3, tzinfo=datetime.UTC)
# Of each dataset a new item and one that is replaced; a new member, whom the posts alone know, and one whom both know.
JOBS = [
    {"item_id": 900, "title": "Diver", "company": "Umbrella", "salary": 55_000.0},
    {"item_id": 100, "title": "Nurse"},
]
POSTS = [{"item_id": 900, "title": "Deep", "company": "Umbrella", "written": WRITTEN}, {"item_id": 101, "length": 9.5}]
NEWCOMER, MOVED = {"member_id": "m10", "location": "Oslo", "premium": "yes"}, {"member_id": "m7", "location": "Porto"}
JOB_EVENTS = [
    ("m7", 900, "viewed", 320, 12.5),
    ("m7", 100, "applied", 321, None),
    ("m0", 102, "viewed", 4, 7.0),  # of the time of an earlier one, of a post
]
POST_EVENTS = [("m10", 900, "liked", 320, 3.0), ("m7", 900, "viewed", 320, None), ("m3", 101, "liked", 2, 1.0)]


def make_change() -> pb.Change:
    change = pb.Change(members=[make_row(row, "member_id") for row in (NEWCOMER, MOVED)])
    for origin, items, events, column in (
        ("posts", POSTS, POST_EVENTS, "slot"),
        ("jobs", JOBS, JOB_EVENTS, "seconds"),
    ):
        change.items.extend(make_row(row, "item_id", f"{origin}.") for row in items)
        for member, item, action, day, value in events:
            values = {} if value is None else {f"{origin}.{column}": value}
            change.events.append(event(member, f"{origin}.{item}", f"{origin}.{action}", day, **values))
    return change


def make_row(row: dict, key: str, front: str = "") -> pb.Row:
    values = {f"{front}{column}": value for column, value in row.items() if column != key}
    return pb.Row(id=f"{front}{row[key]}", attributes=attributes(**values))


def longer_events(events: list[tuple], column: str) -> Callable[[pa.Table], pa.Table]:
    rows = [
        {"member_id": member, "item_id": item, "action": action, column: value}
        | {"time": datetime.datetime.fromtimestamp(moment(day) / 1e6, datetime.UTC)}
        for member, item, action, day, value in events
    ]
    return lambda table: pa.concat_tables([table, pa.Table.from_pylist(rows, table.schema)])


@pytest.fixture(scope="module")
def union(tmp_path_factory) -> Dataset:
    return Dataset.load(write_network(tmp_path_factory.mktemp("network")) / "union")


@pytest.fixture(scope="module")
def longer(tmp_path_factory) -> Dataset:
    """The union of the tables with the changes in them."""
    folder = write_network(tmp_path_factory.mktemp("longer"))

    def change(name: str, **changes: Callable[[pa.Table], pa.Table]) -> None:
        tables = {table: edit(pq.read_table(folder / name / f"{table}.parquet")) for table, edit in changes.items()}
        write_tables(folder / name, **tables)

    members, items = (lambda rows: with_changes("member_id", rows)), (lambda rows: with_changes("item_id", rows))
    change("jobs", members=members([MOVED]), items=items(JOBS), events=longer_events(JOB_EVENTS, "seconds"))
    change("posts", members=members([MOVED, NEWCOMER]), items=items(POSTS), events=longer_events(POST_EVENTS, "slot"))
    return Dataset.load(folder / "union")


@pytest.fixture(scope="module")
def tasks() -> tuple[Task, ...]:
    likes = make_task("posts.", history=HISTORY, yes="liked").model_copy(update={"name": "likes"})
    return make_task("jobs.", history=HISTORY), likes


@pytest.fixture(scope="module")
def bundle(union, tasks) -> Bundle:
    return make_bundle(union, tasks, max_tokens=2000)


@pytest.fixture
def store(tmp_path) -> Iterator[FileStore]:
    store = FileStore(tmp_path / "changes")
    yield store
    store.close()


def follow(bundle: Bundle, union: Dataset, store: FileStore) -> LiveCatalogues:
    return LiveCatalogues(bundle, {bundle.surface().name: Catalogue.load(union.path, bundle.surface())}, store)


def assert_equal(bundle: Bundle, tasks: tuple[Task, ...], live: LiveCatalogues, longer: Dataset) -> None:
    """Tables and prompts are those of the longer tables."""
    catalogue, expected = live.get(bundle.surface().name), Catalogue(longer)
    for table in ("members", "items", "events"):
        assert getattr(catalogue.dataset, table).combine_chunks() == getattr(longer, table).combine_chunks()
    assert (catalogue.member_rows, catalogue.item_rows) == (expected.member_rows, expected.item_rows)
    for task in tasks:
        rows = longer.items_of(task.questions.actions[0]).nonzero()[0]
        items = [pb.Item(id=longer.item_id(row)) for row in rows]
        for member in longer.members["member_id"].to_pylist():
            question = pb.Member(task=task.name, id=member, items=items)
            question.now.FromMicroseconds(NOW)
            prompt = render_member(bundle, task, question, catalogue)
            assert prompt == render_member(bundle, task, question, expected)


def test_a_live_union_is_that_of_the_longer_tables(bundle, union, tasks, longer, store):
    live = follow(bundle, union, store)
    asyncio.run(live.append(make_change()))
    live.refresh()
    assert_equal(bundle, tasks, live, longer)
    assert longer.item_id(40) == "jobs.900"  # before all posts
    assert_equal(bundle, tasks, follow(bundle, union, store), longer)
    assert_equal(bundle, tasks, follow(bundle, longer, store), longer)


def test_changes_one_by_one_come_to_the_same(bundle, union, tasks, longer, store):
    live, whole = follow(bundle, union, store), make_change()
    for name in ("items", "members", "events"):
        for row in getattr(whole, name):
            asyncio.run(live.append(pb.Change(**{name: [row]})))
            live.refresh()
    assert_equal(bundle, tasks, live, longer)


REFUSED = {
    "items[0].id: '900'; expected jobs.ID or posts.ID": pb.Change(items=[pb.Row(id="900")]),
    "items[0].attributes: 'posts.length' is none of jobs, of which the row is": pb.Change(
        items=[pb.Row(id="jobs.900", attributes=attributes(**{"posts.length": 3}))]
    ),
    "items[0].attributes: no attribute 'jobs.colour'": pb.Change(
        items=[pb.Row(id="jobs.900", attributes=attributes(**{"jobs.colour": "red"}))]
    ),
    "events[0].item: no item '100' in the catalogue": pb.Change(events=[event("m0", "100", "jobs.viewed", 3)]),
    "events[0].action: 'jobs.viewed', but item 'posts.101' is none of jobs": pb.Change(
        events=[event("m0", "posts.101", "jobs.viewed", 3)]
    ),
    "events[0].attributes: 'posts.slot' is none of jobs": pb.Change(
        events=[event("m0", "jobs.101", "jobs.viewed", 3, **{"posts.slot": 1})]
    ),
}


@pytest.mark.parametrize("message", REFUSED)
def test_a_refusal_names_the_field(bundle, union, store, message):
    assert_refused(follow(bundle, union, store), store, REFUSED[message], message)
