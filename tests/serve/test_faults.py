"""Requests that are wrong, callers that vanish, passes that fail, checkpoints that are broken: over the wire."""

import concurrent.futures
import signal
import subprocess
import sys
import textwrap
from pathlib import Path
from unittest import mock

import grpc
import httpx
import numpy as np
import pytest
from google.protobuf.timestamp_pb2 import Timestamp
from grpc_health.v1 import health_pb2, health_pb2_grpc

from brewjax.data.tasks.examples import example_at
from brewjax.serve import ranker_pb2 as pb
from brewjax.serve import ranker_pb2_grpc
from brewjax.serve.client import raw
from brewjax.serve.requests import request_from_example
from tests.serve.serving import (
    LABELS,
    ask,
    draw,
    eventually,
    expected,
    held,
    pages_held,
    probabilities,
    refusal,
    waiting,
)

Code = grpc.StatusCode
ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def bare(server):
    """A stub without the client's retries."""
    with grpc.insecure_channel(f"127.0.0.1:{server.port}") as channel:
        yield ranker_pb2_grpc.RankerStub(channel)


@pytest.fixture
def member(dataset, tasks) -> pb.Member:
    return request_from_example(dataset, tasks[0], example_at(dataset, tasks[0], 6).select(slice(4)))


def request(question, **fields) -> pb.ScoreRequest:
    name = "member" if isinstance(question, pb.Member) else "raw"
    return pb.ScoreRequest(**{name: question}, **fields)


def answered(server, code: str, method: str = "Score") -> float:
    return server.service.metrics.requests.labels(method, code, "")._value.get()


# --- requests that are wrong


def put(attributes, name: str, **value) -> None:
    attributes[name].CopyFrom(pb.Value(**value))


def at(seconds: int, nanos: int = 0) -> Timestamp:
    return Timestamp(seconds=seconds, nanos=nanos)


WRONG_MEMBERS = {
    "member.task: no task 'buy'; tasks: apply, view": lambda m: setattr(m, "task", "buy"),
    "member.task: no task 'xxx": lambda m: setattr(m, "task", "x" * 1_000_000),
    "member.items: 0 of them; give 1 to 1,000": lambda m: m.ClearField("items"),
    "member.items: 1,001 of them": lambda m: m.items.extend([pb.Item()] * 997),
    "member.history: 10,001 of them; give at most 10,000": lambda m: m.history.extend(
        [pb.Event()] * (10_001 - len(m.history))
    ),
    "member.history[1].action: no action 'bought'": lambda m: setattr(m.history[1], "action", "bought"),
    "member.history[2].time: missing": lambda m: m.history[2].ClearField("time"),
    "member.items[0].attributes['salary']: a text; for a number": lambda m: put(
        m.items[0].attributes, "salary", text="much"
    ),
    "member.items[1].attributes['salary']: nan; leave it out": lambda m: put(
        m.items[1].attributes, "salary", number=float("nan")
    ),
    "member.attributes['experience']: -inf; leave it out": lambda m: put(
        m.attributes, "experience", number=-float("inf")
    ),
    "member.attributes: no attribute 'shoe size'": lambda m: put(m.attributes, "shoe size", integer=43),
    "member.now: Timestamp is not valid: Seconds -62135596801": lambda m: m.now.CopyFrom(at(-62135596801)),
    "member.now: Timestamp is not valid: Seconds 9223372036854775807": lambda m: m.now.CopyFrom(at(2**63 - 1)),
    "member.history[0].time: Timestamp is not valid: Seconds 253402300800": lambda m: m.history[0].time.CopyFrom(
        at(253402300800)
    ),
    "member.history[0].time: Timestamp is not valid: Nanos -1": lambda m: m.history[0].time.CopyFrom(at(0, -1)),
    "member.items[2].attributes['posted']: Timestamp is not valid": lambda m: put(
        m.items[2].attributes, "posted", date=at(-(2**63))
    ),
}


WRONG_RAW = {
    "raw.items: 0 of them": pb.Raw(label_tokens=LABELS),
    "raw.items[1]: empty": raw("a", ["b", ""], LABELS, ["of an event"]),
    "raw.items[2]: 1,025 tokens; at most 1,024 are read": raw([7], [[8], [9], [8] * 1025], LABELS),
    "raw.items[0]: no token 4000000000; the model knows": raw([7], [[4_000_000_000]], LABELS),
    "raw.prefix: no token 60000": raw([60_000], [[8]], LABELS),
    "raw.events[1]: no token 60000": raw([7], [[8]], LABELS, [[7], [60_000]]),
    "raw.label_tokens: no token 60000": raw([7], [[8]], [5, 60_000]),
    "raw.labels: 0 of them; give 1 to 256": raw([7], [[8]], []),
    "raw.labels: 257 of them": raw([7], [[8]], range(10, 267)),
    "raw.labels: one is given twice": raw([7], [[8]], [5, 9, 5]),
    "raw.labels[1]: label word 'Certainly not' is": raw([7], [[8]], ["Yes", "Certainly not"]),
    "raw.labels[0]: label word '' is 0 tokens": raw([7], [[8]], [""]),
    "raw: 1,025 tokens before the items": raw([7] * 1025, [[8]], LABELS),
    "raw.events: 10,001 of them; give at most 10,000": raw([7], [[8]], LABELS, [[]] * 10_001),
    "the request: 10,000,": raw("a", ["b", "x" * 10_000_000], LABELS),
}


def wrong(member: pb.Member) -> dict[str, pb.ScoreRequest]:
    """What an error must say, and what it is about."""
    requests = {message: request(question) for message, question in WRONG_RAW.items()}
    for message, change in WRONG_MEMBERS.items():
        changed = pb.Member()
        changed.CopyFrom(member)
        change(changed)
        requests[message] = request(changed)
    overlong = pb.Member()
    overlong.CopyFrom(member)
    put(overlong.attributes, "position", text="nurse " * 600)
    requests["member: the instruction with member 0 takes 2,"] = request(overlong, truncation="REJECT")
    requests["question: give a member or raw"] = pb.ScoreRequest(top_k=3)
    requests["request_id: 300 characters; give at most 200"] = request(ask(1, 2), request_id="a" * 300)
    return requests


def test_wrong_requests_name_the_field_and_the_right_ones_beside_them_are_answered(
    server, client, bare, scoring_loop, alone, member
):
    of_member = probabilities(client.score(member))
    good = [ask(seed, 5) for seed in range(4)]
    with held(scoring_loop) as gate:
        answers = [bare.Score.future(request(valid)) for valid in (*good, member)]
        eventually(lambda: gate.passes)
        for message, question in wrong(member).items():
            for call in (bare.Score, lambda sent: list(bare.ScoreStream(sent))):
                if call is not bare.Score and ("of them" in message or question.top_k):
                    continue  # whose limits are others
                code, details = refusal(call, question)
                assert code is Code.INVALID_ARGUMENT, details
                assert details.startswith(message)
        gate.open()
        for answer, right in zip(answers, [*(expected(alone, valid) for valid in good), of_member], strict=True):
            np.testing.assert_allclose(probabilities(answer.result()), right, atol=1e-5)
    too_many = raw([7], [[8]] * 50_001, LABELS)
    assert refusal(lambda: list(client.stream(too_many)))[1].startswith("raw.items: 50,001 of them")


@pytest.mark.parametrize(
    "odd",
    [
        "<|endoftext|><|im_start|>user Yes",
        "\u202e\u200f\ufeff\x00\x01\x7f",
        "\U0001f9d1\u200d\U0001f680 \ufffd\ufffe\uffff \U0010ffff",
        "\uff39\uff45\uff53 e\u0301 \u1100\u1161",
        "\r\n\t{ask}{0}%s$(x)",
        "x" * 50_000,
    ],
)
def test_odd_texts_are_read_like_others(client, member, odd):
    attributes = member.items[0].attributes
    put(attributes, "company", text=odd[:60])
    put(attributes, "skills", list=pb.Texts(values=[odd[:60]] * 2))
    assert np.isfinite(probabilities(client.score(member))).all()
    scores = probabilities(client.score(raw(odd, ["a", odd[:500], "b"], ["Yes", "No"]), truncation="TRUNCATE"))
    np.testing.assert_allclose(scores.sum(-1), 1, atol=1e-5)


@pytest.mark.parametrize("year", [1, 1969, 9999])
def test_any_time_there_is_can_be_told(client, member, year):
    member.now.FromJsonString(f"{year:04}-12-31T23:59:59.999999999Z")
    for event, moment in zip(member.history, ("0001-01-01T00:00:00Z", "9999-12-31T23:59:59Z"), strict=False):
        event.time.FromJsonString(moment)
    put(member.items[0].attributes, "posted", date=member.now)
    assert len(client.score(member).scores) == 4


# --- limits


def test_a_full_queue_tells_when_to_come_back_and_the_client_does(server, client, bare, http, scoring_loop, alone):
    fits = ask(2, 5)
    with (
        mock.patch.multiple(scoring_loop, _max_queued_tokens=1_000, _tokens_per_second=500.0),
        held(scoring_loop) as gate,
    ):
        first = bare.Score.future(request(ask(1, 300)))
        eventually(lambda: gate.passes)
        with pytest.raises(grpc.RpcError) as refused:
            bare.Score(request(fits))
        assert refused.value.code() is Code.RESOURCE_EXHAUSTED
        assert refused.value.details().startswith("the queue is full; try again in ")
        assert int(dict(refused.value.trailing_metadata())["grpc-retry-pushback-ms"]) > 500
        body = {"query": [7], "items": [[8]], "label_token_ids": [5]}
        full = http.post("/v1/score", json=body)
        assert full.status_code == 429
        assert int(full.headers["retry-after"]) >= 1
        before = answered(server, "RESOURCE_EXHAUSTED")
        with concurrent.futures.ThreadPoolExecutor() as pool:
            again = pool.submit(client.score, fits)
            eventually(lambda: answered(server, "RESOURCE_EXHAUSTED") > before)
            gate.open()
            np.testing.assert_allclose(probabilities(again.result()), expected(alone, fits), atol=1e-5)
        assert len(first.result().scores) == 300


def test_a_request_is_queued_with_all_of_its_labels_or_not_at_all(client, bare, scoring_loop):
    question = raw([7] * 64, [[8]], range(3, 35))
    more_labels = raw([7] * 64, [[8]], range(3, 36))  # is scored as two
    with held(scoring_loop) as gate:
        first = bare.Score.future(request(ask(1, 3)))
        eventually(lambda: gate.passes)
        before = waiting(scoring_loop)
        second = bare.Score.future(request(question))
        eventually(lambda: waiting(scoring_loop) > before)
        queued = waiting(scoring_loop)
        room_for_one = queued + (queued - before)
        with mock.patch.object(scoring_loop, "_max_queued_tokens", room_for_one):
            assert refusal(bare.Score, request(more_labels))[0] is Code.RESOURCE_EXHAUSTED
            assert waiting(scoring_loop) == queued
            third = bare.Score.future(request(question))
            eventually(lambda: waiting(scoring_loop) == room_for_one)
        gate.open()
        assert all(call.result() for call in (first, second, third))
    assert client.score(more_labels)


def test_a_large_request_is_tried_again_too(server, client, scoring_loop, member):
    for item in member.items:
        item.id = "x" * 100_000
    full = mock.patch.multiple(scoring_loop, _max_queued_tokens=0, _tokens_per_second=200.0)
    with full, held(scoring_loop) as gate, concurrent.futures.ThreadPoolExecutor() as pool:
        first = pool.submit(client.score, ask(1, 3))
        eventually(lambda: gate.passes)
        before = answered(server, "RESOURCE_EXHAUSTED")
        large = pool.submit(client.score, member)
        eventually(lambda: answered(server, "RESOURCE_EXHAUSTED") > before)
        gate.open()
        assert first.result()
        assert len(large.result().scores) == 4


def test_only_so_many_are_answered_at_a_time(server, client, bare, scoring_loop):
    config = server.service.config.model_copy(update={"max_concurrent_requests": 2})
    with mock.patch.object(server.service, "config", config), held(scoring_loop) as gate:
        two = [bare.Score.future(request(ask(seed, 3))) for seed in range(2)]
        eventually(lambda: server.service._num_requests.total() == 2)
        assert refusal(bare.Score, request(ask(3, 3))) == (
            Code.RESOURCE_EXHAUSTED,
            "2 requests are answered at a time; try again in 1.0 s",
        )
        gate.open()
        assert all(call.result() for call in two)
    assert client.score(ask(3, 3))


def test_the_limits_are_told(client):
    limits = client.describe().limits
    assert (limits.max_candidates, limits.max_stream_candidates, limits.max_events) == (1_000, 50_000, 10_000)
    assert (limits.max_prefix_tokens, limits.max_candidate_tokens, limits.max_labels) == (1_024, 1_024, 256)
    assert (limits.max_request_bytes, limits.max_queued_tokens) == (8_000_000, 200_000)
    assert limits.max_concurrent_requests == 256


# --- deadlines


def test_a_deadline_that_passes_frees_its_place(server, bare, http, scoring_loop):
    with held(scoring_loop) as gate:
        first = bare.Score.future(request(ask(1, 3)))
        eventually(lambda: gate.passes)
        alone = waiting(scoring_loop)
        assert refusal(bare.Score, request(ask(2, 3)), timeout=0.5)[0] is Code.DEADLINE_EXCEEDED
        assert refusal(lambda: list(bare.ScoreStream(request(ask(2, 3)), timeout=0.5)))[0] is Code.DEADLINE_EXCEEDED
        eventually(lambda: waiting(scoring_loop) == alone)
        config = server.service.config.model_copy(update={"timeout_seconds": 0.2})
        with mock.patch.object(server.service, "config", config):
            body = {"query": [7], "items": [[8]], "label_token_ids": [5]}
            late = http.post("/v1/score", json=body)
            assert (late.status_code, late.json()["message"]) == (504, "not answered within 0.2 seconds")
            code, details = refusal(bare.Score, request(ask(2, 3)))
            assert (code, details) == (Code.DEADLINE_EXCEEDED, "not answered within 0.2 seconds")
        eventually(lambda: waiting(scoring_loop) == alone)
        gate.open()
        assert first.result()
    assert all(part.prompt.prefix_length == 200 for pass_ in gate.passes for part in pass_.chunks)  # of the first alone
    assert len(gate.passes) == 1


@pytest.mark.parametrize("timeout", [-5.0, 0.0, 1e-9])
def test_a_deadline_in_the_past_is_no_crash(bare, scoring_loop, timeout):
    assert refusal(bare.Score, request(ask(1, 3)), timeout=timeout)[0] is Code.DEADLINE_EXCEEDED


def test_a_deadline_in_the_far_future_is_the_servers(bare):
    assert bare.Score(request(ask(1, 3)), timeout=1e8).scores


# --- callers that vanish


def test_cancelled_work_never_runs(server, bare, scoring_loop):
    with held(scoring_loop) as gate:
        first = bare.Score.future(request(ask(1, 3)))
        eventually(lambda: gate.passes)
        pending = [bare.Score.future(request(ask(seed, 3))) for seed in (2, 3)]
        stream = bare.ScoreStream(request(ask(4, 2_000)))
        eventually(lambda: server.service._num_requests.total() == 4)
        before = answered(server, "CANCELLED")
        for call in (*pending, stream):
            call.cancel()
        eventually(lambda: server.service._num_requests.total() == 1)
        assert answered(server, "CANCELLED") == before + 2
        gate.open()
        assert first.result()
    assert len(gate.passes) == 1


def test_who_hangs_up_over_http_is_dropped_too(server, bare, scoring_loop):
    with held(scoring_loop) as gate:
        first = bare.Score.future(request(ask(1, 3)))
        eventually(lambda: gate.passes)
        body = {"query": [7], "items": [[8]], "label_token_ids": [5]}
        with pytest.raises(httpx.ReadTimeout):
            httpx.post(f"http://127.0.0.1:{server.http_port}/v1/score", json=body, timeout=1)
        eventually(lambda: server.service._num_requests.total() == 1)
        gate.open()
        assert first.result()
    assert {part.prompt.prefix_length for pass_ in gate.passes for part in pass_.chunks} == {200}


def test_who_vanishes_in_the_middle_of_a_stream_frees_place_and_pages(server, bare, scoring_loop):
    with held(scoring_loop) as gate:
        stream = bare.ScoreStream(request(ask(1, 5_000)))
        gate.let(2)
        assert next(stream).scores
        eventually(lambda: len(gate.passes) == 3)
        assert pages_held(scoring_loop) == 4
        stream.cancel()
        eventually(lambda: server.service._num_requests.total() == 0)
        assert waiting(scoring_loop) == 0
        gate.open()
        eventually(lambda: pages_held(scoring_loop) == 0)
    assert len(gate.passes) <= 4


def test_a_client_that_is_killed_frees_place_and_pages(server, scoring_loop):
    script = """
        import sys, time
        from brewjax.serve.client import Client, raw
        with Client(sys.argv[1]) as client:
            for response in client.stream(raw([7] * 200, [[8, 9]] * 5_000, [5, 9])):
                print("first", flush=True)
                time.sleep(600)
    """
    command = [sys.executable, "-c", textwrap.dedent(script), f"127.0.0.1:{server.port}"]
    with held(scoring_loop) as gate:
        gate.let(2)
        with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True) as process:
            assert process.stdout
            assert process.stdout.readline() == "first\n"
            process.send_signal(signal.SIGKILL)
        eventually(lambda: server.service._num_requests.total() == 0)
        assert waiting(scoring_loop) == 0
        gate.open()


def test_a_slow_client_holds_up_nobody_and_not_for_ever(server, client, bare, scoring_loop, alone):
    """Its answers are far more than gRPC sends to one who does not read."""
    slow = raw(*draw(1, 5_000), range(10, 42))
    stream = bare.ScoreStream(request(slow))
    first = next(stream)
    for seed in range(3):
        question = ask(seed, 20)
        np.testing.assert_allclose(probabilities(client.score(question)), expected(alone, question), atol=1e-5)
    np.testing.assert_allclose(probabilities(first, *stream), expected(alone, slow), atol=1e-5)
    config = server.service.config.model_copy(update={"timeout_seconds": 4.0})
    with mock.patch.object(server.service, "config", config):
        before = answered(server, "DEADLINE_EXCEEDED", "ScoreStream")
        with grpc.insecure_channel(f"127.0.0.1:{server.port}", [("grpc.http2.bdp_probe", 0)]) as narrow:
            never_read = ranker_pb2_grpc.RankerStub(narrow).ScoreStream(request(slow))
            next(never_read)
            eventually(lambda: answered(server, "DEADLINE_EXCEEDED", "ScoreStream") > before)
            assert refusal(lambda: list(never_read))[0] is Code.DEADLINE_EXCEEDED


# --- passes that fail


def test_a_pass_that_fails_is_internal_and_health_says_so_until_it_is_over(
    server, bare, http, client, scoring_loop, alone
):
    health = health_pb2_grpc.HealthStub(grpc.insecure_channel(f"127.0.0.1:{server.port}"))
    states = health_pb2.HealthCheckResponse

    def status() -> int:
        return health.Check(health_pb2.HealthCheckRequest(service="brewjax.ranker.v1.Ranker")).status

    question = ask(1, 10)
    compiled = client.describe().compilations
    eventually(lambda: status() == states.SERVING)
    with mock.patch.object(scoring_loop.scorer, "collect", side_effect=RuntimeError("out of memory at 0x7f")):
        code, details = refusal(bare.Score, request(question))
        assert (code, details) == (Code.INTERNAL, "internal error; the server's log has it")
        body = {"query": [7], "items": [[8]], "label_token_ids": [5]}
        failed = http.post("/v1/score", json=body)
        assert (failed.status_code, failed.json()["message"]) == (500, "internal error; the server's log has it")
        assert refusal(lambda: list(bare.ScoreStream(request(question))))[0] is Code.INTERNAL
        assert http.get("/health").status_code == 503
        eventually(lambda: status() == states.NOT_SERVING)
    eventually(lambda: status() == states.SERVING)
    assert http.get("/health").status_code == 200
    np.testing.assert_allclose(probabilities(client.score(question)), expected(alone, question), atol=1e-5)
    assert client.describe().compilations == compiled


def test_nothing_of_all_this_is_left(server, client, scoring_loop, alone):
    """The last of the file: the server is as it was."""
    assert waiting(scoring_loop) == pages_held(scoring_loop) == server.service._num_requests.total() == 0
    assert server.service.ready
    question = ask(1, 50)
    np.testing.assert_allclose(probabilities(client.score(question)), expected(alone, question), atol=1e-5)
