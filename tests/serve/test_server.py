"""A real client against a real server."""

import asyncio
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import httpx
import numpy as np
import pytest

from brewjax.data.examples import example_now
from brewjax.data.tokens import EncodedPrompt
from brewjax.scoring.passes import Bucket
from brewjax.scoring.scorer import Scorer
from brewjax.serve import Client
from brewjax.serve import ranker_pb2 as pb
from brewjax.serve.client import raw
from brewjax.serve.config import ServeConfig
from brewjax.serve.members import of_example
from brewjax.serve.server import Server

CONFIG = ServeConfig(port=0, http_port=0, row_tokens=(256, 1024), context=1024, cache_gigabytes=0.01)


@contextmanager
def running(folder: Path, config: ServeConfig) -> Iterator[Server]:
    """A server on an event loop of its own."""
    server = Server(folder, config)
    loop = asyncio.new_event_loop()
    thread = threading.Thread(target=loop.run_forever)
    thread.start()
    try:
        asyncio.run_coroutine_threadsafe(server.start(), loop).result(60)
        yield server
        assert asyncio.run_coroutine_threadsafe(server.stop(), loop).result(60)
    finally:
        loop.call_soon_threadsafe(loop.stop)
        thread.join()


@pytest.fixture(scope="module")
def server(model_folder) -> Iterator[Server]:
    with running(model_folder, CONFIG) as server:
        yield server


@pytest.fixture(scope="module")
def client(server) -> Iterator[Client]:
    with Client(f"127.0.0.1:{server.port}") as client:
        yield client


@pytest.fixture(scope="module")
def http(server) -> Iterator[httpx.Client]:
    with httpx.Client(base_url=f"http://127.0.0.1:{server.http_port}") as http:
        yield http


@pytest.fixture(scope="module")
def alone(bundle) -> Scorer:
    """The scorer that evaluation uses."""
    return Scorer(bundle.model, bundle.params, bundle.tokenizer, "dense", [Bucket(256), Bucket(4096)])


def draw(seed: int, items: int, prefix: int = 200) -> tuple[list[int], list[list[int]]]:
    """Tokens of a prefix, and of items of uneven length."""
    random = np.random.default_rng(seed)
    lengths = random.integers(1, 12, items)
    return random.integers(3, 300, prefix).tolist(), [random.integers(3, 300, length).tolist() for length in lengths]


def probabilities(response: pb.ScoreResponse) -> np.ndarray:
    """In the order of the request."""
    return np.array([item.probabilities for item in sorted(response.scores, key=lambda item: item.index)], np.float32)


@pytest.mark.parametrize("count", [1, 50, 500])
def test_every_way_to_ask_gives_the_same_scores(client, http, alone, count):
    prefix, items = draw(count, count)
    labels = [5, 9, 7]
    expected = alone.score_encoded([EncodedPrompt([prefix], items, labels, [None] * count, "dense")])[0]
    one_by_one = [EncodedPrompt([prefix], [item], labels, [None], "dense") for item in items]
    np.testing.assert_allclose(expected, np.concatenate(alone.score_encoded(one_by_one)), atol=1e-5)
    cold, hot = (client.score(raw(prefix, items, labels)) for _ in range(2))
    assert (cold.usage.cached_tokens, hot.usage.cached_tokens) == (0, 200)
    body = {"query": prefix, "items": items, "label_token_ids": labels, "apply_softmax": True}
    over_http = http.post("/v1/score", json=body).raise_for_status().json()
    for found in (probabilities(cold), probabilities(hot), over_http["scores"]):
        np.testing.assert_allclose(found, expected, atol=1e-5)
    assert over_http["usage"]["cached_tokens"] == 200
    order = [item.index for item in cold.scores]
    assert order == np.argsort(-probabilities(cold)[:, 0], kind="stable").tolist()
    top = client.score(raw(prefix, items, labels), top_k=3)
    assert [item.index for item in top.scores] == [item.index for item in hot.scores[:3]]


def test_the_service_says_a_member_as_evaluation_does(client, bundle, dataset, tasks):
    for task in tasks:
        example = example_now(dataset, task, 7)
        prompt = bundle.verbalizer(dataset, task).prompt(task, example, bundle.prompts.score_style)
        response = client.score(of_example(dataset, task, example), request_id="mine")
        expected = bundle.scorer([bundle.encode(prompt)]).score(prompt)
        np.testing.assert_allclose(probabilities(response), expected, atol=1e-5)
        assert list(response.labels) == list(task.words)
        assert response.request_id == "mine"
        assert response.usage.events_cut == prompt.dropped
        assert response.scores[0].id == str(100 + example.items[response.scores[0].index])
