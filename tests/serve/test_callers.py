"""Callers with tokens of their own: none fills the queue, and the more urgent is scored first."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import grpc
import httpx
import pytest

from brewjax.config import ConfigError
from brewjax.serve import ranker_pb2 as pb
from brewjax.serve import ranker_pb2_grpc
from brewjax.serve.callers import UNNAMED, Caller
from brewjax.serve.config import CallerConfig, ServeConfig
from brewjax.serve.credentials import Credentials
from brewjax.serve.server import Server
from tests.serve.serving import ADMIN_TOKEN, CONFIG, TOKEN, ask, eventually, held, refusal, running

TOKENS = {"feed": "feed me", "backfill": "in the night", "shared": TOKEN, "admin": ADMIN_TOKEN}


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("callers")
    for name, token in TOKENS.items():
        (folder / name).write_text(token)
    return folder


@pytest.fixture(scope="module")
def settings(folder) -> dict:
    callers = {"feed": {"priority": 1}, "backfill": {"share": 0.02}}
    return {
        "token_file": str(folder / "shared"),
        "admin_token_file": str(folder / "admin"),
        "callers": {
            name: CallerConfig(token_file=str(folder / name), **caller) for name, caller in callers.items()
        },
    }  # fmt: skip


@pytest.fixture(scope="module")
def server(model_folder, settings) -> Iterator[Server]:
    settings = {**settings, "token_buckets": (256,), "max_candidate_tokens": 256, "max_concurrent_requests": 100}
    with running(model_folder, CONFIG.model_copy(update=settings)) as server:
        yield server


@pytest.fixture
def score(server) -> Iterator[Callable]:
    """Calls Score as one of the callers, with so many items; the call is a future."""
    with grpc.insecure_channel(f"127.0.0.1:{server.port}") as channel:
        stub = ranker_pb2_grpc.RankerStub(channel)

        def call(caller: str, seed: int = 0, items: int = 3) -> grpc.Future:
            request = pb.ScoreRequest(raw=ask(seed, items, prefix=70))
            return stub.Score.future(request, metadata=[("authorization", f"Bearer {TOKENS[caller]}")], timeout=60)

        yield call


def answered(server: Server, caller: str, code: str = "OK") -> float:
    return server.service.metrics.requests.labels("Score", code, caller)._value.get()


def test_requests_count_for_their_caller_on_both_ports(server, score):
    counts = {name: answered(server, name) for name in ("feed", "backfill", "")}
    for caller in ("feed", "shared", "admin"):
        score(caller).result()
    with httpx.Client(base_url=f"http://127.0.0.1:{server.http_port}", timeout=60) as http:
        body = {"query": "Likes", "items": ["this", "that"], "label_token_ids": [1, 2]}
        for token, status in ((TOKENS["backfill"], 200), ("guess", 401)):
            assert http.post("/v1/score", json=body, headers={"authorization": f"Bearer {token}"}).status_code == status
    assert {name: answered(server, name) - count for name, count in counts.items()} == {"feed": 1, "backfill": 1, "": 2}


def test_a_share_of_the_queue_is_all_that_a_caller_gets(server, score):
    """Of 100 requests, two hundredths are two; others are scored all the same."""
    loop = server.service.scoring_loop
    with held(loop) as gate:
        calls = [score("backfill", seed) for seed in range(2)]
        eventually(lambda: server.service._num_requests["backfill"] == 2)
        code, message = refusal(score("backfill", 2).result)
        assert (code, message) == (
            grpc.StatusCode.RESOURCE_EXHAUSTED,
            "caller 'backfill' has its share of 100 requests; try again in 1.0 s",
        )
        urgent = score("feed", 2)
        eventually(lambda: server.service._num_requests.total() == 3)
        gate.open()
        assert all(len(call.result().scores) == 3 for call in (*calls, urgent))


def test_a_share_is_of_tokens_too(server, score):
    with held(server.service.scoring_loop) as gate:
        long = score("backfill", items=600)  # alone it may be longer than the share
        eventually(lambda: gate.passes)
        _, message = refusal(score("backfill", 1, items=600).result)
        assert message.startswith("caller 'backfill' has its share of the queue; try again in")
        gate.open()
        assert len(long.result().scores) == 600


def test_the_more_urgent_is_scored_first(server, score):
    """A request that comes last, behind long ones, is in the first pass that is not dispatched yet."""
    done = []
    with held(server.service.scoring_loop) as gate:
        calls = {}
        for name, seed in (("shared", 0), ("admin", 1), ("feed", 2)):
            calls[name] = score(name, seed, items=3 if name == "feed" else 100)
            calls[name].add_done_callback(lambda _, name=name: done.append(name))
            eventually(lambda: server.service._num_requests.total() == len(calls))
        eventually(lambda: gate.passes)
        gate.open()
        for call in calls.values():
            call.result()
    eventually(lambda: len(done) == 3)
    assert done[0] == "feed"


def test_who_a_token_is_of(settings, folder):
    credentials = Credentials(ServeConfig(**settings))
    by_token = {name: credentials.find_caller(f"Bearer {token}") for name, token in TOKENS.items()}
    feed, backfill = Caller("feed", 1.0, 1), Caller("backfill", 0.02, 0)
    assert by_token == {"feed": feed, "backfill": backfill, "shared": UNNAMED, "admin": UNNAMED}
    assert credentials.find_caller("") is None
    assert not credentials.may_reload(f"Bearer {TOKENS['feed']}")
    alone = {"callers": settings["callers"]}
    assert Credentials(ServeConfig(**alone)).find_caller("") is None
    assert Credentials(ServeConfig(**alone, anonymous=True)).find_caller("") == UNNAMED
    assert Credentials(ServeConfig()).find_caller("") == UNNAMED


def test_no_two_callers_have_one_token(settings, folder):
    callers = {**settings["callers"], "other": CallerConfig(token_file=str(folder / "feed"))}
    with pytest.raises(ConfigError, match=r"callers.other.token_file: the same token as in callers.feed.token_file"):
        Credentials(ServeConfig(**{**settings, "callers": callers}))
