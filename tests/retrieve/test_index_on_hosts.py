"""An index over the devices of several processes finds what it finds in one, and all of them end together.

Run as a script, this file is one of the processes.
"""

from __future__ import annotations

import signal
import sys
import time
from pathlib import Path

import jax
import numpy as np
import pyarrow.parquet as pq
import pytest

from brewjax import distributed
from brewjax.distributed import EXIT_RESTART, Leader
from brewjax.retrieve import index as index_module
from brewjax.retrieve.device_rows import follow
from brewjax.retrieve.index import Index, IndexConfig
from pallas_kernels.search import BINS
from tests import processes
from tests.processes import finish, log
from tests.retrieve.test_cli_index import brewjax_index, write_vectors

PROCESSES, D = 3, 8
LIMIT = 60  # seconds in which a process must notice that another is gone
QUERIES = np.ones((2, D), np.float32)
RESULTS, INDEX = "found.npz", "index"  # in a folder of the test: what searches found, and the index


@pytest.fixture(scope="module")
def folders(tmp_path_factory) -> tuple[Path, Path]:
    """What several processes of one device, the last of which was killed in the end, left; and one of as many."""
    several, single = (tmp_path_factory.mktemp(name) for name in ("several", "single"))
    module = "tests.retrieve.test_index_on_hosts"
    alone = processes.start(module, single, folder=single, processes=1, devices=PROCESSES)
    together = processes.start(module, several, folder=several, processes=PROCESSES)
    try:
        while not (several / RESULTS).exists():
            assert all(process.poll() is None for process in together), log(several, 0)
            time.sleep(0.05)
        together[-1].kill()
        for number, process in enumerate(together[:-1]):
            assert process.wait(LIMIT) in (EXIT_RESTART, -signal.SIGABRT), log(several, number)
    finally:
        for process in together:
            process.kill()
    finish(single, alone)
    return several, single


def test_several_processes_find_what_one_does(folders):
    results, expected = (np.load(folder / RESULTS) for folder in folders)
    assert {*results} == {*expected} > {"excluded 1", "crowded 0", "rows"}
    for name, array in expected.items():
        assert len(array), name
        np.testing.assert_array_equal(results[name], array)  # to the bit


def test_one_process_goes_on_with_what_several_left(folders):
    index = Index(folders[0] / INDEX)
    np.testing.assert_array_equal(index.rows()["id"].to_numpy(), np.load(folders[0] / RESULTS)["rows"])
    (hits,) = index.search(QUERIES[:1], 20)
    assert hits.ids == np.load(folders[0] / RESULTS)["last 0"]["id"].tolist()
    index.close()


def test_all_end_when_one_is_killed(folders):
    for number, words in enumerate(["process 2 ended", "process 0 ended"]):
        output = log(folders[0], number)
        # JAX may notice before: what it computes on all fails, or its coordinator does not answer.
        assert any(text in output for text in (words, "one of them ended", "another task died")), output


def test_the_command_line_searches_on_several_processes(folders, tmp_path):
    write_vectors(tmp_path / "queries.parquet", list(range(9)), vectors(9))
    arguments = ["search", folders[0] / INDEX, tmp_path / "queries.parquet", "--k", 5, "--out"]
    started = processes.start("brewjax", "index", *arguments, tmp_path / "hits.parquet", folder=tmp_path, processes=2)
    finish(tmp_path, started)
    brewjax_index(*arguments, tmp_path / "expected.parquet")
    columns = ["query", "rank", "id"]
    assert pq.read_table(tmp_path / "hits.parquet").select(columns) == pq.read_table(
        tmp_path / "expected.parquet"
    ).select(columns)
    assert "45 rows" in log(tmp_path, 0)


def vectors(count: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal((count, D)).astype(np.float32)


def change_and_search(folder: Path, leader: Leader | None) -> None:
    """Searches between changes, of every kind; what is found goes into a file when all of it is."""
    index, results = Index.create(folder / INDEX, IndexConfig(dimensions=D), leader=leader), {}

    def search(name: str, k: int, **settings: object) -> None:
        for query, (ids, scores) in enumerate(index.search(QUERIES, k, **settings)):
            results[f"{name} {query}"] = np.rec.fromarrays([ids, scores], names="id,score")

    count = PROCESSES * BINS + 500  # more than there are rows at first
    rows = vectors(count)
    rows[1::PROCESSES] += 1  # near the queries, and all on one device
    index.upsert(list(range(count)), rows, np.arange(count, dtype=np.int32) % 4 << 1)
    search("crowded", 600)  # which a device's even share does not hold: it is searched again
    search("filtered", 20, required=[2, 4], banned=[4, 0])
    index.delete(list(range(0, count, 2)))
    index.upsert(list(range(100, 200)), vectors(100, seed=1))
    search("excluded", 20, exclude=[range(1, 999), ()])
    index.snapshot()
    index.delete([101])
    results["share"] = np.array([index.share_admitted(2)])
    search("last", 20)
    second = Index.create(folder / "second", IndexConfig(dimensions=1), leader=leader)
    second.upsert([7], np.ones((1, 1)))
    results["second"] = np.array(second.search(np.ones((1, 1)), 3)[0].ids)
    second.close()
    results["rows"] = index.rows()["id"].to_numpy()
    np.savez(folder / "writing.npz", **results)
    (folder / "writing.npz").rename(folder / RESULTS)
    while leader:  # until a process is killed
        index.search(QUERIES, 20)
    index.close()


if __name__ == "__main__":
    with distributed.distributed_runtime():
        if not distributed.is_process_zero():
            follow()
        elif jax.process_count() == 1:
            index_module._devices = jax.local_devices  # as on accelerators
            change_and_search(Path(sys.argv[1]), None)
        else:
            with Leader() as process_zero:
                change_and_search(Path(sys.argv[1]), process_zero)
