"""The gRPC API: the Ranker service, and the interceptor that every call passes."""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from typing import Any

import grpc
from google.protobuf.message import DecodeError, Message
from grpc.aio import AbortError, ServerInterceptor, ServicerContext

from brewjax.serve import ranker_pb2 as pb
from brewjax.serve import ranker_pb2_grpc, retriever_pb2, retriever_pb2_grpc
from brewjax.serve.callers import UNNAMED, Caller, current_caller
from brewjax.serve.config import ServeConfig
from brewjax.serve.credentials import Credentials
from brewjax.serve.refusals import REASONS, Refusals, status_of, truncate_message
from brewjax.serve.retrieval import Retrieval
from brewjax.serve.scoring_loop import ClosedError, QueueFullError
from brewjax.serve.service import Service
from brewjax.serve.telemetry import Metrics

log = logging.getLogger(__name__)
Code = grpc.StatusCode
RANKER = pb.DESCRIPTOR.services_by_name["Ranker"].full_name
RETRIEVER = retriever_pb2.DESCRIPTOR.services_by_name["Retriever"].full_name
# Methods that change what is served, and need the admin token.
ADMIN = (
    *(f"/{RANKER}/{name}" for name in ("Reload", "UpsertItems", "UpsertMembers", "RecordEvents")),
    *(f"/{RETRIEVER}/{name}" for name in ("Upsert", "Delete")),
)
OPEN = "/grpc.health.v1.Health/"  # prefix of methods that need no token
CODES = {code.value[0]: code for code in Code}
MIN_PING_MS = 500  # callers may ping this often
Reload = Callable[[pb.ReloadRequest], Awaitable[pb.ReloadResponse]]


def channel_options(config: ServeConfig) -> list[tuple[str, int]]:
    """Limits that gRPC itself enforces."""
    return [
        # Up to four times the limit the service refuses a message with a clear error; beyond that gRPC does.
        ("grpc.max_receive_message_length", 4 * config.max_request_bytes),
        ("grpc.max_concurrent_streams", 2 * config.max_concurrent_requests),
        ("grpc.max_allowed_incoming_connections", config.connections),
        ("grpc.server_handshake_timeout_ms", int(1000 * config.header_seconds)),
        # Go, Envoy and mesh sidecars ping to keep a connection open, with and without calls on it. By default gRPC
        # ends every call of a caller that pings more than once in five minutes ("Too many pings").
        ("grpc.keepalive_permit_without_calls", 1),
        ("grpc.http2.min_ping_interval_without_data_ms", MIN_PING_MS),
        ("grpc.max_connection_idle_ms", int(1000 * config.keep_alive_seconds)),
        # The server pings too, to notice callers that vanished without closing their connection.
        ("grpc.keepalive_time_ms", 60_000),
        ("grpc.so_reuseport", 0),
    ]


class Ranker(ranker_pb2_grpc.RankerServicer):
    """The Ranker service of ranker.proto, on top of a `Service`.

    Args:
      service: scores.
      reload: serves what is in other folders.
    """

    def __init__(self, service: Service, reload: Reload):
        self._service, self._reload = service, reload

    async def Score(self, request: pb.ScoreRequest, context: ServicerContext) -> pb.ScoreResponse:  # noqa: N802
        return await self._service.score(request, context.time_remaining())

    async def ScoreStream(self, request: pb.ScoreRequest, context: ServicerContext) -> None:  # noqa: N802
        await self._service.stream(request, context.write, context.time_remaining())

    async def Describe(self, request: pb.DescribeRequest, context: ServicerContext) -> pb.DescribeResponse:  # noqa: N802
        return self._service.describe()

    async def Reload(self, request: pb.ReloadRequest, context: ServicerContext) -> pb.ReloadResponse:  # noqa: N802
        return await self._reload(request)

    async def UpsertItems(self, request: Any, context: ServicerContext) -> pb.ChangeResponse:  # noqa: N802
        return await self._service.change(request, context.time_remaining())

    UpsertMembers = RecordEvents = UpsertItems


class Retriever(retriever_pb2_grpc.RetrieverServicer):
    """The Retriever service of retriever.proto.

    Args:
      retrieval: gives the encoder and the index that are served, to every request and to every message of a stream.
    """

    def __init__(self, retrieval: Callable[[], Retrieval]):
        self._retrieval = retrieval

    async def Embed(self, request: Any, context: ServicerContext) -> retriever_pb2.EmbedResponse:  # noqa: N802
        return await self._retrieval().embed(request)

    async def Retrieve(self, request: Any, context: ServicerContext) -> retriever_pb2.RetrieveResponse:  # noqa: N802
        return await self._retrieval().retrieve(request)

    async def RetrieveAndScore(  # noqa: N802
        self, request: Any, context: ServicerContext
    ) -> retriever_pb2.RetrieveAndScoreResponse:
        return await self._retrieval().retrieve_and_score(request, context.time_remaining())

    async def Upsert(self, requests: Any, context: ServicerContext) -> AsyncIterator[Any]:  # noqa: N802
        async for request in requests:
            yield await self._retrieval().upsert(request)

    async def Delete(self, requests: Any, context: ServicerContext) -> AsyncIterator[Any]:  # noqa: N802
        async for request in requests:
            yield await self._retrieval().delete(request)


class Door(ServerInterceptor):
    """Checks the token of every call, reads its message within a time limit, turns errors into codes, counts refusals.

    By default gRPC reads the message before it calls a handler, for as long as the caller takes to send it, and answers
    UNKNOWN, with a traceback in the log, to one that it cannot parse. So every handler is registered as one of a stream
    of messages, and its messages are read here, after the token is checked.

    Attributes:
      closing: ends streams of requests, between two messages, when it is set.
    """

    def __init__(self, credentials: Credentials, config: ServeConfig, metrics: Metrics, refusals: Refusals):
        self._credentials, self._config, self._refusals = credentials, config, refusals
        self._gauge = metrics.grpc_calls
        self.closing = asyncio.Event()
        self._calls = {True: 0, False: 0}  # calls in progress, by whether their method needs no token

    async def intercept_service(
        self,
        continuation: Callable[[grpc.HandlerCallDetails], Awaitable[grpc.RpcMethodHandler]],
        details: grpc.HandlerCallDetails,
    ) -> grpc.RpcMethodHandler:
        method = details.method
        authorization = str(dict(details.invocation_metadata or ()).get("authorization", ""))
        caller = self._credentials.find_caller(authorization)
        current_caller.set(caller or UNNAMED)  # gRPC runs interceptors and handler of a call in one task
        if refusal := self._refusal(method, authorization, caller):

            async def refuse(messages: Any, context: ServicerContext) -> None:
                self._refusals.record("grpc", REASONS[refusal[0]])
                await context.abort(*refusal)

            return grpc.stream_unary_rpc_method_handler(refuse)
        handler: Any = await continuation(details)
        if handler is None:
            self._refusals.record("grpc", REASONS[Code.UNIMPLEMENTED])
            return None

        async def answer(messages: Any, context: ServicerContext) -> Any:
            with self._calling(method):
                async with self._refusing(method, context) as fields:
                    return await handler.unary_unary(await self._read(handler, messages, fields), context)

        async def answer_stream(messages: Any, context: ServicerContext) -> AsyncIterator[Any]:
            with self._calling(method):
                async with self._refusing(method, context) as fields:
                    responses = handler.unary_stream(await self._read(handler, messages, fields), context)
                    if not hasattr(responses, "__aiter__"):
                        await responses  # the handler writes its responses itself
                        return
                    async for response in responses:
                        yield response

        async def answer_all(messages: Any, context: ServicerContext) -> AsyncIterator[Any]:
            with self._calling(method):
                async with self._refusing(method, context) as fields:
                    async for response in handler.stream_stream(self._read_all(handler, messages, fields), context):
                        yield response

        if handler.request_streaming:
            return grpc.stream_stream_rpc_method_handler(answer_all, None, handler.response_serializer)
        if handler.response_streaming:
            return grpc.stream_stream_rpc_method_handler(answer_stream, None, handler.response_serializer)
        return grpc.stream_unary_rpc_method_handler(answer, None, handler.response_serializer)

    def _refusal(self, method: str, authorization: str, caller: Caller | None) -> tuple[grpc.StatusCode, str] | None:
        """Code and message for a call that is refused before its message is read, or None."""
        is_open = method.startswith(OPEN)
        if caller is None and not is_open:
            return Code.UNAUTHENTICATED, "a bearer token is needed: authorization: Bearer .."
        if method in ADMIN and not self._credentials.may_reload(authorization):
            name = method.rpartition("/")[2]
            return Code.PERMISSION_DENIED, f"{name} needs a token of its own, that of the server's admin_token_file"
        # Every connection may watch health.
        limit = self._config.connections if is_open else 2 * self._config.max_concurrent_requests
        if self._calls[is_open] >= limit:
            return Code.RESOURCE_EXHAUSTED, f"{self._calls[is_open]} calls are answered at a time; try again later"
        return None

    @contextlib.contextmanager
    def _calling(self, method: str) -> Iterator[None]:
        is_open = method.startswith(OPEN)
        self._calls[is_open] += 1
        self._gauge.set(sum(self._calls.values()))
        try:
            yield
        finally:
            self._calls[is_open] -= 1
            self._gauge.set(sum(self._calls.values()))

    async def _read(self, handler: Any, messages: AsyncIterator[bytes], fields: dict[str, str]) -> Message:
        """The single message of a call; its request_id is added to `fields`, those of a log line.

        Raises TimeoutError for a message that is late, and ValueError for one that cannot be parsed.
        """
        try:
            async with asyncio.timeout(self._config.body_seconds):
                message = await anext(aiter(messages))
        except StopAsyncIteration:
            raise ValueError("the request: no message, or one that is too large") from None
        except TimeoutError:
            raise TimeoutError(f"the request did not arrive within {self._config.body_seconds:g} seconds") from None
        return _parse(handler, message, fields)

    async def _read_all(
        self, handler: Any, messages: AsyncIterator[bytes], fields: dict[str, str]
    ) -> AsyncIterator[Message]:
        """The messages of a call, each read when the handler wants it, so that a caller who is too fast waits.

        Raises ValueError for one that cannot be parsed, and ClosedError when the server stops.
        """
        iterator, closing = aiter(messages), asyncio.create_task(self.closing.wait())
        reading: asyncio.Future[bytes | None] | None = None
        try:
            while True:
                reading = asyncio.ensure_future(anext(iterator, None))
                await asyncio.wait((reading, closing), return_when=asyncio.FIRST_COMPLETED)
                if not reading.done():
                    raise ClosedError
                if (message := reading.result()) is None:
                    return
                yield _parse(handler, message, fields)
        finally:
            closing.cancel()
            if reading:
                reading.cancel()

    @contextlib.asynccontextmanager
    async def _refusing(self, method: str, context: ServicerContext) -> AsyncIterator[dict[str, str]]:
        """Turns errors into codes. QueueFullError comes with the pushback time that gRPC's own retries obey.

        Yields the fields of the log line, for the caller to fill.
        """
        is_open, fields = method.startswith(OPEN), {"method": method.rpartition("/")[2]}
        try:
            yield fields
        except AbortError:
            self._refusals.record("grpc", REASONS.get(CODES[int(context.code())], "failed"), **fields)
            raise
        except (asyncio.CancelledError, GeneratorExit):
            if not is_open:  # a health watch normally ends so
                self._refusals.record("grpc", "cancelled", **fields)
            raise
        except Exception as error:
            code = status_of(error)
            if code is Code.INTERNAL:
                log.exception("request failed", extra=fields)
            self._refusals.record("grpc", REASONS.get(code, "failed"), **fields)
            trailing: tuple[tuple[str, str], ...] = ()
            if isinstance(error, QueueFullError):
                trailing = (("grpc-retry-pushback-ms", str(int(error.retry_after * 1000))),)
            await context.abort(code, truncate_message(error), trailing)


def _parse(handler: Any, message: bytes, fields: dict[str, str]) -> Message:
    """A message; its request_id is put into the `fields` of a log line. Raises ValueError where it is none."""
    try:
        request = handler.request_deserializer(message)
    except DecodeError as error:
        raise ValueError(f"the request: {error}") from None
    fields["request_id"] = getattr(request, "request_id", "")
    return request
