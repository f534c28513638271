"""The index against a dictionary: searches, filters, updates, deletes; and what a kill leaves."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterable, Iterator
from contextlib import nullcontext
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from brewjax.retrieve.index import Index, IndexConfig, VectorError
from brewjax.retrieve.log import Change, ChangeLog
from tests.retrieve.conftest import D, vectors

ROOT = Path(__file__).parents[2]


def best(rows: dict[int, np.ndarray], query: np.ndarray, k: int) -> list[int]:
    return sorted(rows, key=lambda id_: -float(rows[id_] @ query))[:k]


def test_large_ids_come_back_as_they_went_in(index):
    ids = [2**40 + 7, 2**62 + 1, -3]
    index.upsert(ids, vectors(3))
    (hits,) = index.search(vectors(1, 9), 3)
    assert sorted(hits.ids) == sorted(ids)


operation = st.tuples(st.sampled_from(["upsert", "delete", "reopen", "snapshot"]), st.integers(0, 99))


@settings(max_examples=15, deadline=None)
@given(st.lists(operation, max_size=12))
def test_it_is_a_dictionary_that_can_be_searched(tmp_path_factory, operations):
    folder = tmp_path_factory.mktemp("many") / "index"
    index, expected = Index.create(folder, IndexConfig(dimensions=D)), {}
    for action, seed in operations:
        ids = np.random.default_rng(seed).choice(30, 7, replace=False).tolist()
        if action == "upsert":
            index.upsert(ids, vectors(7, seed))
            expected |= dict(zip(ids, vectors(7, seed), strict=True))
        elif action == "delete":
            assert index.delete(ids) == len({*ids} & {*expected})
            expected = {id_: row for id_, row in expected.items() if id_ not in ids}
        elif action == "snapshot":
            index.snapshot()
        else:
            index.close()
            index = Index(folder)
        assert len(index) == len(expected)
        query = vectors(1, seed + 1)
        (hits,) = index.search(query, 5)
        assert hits.ids == best(expected, query[0], 5)
    index.close()


def test_each_query_has_its_own_filter_and_exclusions(index):
    rows = vectors(200)
    index.upsert(list(range(200)), rows, np.arange(200, dtype=np.int32) % 4 << 1)
    queries = vectors(3, 1)
    every, some, few = index.search(queries, 20, required=[0, 2, 4], banned=[0, 0, 2], exclude=[(), (), range(100)])
    table = dict(enumerate(rows))
    assert every.ids == best(table, queries[0], 20)
    assert some.ids == best({i: v for i, v in table.items() if i % 4 in (1, 3)}, queries[1], 20)
    assert few.ids == best({i: v for i, v in table.items() if i % 4 == 2 and i >= 100}, queries[2], 20)


@pytest.mark.parametrize("share", [0.0, 0.05, 2.0])
def test_gathered_rows_and_all_rows_give_the_same(index, monkeypatch, share):
    monkeypatch.setattr("brewjax.retrieve.device_rows.GATHERED_SHARE", share)
    rows = vectors(300)
    index.upsert(list(range(300)), rows, np.where(np.arange(300) % 50 == 0, 2, 4).astype(np.int32))
    queries = vectors(3, 1)
    rare, common, both = index.search(queries, 8, required=[2, 4, 0])
    table = dict(enumerate(rows))
    assert rare.ids == best({i: v for i, v in table.items() if i % 50 == 0}, queries[0], 8)
    assert common.ids == best({i: v for i, v in table.items() if i % 50}, queries[1], 8)
    assert both.ids == best(table, queries[2], 8)


def test_where_the_filter_admits_nothing_nothing_is_found(index):
    index.upsert([1, 2], vectors(2))
    (hits,) = index.search(vectors(1), 5, required=8)
    assert hits.ids == []


@pytest.mark.parametrize(
    ("ids", "rows", "message"),
    [
        ([1, 2], np.array([[0.0] * D, [np.nan] * D]), "row 1: not all numbers are finite"),
        ([1, 1], np.zeros((2, D)), "id 1 is given twice"),
        ([1], np.zeros((1, D + 1)), r"vectors of shape \(1, 9\); expected \[n, 8\]"),
        (["a"], np.zeros((1, D)), "ids of this index are int64"),
        ([2**63], np.zeros((1, D)), "ids of this index are int64"),
        ([1, 2], np.zeros((1, D)), "2 ids, 1 vectors"),
    ],
)
def test_what_it_cannot_take_changes_nothing(index, ids, rows, message):
    index.upsert([7], vectors(1))
    with pytest.raises(VectorError, match=message):
        index.upsert(ids, rows)
    assert len(index) == 1
    assert index.search(vectors(1), 9)[0].ids == [7]


def test_it_grows_and_reuses_slots(index):
    for start in range(0, 5000, 1000):
        index.upsert(list(range(start, start + 1000)), vectors(1000, start))
    capacity = len(index._rows)
    for _ in range(3):
        index.delete(list(range(1000)))
        index.upsert(list(range(1000)), vectors(1000))
    assert len(index._rows) == capacity
    query = vectors(1, 5)
    expected = dict(enumerate(np.concatenate([vectors(1000), *(vectors(1000, s) for s in range(1000, 5000, 1000))])))
    assert index.search(query, 50)[0].ids == best(expected, query[0], 50)


def test_searches_beside_updates_see_whole_changes(index):
    """Every upsert moves ten ids together: a search sees all ten with one value."""
    index.upsert(list(range(10)), np.full((10, D), 1.0))
    stop = threading.Event()

    def update() -> None:
        for number in range(2, 60):
            index.upsert(list(range(10)), np.full((10, D), float(number)))
            index.delete([100])
            index.upsert([100], np.zeros((1, D)))
        stop.set()

    writer = threading.Thread(target=update)
    writer.start()
    while not stop.is_set():
        (hits,) = index.search(np.ones((1, D), np.float32), 10)
        assert sorted(hits.ids) == list(range(10))
        assert len({*hits.scores.tolist()}) == 1
    writer.join()


WRITER = """
import sys, numpy as np
from collections.abc import Iterable, Iterator
from contextlib import nullcontext
from pathlib import Path
from brewjax.retrieve.index import Index
index = Index(Path(sys.argv[1]))
for number in range(1, 10_000):
    index.upsert([number % 50], np.full((1, 8), number, np.float32))
    if number % 7 == 0:
        index.delete([(number - 3) % 50])
    if number % 40 == 0:
        index.snapshot()
    print(number, flush=True)
"""


@pytest.mark.parametrize("seed", range(2))
def test_a_kill_loses_nothing_that_was_acknowledged(tmp_path, seed):
    folder = tmp_path / "index"
    Index.create(folder, IndexConfig(dimensions=D)).close()
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-c", WRITER, str(folder)]
    with subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True) as writer:
        for _ in range(100 + 37 * seed):
            acknowledged = int(writer.stdout.readline())
        time.sleep(0.003 * seed)
        writer.send_signal(signal.SIGKILL)
        acknowledged = int(([str(acknowledged), *writer.stdout.read().split()])[-1])
    expected: dict[int, int] = {}
    states = []
    for number in range(1, acknowledged + 2):  # the last change may have been written and not acknowledged
        expected[number % 50] = number
        states.append(dict(expected))
        if number % 7 == 0:
            expected.pop((number - 3) % 50, None)
        states.append(dict(expected))
    index = Index(folder)
    table = index.rows()
    stored = dict(zip(table["id"].to_pylist(), (int(row[0]) for row in table["vector"].to_pylist()), strict=True))
    index.close()
    assert stored in states[2 * acknowledged - 1 :]


def test_a_change_cut_short_by_a_crash_ends_its_segment(tmp_path):
    folder = tmp_path / "index"
    index = Index.create(folder, IndexConfig(dimensions=D))
    for number in range(3):
        index.upsert([number], vectors(1, number))
    (segment,) = folder.glob("changes-*")
    whole = segment.read_bytes()
    index.close()
    for length, changes in ((len(whole) - 5, {2}), (len(whole) - 200, {1, 2}), (10, {0}), (0, {0})):
        segment.write_bytes(whole[:length])
        reopened = Index(folder)
        assert len(reopened) in changes
        reopened.upsert([99], vectors(1))
        reopened.close()
        again = Index(folder)
        assert 99 in again.rows()["id"].to_pylist()
        again.delete([99])
        again.close()


def test_an_index_is_open_once(index, tmp_path):
    """Two writers would lose each other's changes; where one was moved away, another may be opened in its place."""
    with pytest.raises(VectorError, match="index is open elsewhere"):
        Index(tmp_path / "index")
    (tmp_path / "link").symlink_to(tmp_path / "index")
    assert index.is_at(tmp_path / "link")
    (tmp_path / "index").rename(tmp_path / "moved")
    Index.create(tmp_path / "index", IndexConfig(dimensions=D)).close()
    assert not index.is_at(tmp_path / "index")
    assert index.is_at(tmp_path / "moved")


def test_a_start_that_replays_much_leaves_a_snapshot(index, tmp_path, monkeypatch):
    for number in range(15):
        index.upsert(list(range(10)), vectors(10, number))
    rows = index.rows()
    index.close()
    monkeypatch.setattr("brewjax.retrieve.index.REPLAYED", 100)
    for _ in range(2):  # of which the second finds little to replay
        reopened = Index(tmp_path / "index")
        assert reopened.rows() == rows
        reopened.close()
        files = sorted(path.name for path in (tmp_path / "index").iterdir() if path.name != "index.yaml")
        assert files[0] == "changes-00000001.log"
        assert files[-1] == "snapshot-00000001"


def test_many_changes_leave_a_snapshot_while_the_index_is_open(index, tmp_path, monkeypatch):
    """And what a start reads stays within bounds."""
    monkeypatch.setattr("brewjax.retrieve.index.REPLAYED", 50)
    for number in range(60):
        index.upsert(list(range(10)), vectors(10, number))
        index.delete([number % 10])
    rows = index.rows().sort_by("id")
    index.close()
    (snapshot,) = (tmp_path / "index").glob("snapshot-*")
    assert int(snapshot.name[-8:]) >= 2
    reopened = Index(tmp_path / "index")
    assert reopened.rows().sort_by("id") == rows
    assert reopened._num_replayed <= 2 * 10 + 50 + 11 * 10  # beside those of a snapshot that is being written
    reopened.close()


@pytest.mark.parametrize("completed", [False, True])
def test_a_snapshot_is_written_while_rows_change(index, tmp_path, monkeypatch, completed):
    """They move from chunks that are written to chunks that are not, and back; a crash before it is complete, too."""
    monkeypatch.setattr("brewjax.retrieve.device_rows.CHUNK_ROWS", 16)
    index.upsert(list(range(64)), vectors(64))
    whole = ChangeLog.write_snapshot

    def change_meanwhile(log: ChangeLog, segment: int, rows: Iterable[Change]) -> None:
        def interrupted() -> Iterator[Change]:
            for number, chunk in enumerate(rows):
                yield chunk
                index.delete([number, 63 - number])
                index.upsert([63 - number, 100 + number], vectors(2, number + 1))
            if not completed:
                raise InterruptedError

        whole(log, segment, interrupted())

    monkeypatch.setattr(ChangeLog, "write_snapshot", change_meanwhile)
    with nullcontext() if completed else pytest.raises(InterruptedError):
        index.snapshot()
    expected = index.rows().sort_by("id")
    assert len(expected) == 64
    index.close()
    assert len([*(tmp_path / "index").glob("snapshot-*")]) == completed
    reopened = Index(tmp_path / "index")
    assert reopened.rows().sort_by("id") == expected
    reopened.close()


def test_the_share_that_a_filter_admits_is_of_what_is_there(index):
    assert index.share_admitted(2) == 0
    index.upsert(list(range(10)), vectors(10), np.arange(10, dtype=np.int32) % 5 << 1)
    index.delete([9])
    assert index.share_admitted() == 1
    assert index.share_admitted(4) == pytest.approx(4 / 9)  # 2, 3, 7 and 8
    assert index.share_admitted(4, banned=2) == pytest.approx(2 / 9)


@pytest.mark.long
def test_all_of_this_on_four_devices():
    environment = os.environ | {"JAX_NUM_CPU_DEVICES": "4"}
    command = [sys.executable, "-m", "pytest", "-q", "-m", "not long", "-p", "no:cacheprovider", __file__]
    tests = subprocess.run(command, env=environment, cwd=ROOT, capture_output=True, text=True, check=False)
    assert tests.returncode == 0, tests.stdout
