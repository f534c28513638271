"""What is served is swapped whole: ranker, encoder and index; and the index is changed by streams."""

from __future__ import annotations

import asyncio
import dataclasses
import itertools
import shutil
import threading
from collections.abc import Iterator
from pathlib import Path
from unittest import mock

import grpc
import httpx
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from brewjax.retrieve.encoder import Encoder, EncoderConfig
from brewjax.retrieve.index import Index, IndexConfig
from brewjax.serve import Client
from brewjax.serve.retriever_pb2 import IndexedItem, Input, Vector
from brewjax.serve.server import Server
from tests.serve.serving import ADMIN_TOKEN, CONFIG, eventually, refusal, running
from tests.tiny import params

D = 16
Code = grpc.StatusCode


def vector(seed: int) -> np.ndarray:
    values = np.random.default_rng(seed).standard_normal(D).astype(np.float32)
    return values / np.linalg.norm(values)


def item(name: str, seed: int, bits: int = 0) -> IndexedItem:
    return IndexedItem(id=name, vector=Vector(values=vector(seed)), bits=bits)


def make_index(folder: Path, model: str, names: list[str]) -> None:
    index = Index.create(folder, IndexConfig(dimensions=D, ids="text", model=model))
    index.upsert(names, np.stack([vector(n) for n in range(len(names))]))
    index.close()


@pytest.fixture(scope="module")
def folder(bundle, tmp_path_factory) -> Path:
    """Two rankers, two encoders, and an index for each encoder."""
    folder = tmp_path_factory.mktemp("swapped")
    for n, name in enumerate(("old", "new")):
        variant = dataclasses.replace(bundle, params=params(bundle.model, n))
        variant.save(folder / name / "ranker")
        Encoder(variant, EncoderConfig()).save(folder / name / "encoder")
        make_index(folder / name / "index", Encoder.version(folder / name / "encoder"), [f"{name}-{i}" for i in "abc"])
    (folder / "admin").write_text(ADMIN_TOKEN)
    return folder


@pytest.fixture(scope="module")
def server(folder) -> Iterator[Server]:
    update = {
        "encoder": str(folder / "old" / "encoder"),
        "index": str(folder / "old" / "index"),
        "admin_token_file": str(folder / "admin"),
        "reload_below": str(folder),
        "token_buckets": (256,),
        "max_candidate_tokens": 256,
        "drain_seconds": 10,
    }
    with running(folder / "old" / "ranker", CONFIG.model_copy(update=update)) as server:
        yield server


@pytest.fixture(scope="module")
def client(server) -> Iterator[Client]:
    with Client(f"127.0.0.1:{server.port}", ADMIN_TOKEN) as client:
        yield client


@pytest.fixture
def all_new(folder) -> dict[str, str]:
    """The arguments of a reload of everything."""
    return {key: str(folder / "new" / name) for key, name in zip(("folder", "encoder", "index"), KINDS, strict=True)}


KINDS = ("ranker", "encoder", "index")


def all_ids(client: Client) -> set[str]:
    return {hit.id for hit in client.retrieve(vector(0), 100).hits}


def metric(server: Server, name: str, **labels: str) -> float:
    return server.service.metrics.registry.get_sample_value(f"brewjax_{name}", labels) or 0.0


# --- reload


def test_a_reload_swaps_ranker_encoder_and_index(server, client, all_new, folder):
    before = client.embed([Input(text="a nurse")])
    ranker = client.describe().model
    loaded = client.reload(**all_new)
    assert loaded.encoder == Encoder.version(folder / "new" / "encoder") != before.model
    assert loaded.model == client.describe().model != ranker
    assert all_ids(client) == {"new-a", "new-b", "new-c"}
    after = client.embed([Input(text="a nurse")])
    assert after.model == loaded.encoder
    expected = Encoder.load(folder / "new" / "encoder").embed([server.retrieval._read_text("a nurse", "")])[0]
    np.testing.assert_allclose(after.vectors[0].values, expected, atol=2e-5)
    with httpx.Client(headers={"authorization": f"Bearer {ADMIN_TOKEN}"}, timeout=60) as http:  # to what it began with
        url = f"http://127.0.0.1:{server.http_port}/v1/reload"
        assert http.post(url, json={}).json() == {"model": ranker, "encoder": before.model}
        refused = http.post(url, json={"encoder": "/etc"})
        assert (refused.status_code, refused.json()["message"]) == (403, f"encoder: not below {folder}")
    assert all_ids(client) == {"old-a", "old-b", "old-c"}
    assert client.embed([Input(text="a nurse")]).vectors == before.vectors


def test_what_did_not_change_is_not_loaded_again(server, client):
    retrieval = server.retrieval
    client.upsert([item("more", 9)])
    client.reload()
    assert server.retrieval is retrieval
    assert client.delete(["more"]) == 1


def break_weights(folder: Path, bundle) -> None:
    largest = max((path for path in (folder / "params").rglob("*") if path.is_file()), key=lambda p: p.stat().st_size)
    largest.write_bytes(largest.read_bytes()[:100])


def spoil_weights(folder: Path, bundle) -> None:
    leaves, tree = jax.tree.flatten(bundle.params)
    shutil.rmtree(folder)
    spoilt = jax.tree.unflatten(tree, [leaves[0].at[(0,) * leaves[0].ndim].set(jnp.nan), *leaves[1:]])
    Encoder(dataclasses.replace(bundle, params=spoilt), EncoderConfig()).save(folder)


FAULTS = {
    "no encoder.yaml there": lambda folder, _: (folder / "encoder.yaml").unlink(),
    "cannot be read": break_weights,
    "weights that are not finite": spoil_weights,
}


@pytest.mark.parametrize("fault", [*FAULTS, "has vectors of encoder other@1", "no index there", "another shape"])
def test_all_or_nothing(server, client, all_new, folder, bundle, fault):
    """Whatever is wrong with one of the three, all three stay."""
    bad = folder / "bad"
    shutil.rmtree(bad, ignore_errors=True)
    if fault in FAULTS:
        shutil.copytree(folder / "new" / "encoder", bad)
        FAULTS[fault](bad, bundle)
        # So that nothing but the fault is in the way.
        version = Encoder.version(bad)
        make_index(folder / "bad-index" / fault, version, ["bad"])
        all_new |= {"encoder": str(bad), "index": str(folder / "bad-index" / fault)}
    elif fault == "another shape":
        model = bundle.model.model_copy(update={"d_ff": 64})
        dataclasses.replace(bundle, model=model, params=params(model)).save(bad)
        all_new["folder"] = str(bad)
    else:
        all_new["index"] = str(bad)
        if fault != "no index there":
            make_index(bad, "other@1", ["bad"])
    before, ids, refused = client.describe().model, all_ids(client), metric(server, "reloads_total", outcome="refused")
    code, message = refusal(client.reload, **all_new)
    assert code is Code.INVALID_ARGUMENT
    assert fault in message
    assert metric(server, "reloads_total", outcome="refused") == refused + 1
    assert client.describe().model == before
    assert all_ids(client) == ids
    client.upsert([item("still", 3)])  # the old index can still be changed
    assert client.delete(["still"]) == 1


def test_a_server_without_an_encoder_loads_none(strict, all_new):
    with Client(f"127.0.0.1:{strict.port}", ADMIN_TOKEN) as admin:
        code, message = refusal(admin.reload, encoder=all_new["encoder"])
    assert (code, message) == (Code.INVALID_ARGUMENT, "encoder: this server was started without one")


def test_requests_in_flight_finish_on_what_they_began_with(server, client, all_new):
    """A search has the old index's answer; a change that was not acknowledged yet is made in the new one."""
    gates, index = {"search": threading.Event(), "upsert": threading.Event()}, server.retrieval.index
    results = {}

    def held(name: str):
        call = getattr(index, name)

        def wait(*args):
            gates[name].wait(60)
            return call(*args)

        return mock.patch.object(index, name, wait)

    def run(name: str, call, *args) -> threading.Thread:
        thread = threading.Thread(target=lambda: results.update({name: call(*args)}))
        thread.start()
        return thread

    retrieval = server.retrieval
    with held("search"), held("upsert"):
        searching = run("search", client.retrieve, vector(0), 10)
        upserting = run("upsert", client.upsert, [IndexedItem(id="late", text="a late nurse")])
        eventually(lambda: retrieval._num_requests == 2)
        reloading = run("reload", lambda: client.reload(**all_new))
        eventually(lambda: server.retrieval is not retrieval)
        assert all_ids(client) == {"new-a", "new-b", "new-c"}  # while the old ones are not answered
        for name, thread in (("search", searching), ("upsert", upserting)):
            gates[name].set()
            thread.join(60)
        reloading.join(60)
    try:
        assert {hit.id for hit in results["search"].hits} == {"old-a", "old-b", "old-c"}
        assert results["search"].model == retrieval.model
        assert results["upsert"].model == results["reload"].encoder == server.retrieval.model
        assert client.retrieve("a late nurse", 1).hits[0].id == "late"
        assert client.delete(["late"]) == 1
    finally:
        client.reload()
        client.delete(["late"])


# --- streams


def test_every_batch_of_a_stream_is_acknowledged_and_found(server, client):
    lags = metric(server, "index_lag_seconds_count", content="vector")
    sent: list[int] = []

    def batches() -> Iterator[list[IndexedItem]]:
        for n in range(5):
            sent.append(n)
            yield [item(f"s{n}-{i}", 100 + 10 * n + i) for i in range(3)]

    for n, response in enumerate(client.upsert_stream(batches())):
        assert response.items == 3 + 3 * (n + 1)
        assert client.retrieve(vector(100 + 10 * n), 1).hits[0].id == f"s{n}-0"
    assert sent == [0, 1, 2, 3, 4]
    assert metric(server, "index_lag_seconds_count", content="vector") == lags + 5
    assert metric(server, "index_lag_seconds_sum", content="vector") > 0
    deleted = client.delete_stream([f"s{n}-{i}" for i in range(3)] for n in range(5))
    assert list(deleted) == [3] * 5
    assert all_ids(client) == {"old-a", "old-b", "old-c"}


def test_a_batch_that_is_refused_ends_the_stream_and_takes_nothing_back(client):
    batches = [[item("good", 1)], [item("fine", 2), IndexedItem(id="bad")], [item("never", 3)]]
    stream = client.upsert_stream(batches)
    assert next(stream).items == 4
    assert refusal(next, stream) == (Code.INVALID_ARGUMENT, "items[1]: give item, vector or text")
    assert all_ids(client) == {"old-a", "old-b", "old-c", "good"}
    assert client.delete(["good"]) == 1


def test_a_message_of_a_stream_that_is_too_large_is_not_silently_left_out(server, client):
    large = [IndexedItem(id="large", text="x" * (4 * server.config.max_request_bytes))]
    stream = client.upsert_stream([[item("good", 1)], large])
    assert next(stream).items == 4
    code, _ = refusal(next, stream)
    assert code is Code.RESOURCE_EXHAUSTED
    assert client.delete(["good"]) == 1


def test_a_caller_who_is_too_fast_waits(server, client):
    """However slow the index is, few batches are in memory: those of gRPC's windows, not those of the caller."""
    gate, index = threading.Event(), server.retrieval.index
    upsert, sent = index.upsert, itertools.count()

    def batches() -> Iterator[list[IndexedItem]]:
        for _ in range(200):
            next(sent)
            yield [IndexedItem(id=f"w{i}", vector=Vector(values=vector(i))) for i in range(1000)]  # 80 KB

    def wait(*args: object) -> None:
        gate.wait(60)
        upsert(*args)

    with mock.patch.object(index, "upsert", wait):
        stream = client.upsert_stream(batches())
        thread = threading.Thread(target=lambda: [None for _ in zip(stream, range(3), strict=False)])
        thread.start()
        eventually(lambda: server.retrieval._num_requests)
        counts = [-1, int(repr(sent)[6:-1])]
        while counts[-1] != counts[-2]:
            thread.join(0.5)
            counts.append(int(repr(sent)[6:-1]))
        assert counts[-1] < 100
        gate.set()
        thread.join(60)
    stream.close()
    eventually(lambda: not server.retrieval._num_requests)
    client.delete([f"w{i}" for i in range(1000)])


def test_a_stream_goes_on_through_a_reload(server, client, all_new):
    batches: list[threading.Event] = [threading.Event(), threading.Event()]

    def send() -> Iterator[list[IndexedItem]]:
        for n, event in enumerate(batches):
            event.wait(60)
            yield [item(f"r{n}", n)]

    stream = client.upsert_stream(send())
    batches[0].set()
    assert next(stream).model != (new := client.reload(**all_new)).encoder
    batches[1].set()
    assert next(stream).model == new.encoder
    assert list(stream) == []
    assert all_ids(client) == {"new-a", "new-b", "new-c", "r1"}
    client.delete(["r1"])
    client.reload()
    assert client.delete(["r0"]) == 1


def test_how_selective_filters_are_is_counted(server, client):
    client.upsert([item("x", 1, bits=4)])
    count, total = (metric(server, f"filter_share_{name}") for name in ("count", "sum"))
    client.retrieve(vector(0), 5)
    assert metric(server, "filter_share_count") == count  # without a filter
    assert [hit.id for hit in client.retrieve(vector(0), 5, required=4).hits] == ["x"]
    assert metric(server, "filter_share_count") == count + 1
    assert metric(server, "filter_share_sum") == pytest.approx(total + 1 / 4)
    client.delete(["x"])


def test_a_server_that_stops_ends_open_streams(folder, tmp_path):
    """An idle stream does not hold the server for its drain time; what was acknowledged is on disk."""
    shutil.copytree(folder / "old" / "index", tmp_path / "index")
    update = {
        "encoder": str(folder / "old" / "encoder"),
        "index": str(tmp_path / "index"),
        "admin_token_file": str(folder / "admin"),
        "token_buckets": (256,),
        "max_candidate_tokens": 256,
    }
    idle = threading.Event()

    def send() -> Iterator[list[IndexedItem]]:
        yield [item("last", 5)]
        idle.wait(60)

    with (
        running(folder / "old" / "ranker", CONFIG.model_copy(update=update)) as server,
        Client(f"127.0.0.1:{server.port}", ADMIN_TOKEN) as client,
    ):
        stream = client.upsert_stream(send())
        assert next(stream).items == 4
        stopping = asyncio.run_coroutine_threadsafe(server.stop(), server.loop)
        code, message = refusal(next, stream)
        assert code is Code.UNAVAILABLE
        assert "the server stops" in message
        idle.set()
        assert stopping.result(10)
    index = Index(tmp_path / "index")
    assert len(index) == 4
    index.close()
