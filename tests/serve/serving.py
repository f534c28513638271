"""A server on an event loop of its own, requests for it, and a gate that holds its passes."""

from __future__ import annotations

import asyncio
import gc
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

import grpc
import numpy as np
import pytest

from brewjax.data.text.encode import EncodedPrompt
from brewjax.scoring.passes import Pass
from brewjax.scoring.scorer import Scorer
from brewjax.serve import ranker_pb2 as pb
from brewjax.serve.client import raw
from brewjax.serve.config import ServeConfig
from brewjax.serve.scoring_loop import ScoringLoop
from brewjax.serve.server import Server

CONFIG = ServeConfig(
    port=0,
    http_port=0,
    token_buckets=(256, 1024),
    max_prefix_tokens=1024,
    prefix_cache_gb=0.01,
    decode=False,
    lame_duck_seconds=0,
)
LOOPBACK = ["127.0.0.1"] + ["::1"] * socket.has_dualstack_ipv6()
TOKEN, ADMIN_TOKEN = "open sesame", "open everything"


@contextmanager
def running(folder: Path, config: ServeConfig) -> Iterator[Server]:
    """A server that is stopped in the end. Passes cost what they would on a quiet machine: fewer, longer ones are
    cheaper, whatever else runs beside the tests."""
    with mock.patch.object(
        Scorer, "profile_buckets", lambda self: {bucket: 1000 + bucket.tokens for bucket in self.buckets}
    ):
        server = Server(folder, config)
    loop = asyncio.new_event_loop()
    thread = threading.Thread(target=loop.run_forever)
    thread.start()
    server.loop = loop  # type: ignore[attr-defined]
    try:
        asyncio.run_coroutine_threadsafe(server.start(), loop).result(60)
        gc.unfreeze()  # the collector is for other tests of this process too
        gc.enable()
        yield server
        if not server.service.lame_duck:  # else the test has stopped it
            assert asyncio.run_coroutine_threadsafe(server.stop(), loop).result(60)
    finally:
        loop.call_soon_threadsafe(loop.stop)
        thread.join()


class Gate:
    """A gate that passes go through one by one, or all once it is open.

    Attributes:
      passes: all that arrived at the gate.
    """

    def __init__(self) -> None:
        self.passes: list[Pass] = []
        self._permits, self._open = threading.Semaphore(0), False

    def let(self, passes: int) -> None:
        self._permits.release(passes)

    def open(self) -> None:
        self._open = True
        self._permits.release()

    def go_through(self, passes: list[Pass]) -> None:
        self.passes += passes
        self._permits.acquire()
        if self._open:
            self._permits.release()


@contextmanager
def held(scoring_loop: ScoringLoop) -> Iterator[Gate]:
    """Passes wait at the gate, which opens on exit."""
    gate, start = Gate(), scoring_loop.scorer.dispatch

    def wait(passes, *args):
        gate.go_through(passes)
        return start(passes, *args)

    with mock.patch.object(scoring_loop.scorer, "dispatch", wait):
        try:
            yield gate
        finally:
            gate.open()
            eventually(lambda: waiting(scoring_loop) == 0)


def waiting(scoring_loop: ScoringLoop) -> int:
    """Tokens of rows that requests count for in the queue."""
    return int(scoring_loop._metrics.waiting._value.get())


def eventually(condition: Callable[[], object], seconds: float = 60) -> None:
    until = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < until, "it did not come true"
        time.sleep(0.01)


def refusal(call: Callable[..., object], *args: Any, **kwargs: Any) -> tuple[grpc.StatusCode, str]:
    """The code and the message of a call that must fail."""
    with pytest.raises(grpc.RpcError) as error:
        call(*args, **kwargs)
    return error.value.code(), error.value.details()  # type: ignore[attr-defined]


def pages_held(scoring_loop: ScoringLoop) -> int:
    return len(scoring_loop._scheduler._cache._holders)


def draw(seed: int, items: int, prefix: int = 200) -> tuple[list[int], list[list[int]]]:
    """Tokens of a prefix, and of items of uneven length."""
    random = np.random.default_rng(seed)
    lengths = random.integers(1, 12, items)
    return random.integers(3, 300, prefix).tolist(), [random.integers(3, 300, length).tolist() for length in lengths]


LABELS = [5, 9, 7]


def ask(seed: int, items: int, prefix: int = 200) -> pb.Raw:
    return raw(*draw(seed, items, prefix), LABELS)


def expected(scorer: Scorer, question: pb.Raw) -> np.ndarray:
    """Probabilities of a question in tokens, by a scorer without any server."""
    pieces = [list(text.tokens.ids) for text in (question.prefix, *question.events)]
    items = [list(text.tokens.ids) for text in question.items]
    prompt = EncodedPrompt(pieces, items, list(question.label_tokens), [None] * len(items), "dense")
    return scorer.score_encoded([prompt])[0]


def probabilities(*responses: pb.ScoreResponse) -> np.ndarray:
    """In the order of the request; every item is there once."""
    items = sorted((item for response in responses for item in response.scores), key=lambda item: item.index)
    assert [item.index for item in items] == list(range(len(items)))
    return np.array([item.probabilities for item in items], np.float32)
