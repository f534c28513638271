"""A server that is killed again and again under searches, upserts and deletes: nothing acknowledged is lost.

`BREWJAX_SOAK_SECONDS=600 pytest -s tests/serve/test_soak.py` does it for ten minutes; freshness is printed.
"""

from __future__ import annotations

import itertools
import os
import signal
import threading
import time
from collections import defaultdict
from pathlib import Path

import grpc
import numpy as np
import pytest

from brewjax.retrieve.encoder import Encoder, EncoderConfig
from brewjax.serve import Client
from brewjax.serve.retriever_pb2 import IndexedItem, Vector
from tests.serve.serving import ADMIN_TOKEN, eventually
from tests.serve.test_operation import Process, free_port

SECONDS = float(os.environ.get("BREWJAX_SOAK_SECONDS", "45"))  # of serving
LIFE = 15.0  # seconds from a start to a kill
IDS = 400  # of each writer
D, EVERYTHING = 16, 10_000


class Ledger:
    """What the index must hold, and must not, by what was acknowledged.

    An id that a change was sent for and not acknowledged is in neither.
    """

    def __init__(self) -> None:
        self._lock, self._numbers = threading.Lock(), itertools.count()
        self._present: dict[str, int] = {}
        self._absent: dict[str, int] = {}
        self.freshness: dict[str, list[float]] = defaultdict(list)
        self.changes = 0

    def send(self, ids: list[str]) -> None:
        with self._lock:
            for id_ in ids:
                self._present.pop(id_, None)
                self._absent.pop(id_, None)

    def acknowledge(self, ids: list[str], present: bool) -> None:
        with self._lock:
            self.changes += 1
            for id_ in ids:
                (self._present if present else self._absent)[id_] = next(self._numbers)

    def present(self) -> dict[str, int]:
        """The ids that must be found, each with the number of its last change."""
        with self._lock:
            return dict(self._present)

    def absent(self) -> dict[str, int]:
        """The ids that must not be found, likewise."""
        with self._lock:
            return dict(self._absent)

    def check(self, client: Client) -> None:
        """One search for everything: right about all ids that no change was sent for meanwhile."""
        present, absent = self.present().items(), self.absent().items()
        hits = {hit.id for hit in client.retrieve(unit(0), EVERYTHING).hits}
        lost = {id_ for id_, _ in present & self.present().items()} - hits
        returned = {id_ for id_, _ in absent & self.absent().items()} & hits
        assert not lost
        assert not returned


def unit(seed: int) -> np.ndarray:
    vector = np.random.default_rng(seed).standard_normal(D).astype(np.float32)
    return vector / np.linalg.norm(vector)


def write(client: Client, ledger: Ledger, kind: str, seed: int) -> None:
    """Upserts and deletes, and looks for what was upserted, until the server is gone."""
    random = np.random.default_rng(seed)
    while True:
        names = [f"{kind}-{n}" for n in random.choice(IDS, random.integers(1, 9), replace=False)]
        ledger.send(names)
        if random.random() < 0.3:
            client.delete(names)
            ledger.acknowledge(names, present=False)
            continue
        seeds = random.integers(1, 2**31, len(names)).tolist()
        if kind == "vector":
            items = [IndexedItem(id=name, vector=Vector(values=unit(s))) for name, s in zip(names, seeds, strict=True)]
            query: str | np.ndarray = unit(seeds[0])
        else:
            texts = [f"a job by the name of {s:x}" for s in seeds]
            items = [IndexedItem(id=name, text=text) for name, text in zip(names, texts, strict=True)]
            query = texts[0]
        start_time = time.monotonic()
        client.upsert(items)
        ledger.acknowledge(names, present=True)
        scores = {hit.id: hit.score for hit in client.retrieve(query, EVERYTHING).hits}
        assert scores[names[0]] == pytest.approx(1, abs=1e-4)
        ledger.freshness[kind].append(time.monotonic() - start_time)


def search(client: Client, ledger: Ledger) -> None:
    while True:
        ledger.check(client)


def live(client: Client, ledger: Ledger, process: Process, seed: int, seconds: float) -> None:
    """Changes and searches, until a kill in the middle of them."""
    errors: list[BaseException] = []
    killed = threading.Event()

    def until_killed(work, *arguments) -> None:
        try:
            work(client, ledger, *arguments)
        except grpc.RpcError as error:
            if not killed.is_set():
                errors.append(error)
        except BaseException as error:
            errors.append(error)

    calls = [(write, "vector", seed), (write, "text", seed + 1), (search,), (search,)]
    threads = [threading.Thread(target=until_killed, args=call) for call in calls]
    for thread in threads:
        thread.start()
    time.sleep(seconds)
    eventually(lambda: errors or len(ledger.freshness) == 2, 300)  # the first text waits for a compiled program
    killed.set()
    process.signal(signal.SIGKILL)
    for thread in threads:
        thread.join()
    process.end()
    assert not errors, errors


@pytest.mark.long
def test_nothing_acknowledged_is_lost_or_comes_back(bundle, tmp_path):
    bundle.save(tmp_path / "ranker")
    Encoder(bundle, EncoderConfig()).save(tmp_path / "encoder")
    (tmp_path / "admin").write_text(ADMIN_TOKEN)
    settings = {
        "http_port": "null",
        "encoder": tmp_path / "encoder",
        "index": tmp_path / "index",
        "admin_token_file": tmp_path / "admin",
    }
    ledger, lives = Ledger(), max(2, round(SECONDS / LIFE))
    for number in range(lives + 1):
        port = free_port()
        process = Process(tmp_path / "ranker", Path(tmp_path / f"log-{number}"), port=port, **settings)
        try:
            process.ready()
            with Client(f"localhost:{port}", ADMIN_TOKEN) as client:
                ledger.check(client)  # what was acknowledged before the kill
                if number < lives:
                    live(client, ledger, process, 2 * number, SECONDS / lives)
        finally:
            process.kill()
    for kind, seconds in ledger.freshness.items():
        p50, p99 = np.percentile(seconds, [50, 99])
        print(f"{kind}: {len(seconds):,} upserts, each found after {p50:.3f} s (p50), {p99:.3f} s (p99)")
    present, absent = ledger.present(), ledger.absent()
    print(f"{lives} kills, {ledger.changes:,} changes, {len(present)} ids present, {len(absent)} absent: 0 wrong")
    assert min(len(present), len(absent), *(len(each) for each in ledger.freshness.values())) > 0
