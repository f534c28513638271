"""The door of the gRPC port: who may call what, how long a message may take, and what is said and counted."""

import os
import socket
import time

import grpc
import httpx
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc

from brewjax.serve import Client, ranker_pb2_grpc
from brewjax.serve import ranker_pb2 as pb
from brewjax.serve.client import raw
from tests.serve.serving import ADMIN_TOKEN, LOOPBACK, TOKEN, eventually, refusal

Code = grpc.StatusCode
QUESTION = raw([7], [[8]], [5])
BEARER = [("authorization", f"Bearer {TOKEN}")]
SCORE = "/brewjax.ranker.v1.Ranker/Score"


@pytest.fixture
def channel(strict):
    with grpc.insecure_channel(f"127.0.0.1:{strict.port}", [("grpc.use_local_subchannel_pool", 1)]) as channel:
        yield channel


def refused(server, reason: str) -> float:
    return server.service.metrics.refused.labels("grpc", reason)._value.get()


@pytest.mark.parametrize("scheme", ["Bearer", "bearer", "BEARER"])
def test_the_scheme_is_in_any_case(channel, scheme):
    request = pb.ScoreRequest(raw=QUESTION)
    metadata = [("authorization", f"{scheme} {TOKEN}")]
    assert ranker_pb2_grpc.RankerStub(channel).Score(request, metadata=metadata).scores


def half_a_message(channel, metadata):
    """A call that says that its message goes on, and sends nothing."""

    def nothing():
        time.sleep(20)
        yield b""

    return channel.stream_unary(SCORE)(nothing(), metadata=metadata, timeout=15)


def test_the_token_comes_before_the_message(strict, channel):
    before, start_time = refused(strict, "unauthenticated"), time.monotonic()
    assert refusal(half_a_message, channel, [])[0] is Code.UNAUTHENTICATED
    assert time.monotonic() - start_time < 10
    assert refused(strict, "unauthenticated") == before + 1


def test_a_message_that_does_not_come_is_not_waited_for(strict, channel):
    before = refused(strict, "deadline")
    assert refusal(half_a_message, channel, BEARER) == (
        Code.DEADLINE_EXCEEDED,
        "the request did not arrive within 0.5 seconds",
    )
    assert refused(strict, "deadline") == before + 1


def test_connections_that_say_nothing_are_few_and_not_for_ever(strict):
    """gRPC greets those that it takes."""
    connections = [socket.create_connection(("127.0.0.1", strict.port), timeout=10) for _ in range(30)]
    greeted = [bool(connection.recv(1000)) for connection in connections]
    assert 0 < sum(greeted) <= strict.config.connections
    for connection in connections:
        while connection.recv(1000):
            pass
        connection.close()
    with Client(f"127.0.0.1:{strict.port}", TOKEN) as client:
        assert client.score(QUESTION).scores


def test_a_caller_who_pings_keeps_its_call(strict):
    options = [
        ("grpc.keepalive_time_ms", 1_000),
        ("grpc.http2.max_pings_without_data", 0),
        ("grpc.keepalive_permit_without_calls", 1),
        ("grpc.use_local_subchannel_pool", 1),
    ]
    with grpc.insecure_channel(f"127.0.0.1:{strict.port}", options) as channel:
        watching = health_pb2_grpc.HealthStub(channel).Watch(health_pb2.HealthCheckRequest(), timeout=4.5)
        assert next(watching).status == health_pb2.HealthCheckResponse.SERVING
        with pytest.raises(grpc.RpcError) as error:
            next(watching)
        assert error.value.code() is Code.DEADLINE_EXCEEDED  # and not UNAVAILABLE: too many pings


def test_the_probes_have_names(channel):
    health = health_pb2_grpc.HealthStub(channel)

    def status(name: str) -> int:
        return health.Check(health_pb2.HealthCheckRequest(service=name)).status

    for name in ("", "brewjax.ranker.v1.Ranker", "liveness", "readiness", "startup"):
        eventually(lambda name=name: status(name) == health_pb2.HealthCheckResponse.SERVING)


# --- Reload is a right of its own


def test_reload_needs_a_token_of_its_own(strict):
    address = f"127.0.0.1:{strict.port}"
    with Client(address, TOKEN) as caller, Client(address, ADMIN_TOKEN) as admin:
        code, details = refusal(caller.reload)
        assert code is Code.PERMISSION_DENIED
        assert "admin_token_file" in details
        assert admin.reload().model == admin.describe().model
        assert admin.score(QUESTION).scores


def test_reload_takes_up_no_folder_that_the_server_was_not_given(strict, server, client, model_folder, tmp_path):
    with Client(f"127.0.0.1:{strict.port}", ADMIN_TOKEN) as admin:  # which was given the served one only
        assert admin.reload(str(model_folder))
        assert refusal(admin.reload, str(tmp_path)) == (
            Code.PERMISSION_DENIED,
            "folder: the server has no reload_below",
        )
    (tmp_path / "link").symlink_to("/etc")
    below = server.config.reload_below
    for folder in ("/etc", f"{below}/../../etc", str(tmp_path / "link"), os.path.relpath("/etc")):
        assert refusal(client.reload, folder) == (Code.PERMISSION_DENIED, f"folder: not below {below}")
    assert refusal(client.reload, str(tmp_path))[0] is Code.INVALID_ARGUMENT  # no model there


# --- what is said and counted


def test_errors_are_short(client, server):
    for question in (raw("a", ["b"], ["x" * 1_000_000]), pb.Member(task="x" * 1_000_000, items=[pb.Item()])):
        code, details = refusal(client.score, question)
        assert code is Code.INVALID_ARGUMENT
        assert len(details) < 500
    assert len(refusal(client.reload, f"{server.config.reload_below}/{'x' * 100_000}")[1]) < 500


def test_refusals_are_counted_and_logged_without_what_was_in_them(server, client, caplog):
    secret = "member 4711"
    before = refused(server, "invalid")
    with caplog.at_level("INFO", "brewjax.serve"):
        assert secret in refusal(client.score, pb.Member(task=secret, items=[pb.Item()]), request_id="mine")[1]
        eventually(lambda: refused(server, "invalid") == before + 1)
    (record,) = caplog.records
    assert (record.message, record.reason, record.method, record.request_id) == ("refused", "invalid", "Score", "mine")
    assert secret not in str(vars(record))


def test_an_unknown_method_and_noise_are_counted(strict, channel):
    unknown, invalid = refused(strict, "unknown method"), refused(strict, "invalid")
    assert refusal(channel.unary_unary("/brewjax.ranker.v1.Ranker/Nothing"), b"", metadata=BEARER)[0] is (
        Code.UNIMPLEMENTED
    )
    assert refusal(channel.unary_unary(SCORE), b"\xff", metadata=BEARER)[0] is Code.INVALID_ARGUMENT
    assert (refused(strict, "unknown method"), refused(strict, "invalid")) == (unknown + 1, invalid + 1)


def test_a_message_that_is_far_too_large_is_refused(strict, channel):
    size = 4 * strict.config.max_request_bytes + 1
    code, _ = refusal(channel.unary_unary(SCORE), bytes(size), metadata=BEARER)
    assert code in (Code.INVALID_ARGUMENT, Code.RESOURCE_EXHAUSTED)


def test_both_ports_are_open_at_every_loopback_address(strict):
    for host in LOOPBACK:
        address = f"[{host}]" if ":" in host else host
        with Client(f"{address}:{strict.port}", TOKEN) as client:
            assert client.score(QUESTION).scores
        assert httpx.get(f"http://{address}:{strict.http_port}/readyz").status_code == 200
