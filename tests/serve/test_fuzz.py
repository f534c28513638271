"""Nonsense in, answers or clear refusals out: never an internal error, and the server scores rightly afterwards.

BREWJAX_FUZZ is how many of each kind are tried; BREWJAX_FUZZ_SEED draws others.
"""

import asyncio
import json
import os
import random
from collections.abc import Awaitable, Callable, Iterable
from typing import Any

import grpc
import numpy as np
import pytest
from google.protobuf.descriptor import FieldDescriptor
from google.protobuf.message import DecodeError, Message

from brewjax.data.tasks.examples import example_at
from brewjax.serve import ranker_pb2 as pb
from brewjax.serve.client import raw
from brewjax.serve.http import make_app
from brewjax.serve.refusals import status_of
from brewjax.serve.requests import request_from_example
from tests.serve.serving import LABELS, ask, draw, eventually, expected, pages_held, probabilities, waiting

TRIES = int(os.environ.get("BREWJAX_FUZZ", 10_000))
SEED = int(os.environ.get("BREWJAX_FUZZ_SEED", 0))
AT_ONCE = 100
FINE = {grpc.StatusCode.OK, grpc.StatusCode.INVALID_ARGUMENT}

TEXTS = ["", "Yes", "x", "<|endoftext|>", "\x00", "\U0010ffff", "a b " * 50, "apply", "viewed", "salary", "NaN", "-1"]
INTEGERS = [0, 1, 2, 5, 64, 2**31 - 1, 2**31, 2**32 - 1]
WIDE = [*INTEGERS, -1, -(2**31), 253402300800, -62135596801, 2**63 - 1, -(2**63)]
FLOATS = [0.0, -0.0, 1e-320, 1e308, float("inf"), float("-inf"), float("nan")]
OF_TYPE: dict[int, list[Any]] = {
    FieldDescriptor.TYPE_STRING: TEXTS,
    FieldDescriptor.TYPE_UINT32: INTEGERS,
    FieldDescriptor.TYPE_INT32: [*INTEGERS[:6], -1, -(2**31)],
    FieldDescriptor.TYPE_INT64: WIDE,
    FieldDescriptor.TYPE_DOUBLE: FLOATS,
    FieldDescriptor.TYPE_BOOL: [True, False],
    FieldDescriptor.TYPE_ENUM: [0, 1, 2, 3, -1, 2**31 - 1],
}


@pytest.fixture(scope="module")
def valid(dataset, tasks) -> list[pb.ScoreRequest]:
    """Small ones of every kind, that are then spoilt."""
    members = [request_from_example(dataset, task, example_at(dataset, task, 2).select(slice(3))) for task in tasks]
    prefix, items = draw(1, 3, prefix=9)
    raws = [raw(prefix, items, LABELS, [[7, 8], [9]]), raw("a member", ["b", "c d"], ["Yes", "No"], ["once"])]
    return [
        *(pb.ScoreRequest(member=member, truncation="TRUNCATE") for member in members),
        *(pb.ScoreRequest(raw=message, normalize_over="VOCABULARY", top_k=2) for message in raws),
    ]


# --- protobufs


def spoil(message: Message, rng: random.Random) -> None:
    """Sets, clears or repeats a field of a message, at any depth."""
    fields = message.DESCRIPTOR.fields
    present = [field for field, _ in message.ListFields()]
    field = rng.choice(present if present and rng.random() < 0.8 else fields)
    value = getattr(message, field.name)
    if rng.random() < 0.1:
        message.ClearField(field.name)
    elif field.message_type and field.message_type.GetOptions().map_entry:
        key = rng.choice(list(value)) if value and rng.random() < 0.8 else rng.choice(TEXTS)
        spoil(value[key], rng)
    elif field.message_type and field.is_repeated:
        if not value or rng.random() < 0.2:
            value.add()
        elif rng.random() < 0.1:
            value.extend([rng.choice(value)] * rng.randrange(30))
        spoil(rng.choice(value), rng)
    elif field.message_type:
        spoil(value, rng)
    elif field.is_repeated:
        value.extend(rng.choices(OF_TYPE[field.type], k=rng.choice([1, 1, 1, 40])))
    else:
        setattr(message, field.name, rng.choice(OF_TYPE[field.type]))


def spoil_bytes(data: bytes, rng: random.Random) -> bytes:
    """Some bytes changed, left out, or put in; or nothing but noise."""
    if rng.random() < 0.1:
        return rng.randbytes(rng.randrange(200))
    spoilt = bytearray(data)
    for _ in range(rng.randint(1, 4)):
        at = rng.randrange(len(spoilt) + 1)
        spoilt[at : at + rng.choice([0, 1, 1, 1, 20])] = rng.randbytes(rng.choice([0, 1, 1, 1, 4]))
    return bytes(spoilt)


def protobufs(valid: list[pb.ScoreRequest], seed: int) -> Iterable[bytes]:
    for number in range(TRIES):
        rng = random.Random(f"{SEED} {seed} {number}")
        request = pb.ScoreRequest()
        request.CopyFrom(rng.choice(valid))
        if rng.random() < 0.5:
            yield spoil_bytes(request.SerializeToString(), rng)
        else:
            for _ in range(rng.randint(1, 3)):
                spoil(request, rng)
            yield request.SerializeToString()


def all_at_once(server, tries: Iterable, attempt: Callable[[Any], Awaitable[object]]) -> list:
    """What each of many comes to, on the server's loop, some at a time so that they share passes."""

    async def run() -> list:
        places = asyncio.Semaphore(AT_ONCE)

        async def attempt_one(value: Any) -> object:
            async with places:
                return await attempt(value)

        return await asyncio.gather(*map(attempt_one, tries))

    return asyncio.run_coroutine_threadsafe(run(), server.loop).result(3_600)


def still_right(server, client, alone) -> None:
    question = ask(1, 30)
    np.testing.assert_allclose(probabilities(client.score(question)), expected(alone, question), atol=1e-5)
    eventually(lambda: pages_held(server.service.scoring_loop) == waiting(server.service.scoring_loop) == 0)
    assert server.service.ready


def test_fuzzed_protobufs(server, client, alone, valid):
    compiled = client.describe().compilations

    async def attempt(data: bytes) -> tuple[grpc.StatusCode, str]:
        try:
            request = pb.ScoreRequest.FromString(data)
        except DecodeError as error:
            return grpc.StatusCode.INVALID_ARGUMENT, str(error)
        try:
            response = await server.service.score(request)
        except Exception as error:
            return status_of(error), f"{error}"
        assert np.isfinite([item.probabilities for item in response.scores]).all()
        return grpc.StatusCode.OK, ""

    outcomes = all_at_once(server, tries := list(protobufs(valid, 1)), attempt)
    wrong = [(data, outcome) for data, outcome in zip(tries, outcomes, strict=True) if outcome[0] not in FINE]
    assert not wrong, wrong[:3]
    assert min(sum(code is fine for code, _ in outcomes) for fine in FINE) > TRIES // 20  # both do occur
    still_right(server, client, alone)
    assert client.describe().compilations == compiled


def test_fuzzed_protobufs_over_the_wire(server, client, alone, valid):
    with grpc.insecure_channel(f"127.0.0.1:{server.port}") as channel:
        score = channel.unary_unary("/brewjax.ranker.v1.Ranker/Score")
        stream = channel.unary_stream("/brewjax.ranker.v1.Ranker/ScoreStream")
        for number, data in zip(range(300), protobufs(valid, 2), strict=False):
            try:
                score(data) if number % 2 else list(stream(data))
            except grpc.RpcError as error:
                assert error.code() in FINE, (data, error.details())  # noqa: PT017
    still_right(server, client, alone)


# --- JSON

JSON_VALUES = [
    None, True, -1, 0, 1.5, 1e400, 10**30, float("nan"), "", "Yes", "\ud800", "\x00", [], {}, [[]], [[1, 2], "a"],
    [None], {"items": []}, [[2**32]], ["a"] * 40,
]  # fmt: skip
BODIES: list[dict[str, Any]] = [
    {"query": "a member", "items": ["b", "c d"], "label_token_ids": [5, 9], "apply_softmax": True, "model": "m"},
    {"query": [7, 8, 9], "items": [[4], [5, 6]], "label_token_ids": [5, 9], "item_first": False},
    {"query": "a", "items": "b", "label_token_ids": [5], "item_first": True},
]


def spoil_json(value: Any, rng: random.Random) -> Any:
    """Another value, at any depth."""
    if not isinstance(value, dict | list) or not value or rng.random() < 0.15:
        return rng.choice(JSON_VALUES)
    spoilt = value.copy()
    key = rng.choice(list(value) if isinstance(value, dict) else range(len(value)))
    if rng.random() < 0.15:
        del spoilt[key]
    elif isinstance(value, dict) and rng.random() < 0.1:
        spoilt[rng.choice(TEXTS)] = rng.choice(JSON_VALUES)
    else:
        spoilt[key] = spoil_json(value[key], rng)
    return spoilt


def bodies() -> Iterable[bytes]:
    for number in range(TRIES):
        rng = random.Random(f"{SEED} {number}")
        body: Any = rng.choice(BODIES)
        if rng.random() < 0.3:
            yield spoil_bytes(json.dumps(body).encode(), rng)
        else:
            for _ in range(rng.randint(1, 2)):
                body = spoil_json(body, rng)
            yield json.dumps(body).encode()


@pytest.mark.long
def test_fuzzed_json(server, client, alone):
    app = make_app(server.service, server._credentials, server._refusals, server.reload)

    async def attempt(body: bytes) -> tuple[int, str]:
        """As uvicorn would call the application."""
        sent: list[dict] = []
        scope = {
            "type": "http", "http_version": "1.1", "method": "POST", "path": "/v1/score", "raw_path": b"/v1/score",
            "query_string": b"", "root_path": "", "scheme": "http", "server": ("test", 80), "client": ("test", 1),
            "headers": [(b"content-type", b"application/json"), (b"content-length", str(len(body)).encode())],
        }  # fmt: skip
        messages = [{"type": "http.request", "body": body, "more_body": False}]

        async def receive() -> dict:
            if messages:
                return messages.pop()
            return await asyncio.Future()

        async def send(message: dict) -> None:
            sent.append(message)

        await app(scope, receive, send)
        return sent[0]["status"], b"".join(message.get("body", b"") for message in sent).decode()

    outcomes = all_at_once(server, tries := list(bodies()), attempt)
    for body, (status, text) in zip(tries, outcomes, strict=True):
        assert status in (200, 400), (body, status, text)
        answer = json.loads(text)
        assert np.isfinite(answer["scores"]).all() if status == 200 else answer["message"], (body, text)
    assert min(sum(status == fine for status, _ in outcomes) for fine in (200, 400)) > TRIES // 20
    still_right(server, client, alone)


def test_fuzzed_json_over_the_wire(server, client, http, alone):
    for _, body in zip(range(300), bodies(), strict=False):
        response = http.post("/v1/score", content=body, headers={"content-type": "application/json"})
        assert response.status_code in (200, 400), (body, response.text)
    still_right(server, client, alone)


@pytest.mark.parametrize("data", [b"\x00" * 100, b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n", b"GET / HTTP/1.1\r\n\r\n" * 3])
def test_noise_instead_of_a_protocol(server, client, alone, data):
    import socket

    for port in (server.port, server.http_port):
        with socket.create_connection(("127.0.0.1", port)) as connection:
            connection.sendall(data)
    still_right(server, client, alone)
