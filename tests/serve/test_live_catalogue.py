"""A catalogue that is changed while it is served is, to the bit, that of tables which hold the changes."""

from __future__ import annotations

import asyncio
import contextlib
import datetime
import gc
import shutil
import signal
import subprocess
import threading
import weakref
from collections.abc import Callable, Iterator
from pathlib import Path

import grpc
import httpx
import numpy as np
import pyarrow as pa
import pytest

from brewjax.config import ConfigError
from brewjax.data.tables.dataset import Dataset
from brewjax.data.tasks.examples import example_at
from brewjax.retrieve.encoder import Encoder, EncoderConfig
from brewjax.serve import Client
from brewjax.serve import ranker_pb2 as pb
from brewjax.serve.catalogue import Catalogue
from brewjax.serve.changes import read_rows
from brewjax.serve.config import ServeConfig
from brewjax.serve.encoding import RequestEncoder
from brewjax.serve.live import LiveCatalogues
from brewjax.serve.members import render_member
from brewjax.serve.refusals import status_of
from brewjax.serve.requests import request_from_example
from brewjax.serve.retriever_pb2 import IndexedItem
from brewjax.serve.server import Server
from brewjax.serve.store import FileStore, RedisStore, StoreError, open_store
from tests.data.conftest import moment
from tests.serve.serving import ADMIN_TOKEN, CONFIG, eventually, probabilities, refusal, running
from tests.serve.test_operation import Process, free_port
from tests.tables import write_dataset

Code = grpc.StatusCode
NOW = moment(340)


def value(value: object) -> pb.Value:
    match value:
        case str():
            return pb.Value(text=value)
        case int():
            return pb.Value(integer=value)
        case float():
            return pb.Value(number=value)
        case list():
            return pb.Value(list=pb.Texts(values=value))
        case datetime.date():
            date = pb.Value()
            date.date.FromDatetime(datetime.datetime(value.year, value.month, value.day))
            return date
    raise AssertionError(value)


def attributes(**values: object) -> dict[str, pb.Value]:
    return {column: value(of) for column, of in values.items()}


def event(member: str, item: str, action: str, day: float, **values: object) -> pb.RecordedEvent:
    recorded = pb.RecordedEvent(member=member, item=item, action=action, attributes=attributes(**values))
    recorded.time.FromMicroseconds(moment(day))
    return recorded


POSTED = datetime.date(2025, 10, 1)
# A new job, and the first one with another salary; a new member, and one who moved.
ITEMS = [
    {
        "item_id": 900,
        "title": "Diver",
        "company": "Globex",
        "skills": ["Care", "SQL"],
        "salary": 55_000,
        "posted": POSTED,
    },
    {
        "item_id": 100,
        "title": "Chief Nurse",
        "company": "Acme",
        "location": "Oslo",
        "skills": ["Care"],
        "salary": 91_500.5,
    },
]
MEMBERS = [{"member_id": "m8", "position": "Diver", "experience": 3}, {"member_id": "m7", "location": "Porto"}]
EVENTS = [
    ("m7", "900", "viewed", 320, 12.5),
    ("m8", "900", "applied", 321, None),
    ("m7", "101", "applied", 322, 7),
    ("m8", "100", "viewed", 321, 30),  # of the time of an earlier one
    ("m3", "900", "applied", 5, 1),  # late: older than what is there
]


def make_change(surface: str = "jobs") -> pb.Change:
    def rows(values: list[dict], id_column: str) -> list[pb.Row]:
        return [
            pb.Row(id=str(row[id_column]), attributes=attributes(**{k: v for k, v in row.items() if k != id_column}))
            for row in values
        ]

    events = [event(*key, **({} if seconds is None else {"seconds": seconds})) for *key, seconds in EVENTS]
    return pb.Change(surface=surface, items=rows(ITEMS, "item_id"), members=rows(MEMBERS, "member_id"), events=events)


def with_changes(key: str, added: list[dict]) -> Callable[[pa.Table], pa.Table]:
    """A table with rows that replace those of their id, or stand at its end."""

    def change(table: pa.Table) -> pa.Table:
        rows = table.to_pylist()
        place = {row[key]: number for number, row in enumerate(rows)}
        for row in added:
            whole = dict.fromkeys(table.column_names) | row
            if row[key] in place:
                rows[place[row[key]]] = whole
            else:
                rows.append(whole)
        return pa.Table.from_pylist(rows, table.schema)

    return change


def longer_events(table: pa.Table) -> pa.Table:
    rows = [
        {"member_id": member, "item_id": int(item), "action": action, "seconds": seconds}
        | {"time": datetime.datetime.fromtimestamp(moment(day) / 1e6, datetime.UTC)}
        for member, item, action, day, seconds in EVENTS
    ]
    return pa.concat_tables([table, pa.Table.from_pylist(rows, table.schema)])


@pytest.fixture(scope="module")
def longer(tmp_path_factory) -> Dataset:
    """The tables with the changes in them."""
    items, members = with_changes("item_id", ITEMS), with_changes("member_id", MEMBERS)
    folder = tmp_path_factory.mktemp("longer")
    return Dataset.load(write_dataset(folder, items=items, members=members, events=longer_events))


@pytest.fixture
def store(tmp_path) -> Iterator[FileStore]:
    store = FileStore(tmp_path / "changes")
    yield store
    store.close()


def follow(bundle, dataset, store) -> LiveCatalogues:
    """The catalogue of the dataset with a store's changes, that is refreshed when the test wants it."""
    return LiveCatalogues(bundle, {"jobs": Catalogue.load(dataset.path, bundle.surface())}, store)


def ask_by_id(dataset: Dataset, member: str, task: str = "apply", now: int = NOW) -> pb.Member:
    items = [pb.Item(id=str(id_)) for id_ in dataset.items["item_id"].to_pylist()]
    question = pb.Member(task=task, id=member, items=items)
    question.now.FromMicroseconds(now)
    return question


def assert_equal(bundle, tasks, catalogue: Catalogue, longer: Dataset) -> None:
    """Tables, prompts and what is new to a member are those of the longer tables."""
    expected = Catalogue(longer)
    for table in ("members", "items", "events"):
        assert getattr(catalogue.dataset, table).combine_chunks() == getattr(longer, table).combine_chunks()
    for task in tasks:
        for member in longer.members["member_id"].to_pylist():
            question = ask_by_id(longer, member, task.name)
            prompt = render_member(bundle, task, question, catalogue)
            assert prompt == render_member(bundle, task, question, expected)
            example = catalogue.example(task, question)
            assert catalogue.past_items(example) == expected.past_items(example)


# --- without a server


def test_changes_are_read_as_rows_of_the_tables(bundle, dataset, tasks, longer, store):
    live = follow(bundle, dataset, store)
    before = live.get("jobs")
    shown = render_member(bundle, tasks[0], ask_by_id(dataset, "m7"), before)
    asyncio.run(live.append(make_change()))
    live.refresh()
    assert_equal(bundle, tasks, live.get("jobs"), longer)
    assert "Diver" in render_member(bundle, tasks[0], ask_by_id(longer, "m7"), live.get("jobs")).render()
    # What a request began with is what it ends with.
    request = pb.ScoreRequest(member=ask_by_id(dataset, "m7"), truncation="TRUNCATE")
    encoder = RequestEncoder(bundle, "tiny@1", {}, CONFIG, 600, live)
    assert encoder.encode(request, 100, before).prompt == bundle.encode(shown)
    assert encoder.encode(request, 100).prompt != bundle.encode(shown)


def test_changes_one_by_one_come_to_the_same(bundle, dataset, tasks, longer, store):
    """Read at a start, or refreshed after each; sent twice, or in the tables already."""
    live, whole = follow(bundle, dataset, store), make_change()
    for name in ("items", "members", "events"):
        for row in getattr(whole, name):
            change = pb.Change(**{name: [row]})
            asyncio.run(live.append(change))
            if name == "events":
                asyncio.run(live.append(change))
            live.refresh()
    assert_equal(bundle, tasks, live.get("jobs"), longer)
    assert_equal(bundle, tasks, follow(bundle, dataset, store).get("jobs"), longer)
    assert_equal(bundle, tasks, follow(bundle, longer, store).get("jobs"), longer)


def test_what_another_server_added_a_moment_ago_is_known(bundle, dataset, tasks, longer, store):
    first, second, change = follow(bundle, dataset, store), follow(bundle, dataset, store), make_change()
    asyncio.run(first.append(pb.Change(items=change.items, members=change.members)))
    asyncio.run(second.append(pb.Change(events=change.events)))
    for live in (first, second):
        live.refresh()
        assert_equal(bundle, tasks, live.get("jobs"), longer)


def test_an_event_of_the_same_request_as_the_first_is_counted_once(bundle, dataset, store):
    live, once = follow(bundle, dataset, store), event("m0", "100", "viewed", 3, seconds=1)
    again = event("m0", "100", "viewed", 3, seconds=2)
    asyncio.run(live.append(pb.Change(events=[once, again, event("m0", "100", "applied", 3)])))
    live.refresh()
    events = live.get("jobs").dataset.events
    assert events.slice(0, 2)["seconds"].to_pylist() == [1, None]
    assert len(events) == len(dataset.events) + 2


def test_events_of_the_tables_that_differ_in_an_attribute_alone_stay(bundle, store, tmp_path):
    def repeat(table: pa.Table) -> pa.Table:
        again = table.slice(0, 1).set_column(table.column_names.index("seconds"), "seconds", pa.array([0.5]))
        return pa.concat_tables([table, again])

    tables = Dataset.load(write_dataset(tmp_path / "jobs", events=repeat))
    row = tables.events.to_pylist()[tables.events["seconds"].to_pylist().index(0.5)]
    live, now = follow(bundle, tables, store), pb.RecordedEvent(member=row["member_id"], item="139", action="viewed")
    now.time.FromMicroseconds(NOW)
    asyncio.run(live.append(pb.Change(events=[now])))
    live.refresh()
    assert len(live.get("jobs").dataset.events) == len(tables.events) + 1


def test_a_catalogue_that_was_replaced_is_freed_at_once(bundle, dataset, store):
    """A server runs the garbage collector only when it has time."""
    live = follow(bundle, dataset, store)
    old = weakref.ref(live.get("jobs").dataset)
    asyncio.run(live.append(make_change()))
    gc.disable()
    try:
        live.refresh()
        assert old() is None
    finally:
        gc.enable()


def test_what_does_not_fit_any_more_is_left_out_and_counted(bundle, dataset, tasks, longer, store):
    """Other changes of the store are read all the same; those of other surfaces are for other servers."""
    store.append([b"\xff", make_change("films").SerializeToString()])
    store.append([pb.Change(surface="jobs", events=[event("gone", "100", "viewed", 3)]).SerializeToString()])
    store.append([make_change().SerializeToString()])
    live = follow(bundle, dataset, store)
    assert live._metrics.registry.get_sample_value("brewjax_catalogue_failures_total", {"reason": "change"}) == 2
    assert_equal(bundle, tasks, live.get("jobs"), longer)


def test_an_event_may_have_all_columns_that_the_card_names(tmp_path):
    """A request, and what facts alone read; others of the table are unknown."""

    def card(text: str) -> str:
        return text.replace("events:\n", "events:\n  request: visit\n").replace("mean: seconds", "mean: price")

    columns = {"visit": [7] * 80, "price": [1.5] * 80, "browser": ["lynx"] * 80}

    def add(table: pa.Table) -> pa.Table:
        for name, values in columns.items():
            table = table.append_column(name, pa.array(values))
        return table

    tables = Dataset.load(write_dataset(tmp_path / "jobs", card=card, events=add))
    change = pb.Change(events=[event("m0", "100", "viewed", 3, visit=8, price=2)])
    (row,) = read_rows(change, tables, lambda _: True, lambda _: True).events.to_pylist()
    assert {name: row[name] for name in columns} == {"visit": 8, "price": 2.0, "browser": None}
    assert (row["member_id"], row["item_id"], row["action"], row["seconds"]) == ("m0", 100, "viewed", None)


REFUSED = {
    "surface: no surface 'films'": pb.Change(surface="films"),
    "events[0].member: no member 'nobody' in the catalogue; UpsertMembers adds it": pb.Change(
        events=[event("nobody", "100", "viewed", 3)]
    ),
    "events[1].item: no item '7' in the catalogue; UpsertItems adds it": pb.Change(
        events=[event("m0", "100", "viewed", 3), event("m0", "7", "viewed", 3)]
    ),
    "events[0].action: no action 'bought'; actions: viewed, applied": pb.Change(
        events=[event("m0", "100", "bought", 3)]
    ),
    "events[0].time: missing": pb.Change(events=[pb.RecordedEvent(member="m0", item="100", action="viewed")]),
    "events[0].time: after the year 2199": pb.Change(events=[event("m0", "100", "viewed", 1e5)]),
    "events[0].attributes: no attribute 'stars'; attributes: seconds": pb.Change(
        events=[event("m0", "100", "viewed", 3, stars=3)]
    ),
    "events[0].attributes['seconds']: a text; for a number give integer or number": pb.Change(
        events=[event("m0", "100", "viewed", 3, seconds="long")]
    ),
    "events[0].attributes['seconds']: nan; leave it out": pb.Change(
        events=[event("m0", "100", "viewed", 3, seconds=float("nan"))]
    ),
    "items[1].id: empty": pb.Change(items=[pb.Row(id="1"), pb.Row(id=" ")]),
    "items[0].id: 'x7'; the catalogue's column is int64": pb.Change(items=[pb.Row(id="x7")]),
    "items[0].attributes: no attribute 'colour'": pb.Change(
        items=[pb.Row(id="1", attributes=attributes(colour="red"))]
    ),
    "items[0].attributes['skills']: an empty text within the list": pb.Change(
        items=[pb.Row(id="1", attributes=attributes(skills=["Care", " "]))]
    ),
    "members[0].attributes['experience']: 2.5; the catalogue's column is int64": pb.Change(
        members=[pb.Row(id="m1", attributes=attributes(experience=2.5))]
    ),
}


def assert_refused(live: LiveCatalogues, store: FileStore, change: pb.Change, message: str) -> None:
    """The change is refused in these words, and nothing of it is stored."""
    with pytest.raises(ValueError) as error:  # noqa: PT011 (compared below: the messages are full of brackets)
        asyncio.run(live.append(change))
    assert str(error.value).startswith(message)
    assert store.read("") == ([], "")


@pytest.mark.parametrize("message", REFUSED)
def test_a_refusal_names_the_field(bundle, dataset, store, message):
    assert_refused(follow(bundle, dataset, store), store, REFUSED[message], message)


def test_a_folder_is_one_servers(store, tmp_path):
    with pytest.raises(StoreError, match="changes is open elsewhere; several servers share a Redis"):
        open_store(str(tmp_path / "changes"))


# --- a server


@pytest.fixture(scope="module")
def secret(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("secrets") / "admin"
    path.write_text(ADMIN_TOKEN)
    return path


@pytest.fixture(scope="module")
def settings(secret) -> dict[str, object]:
    return {
        "admin_token_file": str(secret),
        "refresh_seconds": 0.02,
        "token_buckets": (256,),
        "max_candidate_tokens": 256,
    }


@pytest.fixture(scope="module")
def server(bundle, model_folder, tmp_path_factory, settings) -> Iterator[Server]:
    folder = tmp_path_factory.mktemp("live")
    Encoder(bundle, EncoderConfig()).save(folder / "encoder")
    update = settings | {
        "catalogue": str(write_dataset(folder / "jobs")),
        "changes": str(folder / "changes"),
        "encoder": str(folder / "encoder"),
        "index": str(folder / "index"),
    }
    with running(model_folder, CONFIG.model_copy(update=update)) as server:
        yield server


@pytest.fixture(scope="module")
def client(server) -> Iterator[Client]:
    with Client(f"127.0.0.1:{server.port}", ADMIN_TOKEN) as client:
        yield client


def num_events(server: Server) -> int:
    return len(server.service.catalogues.get("jobs").dataset.events)


def record(client: Client, change: pb.Change) -> None:
    assert client.upsert_items(change.items).rows == len(change.items)
    assert client.upsert_members(change.members).rows == len(change.members)
    assert client.record_events(change.events, request_id="r1").request_id == "r1"


def test_a_server_reads_what_is_recorded_as_from_longer_tables(bundle, server, client, tasks, longer):
    """The prompt to the bit; so the score of the new item is that of the member sent in full."""
    record(client, make_change())
    eventually(lambda: num_events(server) == len(longer.events))
    assert_equal(bundle, tasks, server.service.catalogues.get("jobs"), longer)
    member = longer.member_row("m2")
    full = request_from_example(longer, tasks[0], example_at(longer, tasks[0], member, NOW))
    by_id = pb.Member(task="apply", id="m2", now=full.now, items=[pb.Item(id=item.id) for item in full.items])
    assert "900" in {item.id for item in by_id.items}
    np.testing.assert_allclose(probabilities(client.score(by_id)), probabilities(client.score(full)), atol=1e-5)
    read = lambda name, **labels: server.service.metrics.registry.get_sample_value(name, labels)  # noqa: E731
    eventually(lambda: read("brewjax_catalogue_lag_seconds_count") == 3)
    assert read("brewjax_catalogue_rows", surface="jobs", table="items") == len(longer.items)
    assert read("brewjax_catalogue_refresh_seconds_count") >= 1


def test_retrieval_leaves_out_what_the_member_has_had_by_now(server, client):
    client.upsert([IndexedItem(id=id_, text=f"job {id_}") for id_ in ("100", "105", "110", "111")])
    member = pb.Member(task="apply", id="m0")
    assert {hit.id for hit in client.retrieve_and_score(member, 10).hits} == {"100", "105", "110", "111"}
    before = num_events(server)
    client.record_events([event("m0", "105", "viewed", 320), event("m0", "111", "applied", 321)])
    eventually(lambda: num_events(server) == before + 2)
    assert {hit.id for hit in client.retrieve_and_score(member, 10).hits} == {"100", "110"}


def test_over_http(server, client):
    url, before = f"http://127.0.0.1:{server.http_port}/v1", num_events(server)
    body = {"member": "m1", "item": "103", "action": "viewed", "time": "2025-11-02T10:00:00Z"}
    with httpx.Client(headers={"authorization": f"Bearer {ADMIN_TOKEN}"}, timeout=60) as http:
        item = {"id": "901", "attributes": {"title": {"text": "Baker"}}}
        assert http.post(f"{url}/upsert_items", json={"items": [item]}).json()["rows"] == 1
        assert http.post(f"{url}/upsert_members", json={"members": [{"id": "m9"}]}).json()["rows"] == 1
        events = [body, body | {"item": "901", "member": "m9", "attributes": {"seconds": {"number": 2.5}}}]
        assert http.post(f"{url}/record_events", json={"events": events}).json()["rows"] == 2
        refused = http.post(f"{url}/record_events", json={"events": [body | {"action": "bought"}]})
        assert (refused.status_code, refused.json()["message"][:37]) == (400, "events[0].action: no action 'bought';")
        assert http.post(f"{url}/record_events", json={}).json()["message"] == "events: none; give at least one"
    assert httpx.post(f"{url}/record_events", json={"events": events}).status_code == 403
    eventually(lambda: num_events(server) == before + 2)


def test_a_change_needs_the_admin_token_and_a_store(server, strict):
    call = lambda client: client.record_events([event("m0", "100", "viewed", 3)])  # noqa: E731
    with Client(f"127.0.0.1:{server.port}") as anyone:
        for attempt in (call, lambda c: c.upsert_items([pb.Row(id="1")]), lambda c: c.upsert_members([pb.Row(id="m")])):
            assert refusal(attempt, anyone)[0] is Code.PERMISSION_DENIED
    with Client(f"127.0.0.1:{strict.port}", ADMIN_TOKEN) as admin:
        message = "this server takes no changes of this surface (set `catalogue` and `changes`)"
        assert refusal(call, admin) == (Code.INVALID_ARGUMENT, message)


def test_a_reload_reads_tables_and_store(server, client, bundle, tasks, longer, tmp_path):
    """Tables that hold the changes by now count none twice; and what comes later is followed as before."""
    before, folder = num_events(server), Path(server.config.catalogue)
    shutil.copytree(folder, tmp_path / "jobs")
    shutil.copytree(longer.path, folder, dirs_exist_ok=True)
    try:
        client.reload()
        assert num_events(server) == before
        client.record_events([event("m2", "102", "viewed", 330)])
        eventually(lambda: num_events(server) == before + 1)
    finally:
        shutil.copytree(tmp_path / "jobs", folder, dirs_exist_ok=True)
        client.reload()
    assert num_events(server) == before + 1


def test_changes_need_a_catalogue_with_times(bundle, model_folder, store, tmp_path, settings):
    without = write_dataset(tmp_path / "jobs", card=lambda text: text.replace("events:\n", "events:\n  time: null\n"))
    with pytest.raises(ConfigError, match="changes: the events of surface 'jobs' have no times"):
        LiveCatalogues(bundle, {"jobs": Catalogue(Dataset.load(without))}, store)
    with pytest.raises(ValueError, match="changes: give the catalogue too that they are of"):
        ServeConfig(changes=str(tmp_path))
    folder = tmp_path / "file"
    folder.write_text("")
    update = settings | {"changes": str(folder)}
    with pytest.raises(ConfigError, match=r"changes: .*file"):
        Server(model_folder, CONFIG.model_copy(update=update))


@pytest.mark.long
def test_a_kill_loses_nothing_that_was_acknowledged(model_folder, dataset, secret, tmp_path, settings):
    """The process is killed while events arrive; the next server reads all that were acknowledged."""
    changes, port = tmp_path / "changes", free_port()
    common = {"catalogue": dataset.path, "changes": changes, "admin_token_file": secret, "decode": "false"}
    process = Process(model_folder, tmp_path / "log", **common, port=port, http_port="null")
    acknowledged: list[int] = []

    def send(client: Client) -> None:
        while True:
            recorded = event("m0", str(100 + len(acknowledged) % 40), "viewed", 10 + len(acknowledged) / 1000)
            client.record_events([recorded], timeout=10)
            acknowledged.append(recorded.time.ToMicroseconds())

    try:
        process.ready()
        with Client(f"localhost:{port}", ADMIN_TOKEN) as client:
            sending = threading.Thread(target=lambda: refusal(send, client))
            sending.start()
            eventually(lambda: len(acknowledged) > 200)
            process.signal(signal.SIGKILL)
            sending.join()
    finally:
        process.kill()
    update = settings | {"catalogue": str(dataset.path), "changes": str(changes)}
    with running(model_folder, CONFIG.model_copy(update=update)) as server:
        tables = server.service.catalogues.get("jobs").dataset
        stored = tables.event_time[: tables.member_offsets[1]].tolist()
    assert stored[: len(acknowledged)] == acknowledged
    assert len(stored) <= len(acknowledged) + 1  # the last one may have been written and not acknowledged


# --- Redis


@contextlib.contextmanager
def running_redis(folder: Path, port: int) -> Iterator[subprocess.Popen]:
    """Redis, with what it acknowledges in the folder."""
    pytest.importorskip("redis", reason="no client of Redis: pip install 'brewjax[redis]'")
    if not shutil.which("redis-server"):
        pytest.skip("no redis-server: apt-get install redis-server")
    command = ["redis-server", "--port", str(port), "--dir", str(folder), "--appendonly", "yes"]
    process = subprocess.Popen([*command, "--appendfsync", "always"], stdout=subprocess.DEVNULL)
    try:
        eventually(lambda: process.poll() is None and answers(port))
        yield process
    finally:
        process.kill()
        process.wait()


@pytest.fixture(scope="module")
def redis_port(tmp_path_factory) -> Iterator[int]:
    port = free_port()
    with running_redis(tmp_path_factory.mktemp("redis"), port):
        yield port


def answers(port: int) -> bool:
    try:
        RedisStore(f"redis://localhost:{port}/0").close()
    except StoreError:
        return False
    return True


def test_servers_of_one_redis_read_each_others_changes(
    redis_port, bundle, model_folder, dataset, tasks, longer, settings
):
    update = settings | {"catalogue": str(dataset.path), "changes": f"redis://localhost:{redis_port}/0#shared"}
    change, config = make_change(), CONFIG.model_copy(update=update)
    with (
        running(model_folder, config) as first,
        running(model_folder, config) as second,
        Client(f"127.0.0.1:{first.port}", ADMIN_TOKEN) as client,
        Client(f"127.0.0.1:{second.port}", ADMIN_TOKEN) as other_client,
    ):
        client.upsert_items(change.items)
        client.upsert_members(change.members)
        other_client.record_events(change.events[:2])  # of rows that the other server acknowledged just now
        client.record_events(change.events)
        for server in (first, second):
            eventually(lambda server=server: num_events(server) == len(longer.events))
            assert_equal(bundle, tasks, server.service.catalogues.get("jobs"), longer)


def test_a_redis_is_read_in_order_from_any_position(redis_port, monkeypatch):
    monkeypatch.setattr("brewjax.serve.store.READ_AT_ONCE", 3)
    store = open_store(f"redis://localhost:{redis_port}/0#read")
    assert store.read("") == ([], "")
    store.append([b"%d" % number for number in range(5)])
    changes, position = store.read("")
    assert changes == [b"0", b"1", b"2"]
    changes, end = store.read(position)
    assert changes == [b"3", b"4"]
    assert store.read(end) == ([], end)
    store._redis.xadd("other", {"price": "1"})
    with pytest.raises(StoreError, match=f"localhost:{redis_port}/0: stream 'other' has entries that are no changes"):
        open_store(f"redis://localhost:{redis_port}/0#other").read("")
    store.append([b"\x00\xff"])
    assert store.read(end)[0] == [b"\x00\xff"]
    assert store.read(position)[0] == [b"3", b"4", b"\x00\xff"]
    store.close()


def test_a_redis_that_is_down_is_unavailable_until_it_is_back(bundle, dataset, tasks, longer, tmp_path):
    port, change = free_port(), make_change()
    with running_redis(tmp_path, port):
        store = open_store(f"redis://localhost:{port}/0")
        live = follow(bundle, dataset, store)
        asyncio.run(live.append(change))
    with pytest.raises(StoreError, match=rf"^redis://localhost:{port}/0: .*refused") as error:
        asyncio.run(live.append(pb.Change(events=change.events)))
    assert status_of(error.value) is Code.UNAVAILABLE
    with pytest.raises(StoreError, match="refused"):
        live.refresh()
    with running_redis(tmp_path, port):
        live.refresh()
        assert_equal(bundle, tasks, live.get("jobs"), longer)
        store.close()
    with pytest.raises(StoreError, match=rf"^redis://localhost:{port}/0: .*refused"):  # without the password
        open_store(f"redis://:secret@localhost:{port}/0")
