"""HTTP connections: limits of their number and of the time that callers take, and how they are closed."""

from __future__ import annotations

import asyncio
import contextlib
import errno
import socket
import time
from collections.abc import Callable, Iterator
from typing import Any, cast

import h11
import uvicorn
from uvicorn.protocols.http.h11_impl import H11Protocol

from brewjax.serve.config import ServeConfig
from brewjax.serve.refusals import Refusals
from brewjax.serve.telemetry import Metrics

LINGER = 2.0  # seconds for a caller to read the last response before its connection is aborted
BACKLOG = 512  # connections that the system queues until they are accepted
ACCEPTED_AT_ONCE = 16  # per turn of the event loop, so that connections that made room are closed in between
REQUEST_TIMEOUT = b"HTTP/1.1 408 Request Timeout\r\nconnection: close\r\ncontent-length: 0\r\n\r\n"
NO_SUCH_ADDRESS = (errno.EADDRNOTAVAIL, errno.EAFNOSUPPORT)  # on a machine without IPv6
WILDCARDS = ("", "0.0.0.0", "::")


def listen(host: str, port: int) -> list[socket.socket]:
    """Sockets that listen at every address of a host, as gRPC does.

    Port 0 takes a free port, the same at all addresses. Raises OSError for a host without addresses or a taken port.
    """
    if host in WILDCARDS:
        if socket.has_dualstack_ipv6():
            with contextlib.suppress(OSError):  # a machine without IPv6
                return [socket.create_server(("::", port), family=socket.AF_INET6, dualstack_ipv6=True)]
        return [socket.create_server(("0.0.0.0", port))]
    addresses = {(info[0], info[4][0]) for info in socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)}
    if host == "localhost":  # many machines resolve it to only one address
        addresses |= {(socket.AF_INET, "127.0.0.1"), (socket.AF_INET6, "::1")}
    sockets: list[socket.socket] = []
    refusals: list[OSError] = []
    for family, address in sorted(addresses):
        try:
            sockets.append(socket.create_server((cast(str, address), port), family=family))
            port = port or sockets[0].getsockname()[1]
        except OSError as error:
            refusals.append(error)
    if not sockets or any(error.errno not in NO_SUCH_ADDRESS for error in refusals):
        for listening in sockets:
            listening.close()
        raise refusals[0]
    return sockets


class HttpServer(uvicorn.Server):
    """uvicorn with limits on connections, and without its signal handlers.

    Args:
      app: the ASGI application.
      config: the limits.
      ssl_context: of TLS, or None.
      metrics: counts connections.
      refusals: counts and logs connections that are closed by a limit.
    """

    def __init__(self, app: Any, config: ServeConfig, ssl_context: Any, metrics: Metrics, refusals: Refusals):
        settings = uvicorn.Config(
            app,
            http=_Protocol,
            ws="none",
            log_config=None,
            access_log=False,
            lifespan="off",
            proxy_headers=False,
            server_header=False,
            timeout_keep_alive=cast(int, config.keep_alive_seconds),
        )
        super().__init__(settings)
        self.limits, self.refusals, self._metrics = config, refusals, metrics
        self._tls: dict[str, Any] = {}
        if ssl_context:
            self._tls = {"ssl": ssl_context, "ssl_handshake_timeout": config.header_seconds}
        self.servers = []
        self._open = 0
        self.handshaking: dict[int, _Connection] = {}  # accepted, without a protocol yet, by file descriptor

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        """Leaves signals to the process that embeds the server."""
        yield

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        """Starts to listen. uvicorn's own method allows a minute for a TLS handshake, uncounted."""
        loop = asyncio.get_running_loop()
        self._listening = [_Listening(listening.detach(), self) for listening in sockets or ()]
        for listening in self._listening:
            self.servers.append(
                await loop.create_server(self._protocol, sock=listening, backlog=ACCEPTED_AT_ONCE, **self._tls)
            )
        self.started = True

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        """Serves connections that the system has queued, accepts no more, and waits for requests in progress."""
        loop = asyncio.get_running_loop()
        for listening in self._listening:
            with contextlib.suppress(OSError):
                while True:
                    connection, _ = listening.accept()
                    connection.setblocking(False)
                    await loop.connect_accepted_socket(self._protocol, connection, **self._tls)
        await super().shutdown()

    def admit(self, connection: socket.socket) -> _Connection | None:
        """Counts a new connection, for which the longest idle one may be closed. None if all are busy."""
        if self._open >= self.limits.connections:
            protocols = cast("set[_Protocol]", self.server_state.connections)
            closers: dict[float, Callable[[], None]] = {
                protocol.idle_since: protocol.cut for protocol in protocols if protocol.idle_since
            }
            closers |= {connection.accepted: connection.cut for connection in self.handshaking.values()}
            self.refusals.record("http", "connections")
            if not closers:
                return None
            closers[min(closers)]()
        self._count(1)
        admitted = _Connection(connection.detach(), self)
        self.handshaking[admitted.fileno()] = admitted
        return admitted

    def release(self) -> None:
        """Counts an admitted connection that is closed."""
        self._count(-1)

    def _count(self, change: int) -> None:
        self._open += change
        self._metrics.http_connections.set(self._open)

    def _protocol(self) -> _Protocol:
        return _Protocol(self)


class _Listening(socket.socket):
    """A listening socket that accepts no more connections than its server admits."""

    def __init__(self, fileno: int, server: HttpServer):
        super().__init__(fileno=fileno)
        # A response's header and body are two packets: the second would wait 40 ms for the first one's acknowledgement.
        self.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self._server = server

    def listen(self, backlog: int = BACKLOG) -> None:
        """Ignores `backlog`, which asyncio also takes as the number to accept at a time."""
        super().listen(BACKLOG)

    def accept(self) -> tuple[socket.socket, Any]:
        """The next admitted connection. Raises BlockingIOError if none is queued."""
        while True:
            connection, address = super().accept()
            if admitted := self._server.admit(connection):
                return admitted, address
            connection.close()


class _Connection(socket.socket):
    """A connection that counts from accept to close, TLS handshake included, of which the protocol sees nothing.

    Attributes:
      accepted: time of accept, as of `time.monotonic`.
    """

    def __init__(self, fileno: int, server: HttpServer):
        super().__init__(fileno=fileno)
        self._server: HttpServer | None = server
        self.accepted = time.monotonic()

    def cut(self) -> None:
        """Closes the connection before it has a protocol; asyncio's reader sees the end of the stream."""
        if self._server:
            self._server.handshaking.pop(self.fileno(), None)
        with contextlib.suppress(OSError):
            self.shutdown(socket.SHUT_RDWR)

    def close(self) -> None:
        if self._server:
            self._server.handshaking.pop(self.fileno(), None)
            self._server.release()
            self._server = None
        super().close()


class _Protocol(H11Protocol):
    """uvicorn's protocol, with time limits for a request's header, for its body, and for reading the response.

    Attributes:
      idle_since: when it last became idle, as of `time.monotonic`; None while a request is answered.
    """

    def __init__(self, server: HttpServer):
        super().__init__(server.config, server.server_state, {})
        self._http = server
        self.idle_since: float | None = time.monotonic()
        self._phase: tuple[str, object] | None = None
        self._timer: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        super().connection_made(cast(asyncio.Transport, transport))
        self._http.handshaking.pop(transport.get_extra_info("socket").fileno(), None)
        self._watch()

    def connection_lost(self, exc: Exception | None) -> None:
        self._set_timer(None, 0)
        self._unset_keepalive_if_required()
        self.idle_since = None
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        super().data_received(data)
        self._watch()

    def on_response_complete(self) -> None:
        super().on_response_complete()
        if self.transport.is_closing():
            self.loop.call_later(LINGER, self.transport.abort)
        self._watch()

    def pause_writing(self) -> None:
        super().pause_writing()
        self._set_timer(("slow reader", self.cycle), self._http.limits.body_seconds)

    def resume_writing(self) -> None:
        super().resume_writing()
        self._watch()

    def timeout_keep_alive_handler(self) -> None:
        super().timeout_keep_alive_handler()
        self.loop.call_later(LINGER, self.transport.abort)

    def send_400_response(self, msg: str) -> None:
        self._http.refusals.record("http", "invalid")
        super().send_400_response(msg)

    def shutdown(self) -> None:
        """The server stops. A new connection may still send one request, whose response closes it."""
        if self.idle_since is not None and (self.cycle is None or self.conn.trailing_data[0]):
            self._set_timer(("leaving", self.cycle), min(LINGER, self._http.limits.header_seconds))
        else:
            super().shutdown()

    def cut(self) -> None:
        """Aborts the connection."""
        self.idle_since = None
        self.transport.abort()

    def _watch(self) -> None:
        """Sets the time limit of what the caller sends next."""
        if self.transport.is_closing():
            self.idle_since = None
            return self._set_timer(None, 0)
        answering = self.cycle is not None and not self.cycle.response_complete
        self.idle_since = None if answering else self.idle_since or time.monotonic()
        limits, sending = self._http.limits, self.conn.their_state
        if sending is h11.SEND_BODY:  # the application's own limit is a little shorter
            self._set_timer(("slow body", self.cycle), limits.body_seconds + LINGER)
        elif sending is h11.IDLE and (self.cycle is None or self.conn.trailing_data[0]):
            self._set_timer(("slow head", self.cycle), limits.header_seconds)
        else:
            self._set_timer(None, 0)
            if not answering and self.timeout_keep_alive_task is None:
                self.timeout_keep_alive_task = self.loop.call_later(
                    limits.keep_alive_seconds, self.timeout_keep_alive_handler
                )

    def _set_timer(self, phase: tuple[str, object] | None, seconds: float) -> None:
        """Closes the connection in `seconds`, unless the phase changes; data of the same phase extends nothing."""
        if phase == self._phase:
            return
        if self._timer:
            self._timer.cancel()
        self._phase, self._timer = phase, None
        if phase:
            self._timer = self.loop.call_later(seconds, self._late, phase[0])

    def _late(self, reason: str) -> None:
        """The time limit of a phase has passed."""
        if reason == "slow head" and self.conn.trailing_data[0] and not self.transport.is_closing():
            self.transport.write(REQUEST_TIMEOUT)
        if reason != "leaving":
            self._http.refusals.record("http", reason)
            if self.transport.get_write_buffer_size():
                self.cut()
                return
            self.idle_since = None
        self.transport.close()
        self.loop.call_later(LINGER, self.transport.abort)
