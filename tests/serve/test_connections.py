"""Callers of HTTP who take their time, or come in great numbers: over raw sockets."""

import json
import socket
import time

import pytest

from brewjax.serve.connections import listen
from tests.serve.serving import LOOPBACK, TOKEN, eventually

BODY = json.dumps({"query": [7], "items": [[8]], "label_token_ids": [5]}).encode()
SECONDS = 10  # far more than what the server allows


def head(length: int = len(BODY), token: str = TOKEN, **headers: str) -> bytes:
    lines = ["POST /v1/score HTTP/1.1", "host: x", "content-type: application/json", f"content-length: {length}"]
    lines += [f"authorization: Bearer {token}", *(f"{name}: {value}" for name, value in headers.items())]
    return "\r\n".join([*lines, "\r\n"]).encode()


@pytest.fixture
def connect(strict):
    """Makes connections, which are closed in the end."""
    made: list[socket.socket] = []

    def make() -> socket.socket:
        made.append(socket.create_connection(("127.0.0.1", strict.http_port), timeout=SECONDS))
        return made[-1]

    yield make
    for connection in made:
        connection.close()
    eventually(lambda: strict._http._open == 0)


def refused(strict, reason: str) -> float:
    return strict.service.metrics.refused.labels("http", reason)._value.get()


def drip(connection: socket.socket, data: bytes) -> bytes:
    """What is answered to a caller who sends a byte at a time; ends when the connection does."""
    connection.settimeout(0.05)
    answer = b""
    for position in range(100_000):
        try:
            connection.sendall(data[position : position + 1])
            part = connection.recv(10_000)
            answer += part
            if not part:
                return answer
        except TimeoutError:
            continue
        except OSError:
            return answer
    raise AssertionError("it took every byte")


def read_all(connection: socket.socket) -> bytes:
    answer = b""
    while part := connection.recv(10_000):
        answer += part
    return answer


@pytest.mark.parametrize(
    ("first", "rest", "status", "reason"),
    [
        (b"", b"GET /readyz HTTP/1.1\r\nx: " + b"x" * 1000, b"HTTP/1.1 408", "slow head"),
        (head(1000), b" " * 999, b"HTTP/1.1 408", "slow body"),
        (head() + BODY, b"GET /readyz HTTP/1.1\r\nx: " + b"x" * 1000, b"HTTP/1.1 200", "slow head"),
        (head(1000, token="wrong"), b" " * 999, b"HTTP/1.1 401", "unauthenticated"),
    ],
)
def test_who_sends_a_byte_at_a_time_is_cut_off(strict, connect, first, rest, status, reason):
    connection, before, start_time = connect(), refused(strict, reason), time.monotonic()
    connection.sendall(first)
    assert drip(connection, rest).startswith(status)
    assert time.monotonic() - start_time < SECONDS
    assert refused(strict, reason) == before + 1


def test_the_token_is_checked_before_the_body_is_sent(connect):
    connection = connect()
    connection.sendall(head(7_000_000, token="wrong", expect="100-continue"))
    assert connection.recv(1000).startswith(b"HTTP/1.1 401")


@pytest.mark.parametrize("declared", [9_000_000, 10**15])
def test_a_body_that_says_that_it_is_too_large_is_refused_at_once(connect, declared):
    connection = connect()
    connection.sendall(head(declared) + b"{")
    assert connection.recv(1000).startswith(b"HTTP/1.1 413")


def test_a_body_of_two_lengths_is_refused(connect):
    """A proxy in between may go by the other one, and take the rest for another caller's request."""
    connection = connect()
    connection.sendall(head(3, **{"transfer-encoding": "chunked"}) + b"0\r\n\r\n")
    assert read_all(connection).startswith(b"HTTP/1.1 400")


def test_connections_that_say_nothing_are_closed(strict, connect):
    """A new one after the time for a head, a used one after the time that it may be idle."""
    silent, used = connect(), connect()
    used.sendall(head() + BODY)
    answer = b""
    while b"created" not in answer:
        answer += used.recv(10_000)
    start_time = time.monotonic()
    assert read_all(silent) == b""
    assert read_all(used) == b""
    assert time.monotonic() - start_time >= strict.config.keep_alive_seconds - 0.1


def test_idle_connections_make_room_for_new_ones(strict, connect):
    """Hundreds are made, no more than `connections` are open, and a caller who asks is answered."""
    before, limit = refused(strict, "connections"), strict.config.connections
    for _ in range(200):
        connect()
    asking = connect()
    asking.sendall(head() + BODY)
    assert asking.recv(10_000).startswith(b"HTTP/1.1 200")
    eventually(lambda: strict._http._open <= limit)
    assert refused(strict, "connections") > before


def test_busy_connections_do_not(strict, connect):
    busy = [connect() for _ in range(strict.config.connections)]
    for connection in busy:
        connection.sendall(head(1000) + b"{")
    protocols = strict._http.server_state.connections
    eventually(lambda: [protocol.idle_since for protocol in protocols] == [None] * len(busy))
    assert connect().recv(1000) == b""
    assert {connection.recv(12) for connection in busy} == {b"HTTP/1.1 408"}


def test_both_loopback_addresses_answer(strict):
    for host in LOOPBACK:
        with socket.create_connection((host, strict.http_port), timeout=SECONDS) as connection:
            connection.sendall(b"GET /readyz HTTP/1.1\r\nhost: x\r\nconnection: close\r\n\r\n")
            assert read_all(connection).startswith(b"HTTP/1.1 200")


def test_every_address_is_of_both_kinds():
    for host in ("0.0.0.0", "::"):
        (listening,) = listen(host, 0)
        with listening:
            for address in LOOPBACK:
                socket.create_connection((address, listening.getsockname()[1]), timeout=SECONDS).close()
    with socket.create_server(("127.0.0.1", 0)) as listener, pytest.raises(OSError, match="in use"):
        listen("localhost", listener.getsockname()[1])
