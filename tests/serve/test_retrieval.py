"""A server with an encoder and an index: vectors are those of evaluation; items are found, filtered and taken out."""

from __future__ import annotations

import base64
import datetime
from collections.abc import Iterator
from pathlib import Path

import grpc
import httpx
import numpy as np
import pyarrow.parquet as pq
import pytest
import yaml
from typer.testing import CliRunner

from brewjax.cli import app
from brewjax.config import ConfigError
from brewjax.data.tasks.examples import example_at
from brewjax.model.sharding import MeshConfig
from brewjax.retrieve.encoder import Encoder, EncoderConfig
from brewjax.retrieve.index import Index, IndexConfig
from brewjax.serve import Client
from brewjax.serve import ranker_pb2 as pb
from brewjax.serve.requests import request_from_example
from brewjax.serve.retrieval import Retrieval
from brewjax.serve.retriever_pb2 import Attributes, IndexedItem, Input, Vector
from brewjax.serve.server import Server
from tests.data.conftest import moment
from tests.serve.serving import ADMIN_TOKEN, CONFIG, TOKEN, refusal, running

NOW = moment(330)


@pytest.fixture(scope="module")
def encoder(bundle) -> Encoder:
    return Encoder(bundle, EncoderConfig(dimensions=(8,)))


@pytest.fixture(scope="module")
def folder(encoder, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("retrieval")
    encoder.save(folder / "encoder")
    for name, token in {"admin": ADMIN_TOKEN, "token": TOKEN}.items():
        (folder / name).write_text(token)
    return folder


@pytest.fixture(scope="module")
def retriever(model_folder, folder, dataset) -> Iterator[Server]:
    update = {
        "catalogue": str(dataset.path),
        "encoder": str(folder / "encoder"),
        "index": str(folder / "index"),
        "admin_token_file": str(folder / "admin"),
        "token_file": str(folder / "token"),
        "token_buckets": (256,),
        "max_candidate_tokens": 256,
    }
    with running(model_folder, CONFIG.model_copy(update=update)) as server:
        yield server


@pytest.fixture(scope="module")
def admin(retriever) -> Iterator[Client]:
    with Client(f"127.0.0.1:{retriever.port}", ADMIN_TOKEN) as client:
        yield client


@pytest.fixture(scope="module")
def members(dataset, tasks) -> list[pb.Member]:
    """The members of the dataset as requests."""
    return [request_from_example(dataset, tasks[0], example_at(dataset, tasks[0], row, NOW)) for row in range(8)]


def as_items(members: list[pb.Member]) -> list[IndexedItem]:
    """Every item of the dataset once, with bit 2 for every other one."""
    items = {item.id: item.attributes for member in members for item in member.items}
    return [
        IndexedItem(id=id_, item=Attributes(values=items[id_]), bits=2 + 4 * (int(id_) % 2)) for id_ in sorted(items)
    ]


def test_a_vector_is_that_of_evaluation(admin, encoder, dataset, tasks, members, folder):
    response = admin.embed([Input(member=member) for member in members])
    examples = [example_at(dataset, tasks[0], row, NOW) for row in range(8)]
    expected = encoder.embed_members(dataset, examples)
    np.testing.assert_allclose([vector.values for vector in response.vectors], expected, atol=2e-5)
    short = admin.embed([Input(member=members[0])], dimensions=8).vectors[0].values
    np.testing.assert_allclose(short, encoder.embed_members(dataset, examples[:1], 8)[0], atol=2e-5)
    assert response.model == Encoder.version(folder / "encoder")


def test_items_are_found_filtered_left_out_and_deleted(admin, encoder, dataset, members, folder):
    items = as_items(members)
    assert admin.upsert(items).items == len(items)
    query = np.asarray(admin.embed([Input(member=members[3])]).vectors[0].values)
    vectors = np.array([v.values for v in admin.embed([Input(item=item.item) for item in items]).vectors])
    order = [items[n].id for n in np.argsort(-vectors @ query, kind="stable")]
    hits = admin.retrieve(members[3], 5).hits
    assert [hit.id for hit in hits] == order[:5]
    np.testing.assert_allclose([hit.score for hit in hits], np.sort(vectors @ query)[::-1][:5], atol=2e-5)
    odd = [id_ for id_ in order if int(id_) % 2]
    assert [hit.id for hit in admin.retrieve(members[3], 100, required=4).hits] == odd
    assert [hit.id for hit in admin.retrieve(query, 3, exclude=order[:2]).hits] == order[2:5]
    assert admin.delete([order[0], "nowhere"]) == 1
    assert admin.retrieve(members[3], 1).hits[0].id == order[1]
    admin.upsert([IndexedItem(id="new", vector=Vector(values=query))])
    assert admin.retrieve(members[3], 1).hits[0].id == "new"
    admin.delete(["new"])


def test_the_nearest_items_are_ranked(admin, dataset, members):
    """By the member's id alone: what was retrieved, without what the member has had, in the order of Score."""
    admin.upsert(as_items(members))
    query = pb.Member(task="apply", id=dataset.member_id(3), now=members[3].now)
    ranked = admin.retrieve_and_score(query, 6)
    new = {item.id for item in members[3].items}  # `example_at` asks about what is new to the member
    nearest = {hit.id: hit.score for hit in admin.retrieve(members[3], 100).hits if hit.id in new}
    assert {hit.id for hit in ranked.hits} == set([*nearest][:6])
    similarities = [nearest[hit.id] for hit in ranked.hits]
    np.testing.assert_allclose([hit.similarity for hit in ranked.hits], similarities, atol=2e-5)
    query.items.extend(pb.Item(id=hit.id) for hit in ranked.hits)
    by_id = admin.score(query)
    in_full = pb.Member()
    in_full.CopyFrom(members[3])
    del in_full.items[:]
    in_full.items.extend(item for item in members[3].items if item.id in {hit.id for hit in ranked.hits})
    expected = {score.id: score.probabilities for score in admin.score(in_full).scores}
    assert [hit.id for hit in ranked.hits] == [score.id for score in by_id.scores]
    for hit, score in zip(ranked.hits, by_id.scores, strict=True):
        np.testing.assert_allclose(hit.probabilities, expected[hit.id], atol=1e-5)
        np.testing.assert_allclose(score.probabilities, expected[hit.id], atol=1e-5)
    assert list(ranked.labels) == ["Yes", "No"]
    assert len(admin.retrieve_and_score(pb.Member(task="apply", id=query.id), 6, top_k=2).hits) == 2


def test_by_the_command_line(admin, retriever, dataset, tasks, members, tmp_path, monkeypatch):
    """`brewjax score --retrieve` prints and writes what the server retrieves and ranks."""
    admin.upsert(as_items(members))
    now = datetime.datetime.fromtimestamp(NOW / 1e6, datetime.UTC)
    (tmp_path / "task.yaml").write_text(yaml.safe_dump(tasks[0].model_dump(mode="json", exclude_unset=True)))
    monkeypatch.setenv("BREWJAX_TOKEN", TOKEN)
    arguments = ["score", "--server", f"127.0.0.1:{retriever.port}", "--dataset", dataset.path, "--member", "m3"]
    arguments += ["--task", tmp_path / "task.yaml", "--at", f"{now:%Y-%m-%d}", "--retrieve", 6]
    result = CliRunner().invoke(app, [*map(str, arguments), "--out", str(tmp_path / "ranking.parquet")])
    assert "found 6" in result.output, result
    query = pb.Member(task=tasks[0].name, id="m3", now=members[3].now)
    hits = admin.retrieve_and_score(query, 6).hits
    assert pq.read_table(tmp_path / "ranking.parquet")["item"].to_pylist() == [hit.id for hit in hits]
    refused = CliRunner().invoke(app, ["score", "model", "--retrieve", "6", "--prompt", "-"])
    assert "--retrieve: the index is a server's" in refused.output


def test_a_text_is_found_by_the_next_search(admin):
    admin.upsert([IndexedItem(id="text", text="Nurse|Acme|Lisbon")])
    assert admin.retrieve("Nurse|Acme|Lisbon", 1).hits[0].id == "text"
    admin.delete(["text"])


def test_what_cannot_be_read_is_named(admin, retriever, members):
    invalid = grpc.StatusCode.INVALID_ARGUMENT
    member = pb.Member(task="view")
    for call, expected in (
        (lambda: admin.retrieve("x", 0), "k: 0; give 1 to 10,000"),
        (lambda: admin.retrieve([1.0], 5), "vector: 1 numbers; vectors of this index have 16"),
        (lambda: admin.retrieve(member, 5), "member.task: 'view'; this encoder reads the history of task 'apply'"),
        (lambda: admin.embed([]), "inputs: 0 of them; give 1 to"),
        (lambda: admin.embed([Input(text="a"), Input()]), r"inputs[1]: give member, item, text or tokens"),
        (lambda: admin.embed([Input(text="a")], dimensions=3), "dimensions 3: this encoder's vectors have 8, 16"),
        (
            lambda: admin.upsert([IndexedItem(id="a", vector=Vector(values=[np.nan] * 16))]),
            "not all numbers are finite",
        ),
        (lambda: admin.upsert([IndexedItem(id="a")]), "items[0]: give item, vector or text"),
        (lambda: admin.retrieve_and_score(members[0], 5), "member.id: give a member of the server's catalogue"),
        (lambda: admin.retrieve_and_score(pb.Member(task="apply", id="m1"), 0), "k: 0; give 1 to"),
        (lambda: admin.retrieve_and_score(pb.Member(task="no", id="m1"), 5), "member.task: no task 'no'"),
    ):
        code, message = refusal(call)
        assert code is invalid
        assert expected in message
    with Client(f"127.0.0.1:{retriever.port}", TOKEN) as client:
        code, message = refusal(client.delete, ["a"])
    assert code is grpc.StatusCode.PERMISSION_DENIED
    assert "Delete needs a token of its own" in message


def test_over_http_as_openai_does(retriever, admin):
    headers = {"authorization": f"Bearer {TOKEN}"}
    with httpx.Client(base_url=f"http://127.0.0.1:{retriever.http_port}", timeout=60, headers=headers) as http:
        answer = http.post("/v1/embeddings", json={"input": ["a nurse", "a cook"], "model": "any"}).json()
        expected = [vector.values for vector in admin.embed([Input(text="a nurse"), Input(text="a cook")]).vectors]
        np.testing.assert_allclose([entry["embedding"] for entry in answer["data"]], expected, atol=2e-5)
        assert [entry["index"] for entry in answer["data"]] == [0, 1]
        assert answer["usage"]["total_tokens"] > 2
        packed = http.post("/v1/embeddings", json={"input": "a nurse", "encoding_format": "base64"}).json()
        decoded = np.frombuffer(base64.b64decode(packed["data"][0]["embedding"]), "<f4")
        np.testing.assert_allclose(decoded, expected[0], atol=2e-5)
        refused = http.post("/v1/embeddings", json={"input": ["a", ""]})
        assert (refused.status_code, refused.json()["message"]) == (400, "input[1]: empty")
        hits = http.post("/v1/retrieve", json={"text": "a nurse", "k": 3}).json()["hits"]
        assert [hit["id"] for hit in hits] == [hit.id for hit in admin.retrieve("a nurse", 3).hits]
        assert http.post("/v1/delete", json={"ids": ["a"]}).status_code == 403


def test_an_index_of_another_encoder_is_refused(model_folder, folder, tmp_path):
    Index.create(tmp_path / "index", IndexConfig(dimensions=16, ids="text", model="other@1")).close()
    update = {"encoder": str(folder / "encoder"), "index": str(tmp_path / "index"), "token_buckets": (256,)}
    with pytest.raises(ConfigError, match=r"has vectors of encoder other@1; this one is tiny@\w+: build it anew"):
        Retrieval(CONFIG.model_copy(update=update), MeshConfig(), None, None)  # type: ignore[arg-type]
