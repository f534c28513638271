"""The gRPC face: Ranker, bearer tokens, and what a caller is told when something is wrong."""

from __future__ import annotations

import contextlib
import hmac
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any

import grpc
from google.protobuf.message import DecodeError, Message
from grpc.aio import ServerInterceptor, ServicerContext

from brewjax.serve import ranker_pb2 as pb
from brewjax.serve import ranker_pb2_grpc
from brewjax.serve.service import Service, shortened, status_of
from brewjax.serve.worker import QueueFullError

RANKER = pb.DESCRIPTOR.services_by_name["Ranker"].full_name
OPEN = "/grpc.health.v1.Health/"  # who may be asked without a token
Reload = Callable[[str], Awaitable[str]]


class Ranker(ranker_pb2_grpc.RankerServicer):
    """Answers for a `Service`.

    Args:
      reload: serves the checkpoint of a folder, and returns its name and version.
    """

    def __init__(self, service: Service, reload: Reload):
        self._service, self._reload = service, reload

    async def Score(self, request: pb.ScoreRequest, context: ServicerContext) -> pb.ScoreResponse:  # noqa: N802
        async with _told(context):
            return await self._service.score(request, context.time_remaining())
        raise AssertionError

    async def ScoreStream(self, request: pb.ScoreRequest, context: ServicerContext) -> None:  # noqa: N802
        async with _told(context):
            await self._service.stream(request, context.write, context.time_remaining())

    async def Describe(self, request: pb.DescribeRequest, context: ServicerContext) -> pb.DescribeResponse:  # noqa: N802
        return self._service.describe()

    async def Reload(self, request: pb.ReloadRequest, context: ServicerContext) -> pb.ReloadResponse:  # noqa: N802
        async with _told(context):
            return pb.ReloadResponse(model=await self._reload(request.folder))
        raise AssertionError


@contextlib.asynccontextmanager
async def _told(context: ServicerContext) -> AsyncIterator[None]:
    """Turns errors into codes; a full queue says when to come back, in the way that gRPC's own retries obey."""
    try:
        yield
    except Exception as error:
        code = status_of(error)
        trailing: tuple[tuple[str, str], ...] = ()
        if isinstance(error, QueueFullError):
            trailing = (("grpc-retry-pushback-ms", str(int(error.retry_after * 1000))),)
        message = "internal error; the server's log has it" if code is grpc.StatusCode.INTERNAL else shortened(error)
        await context.abort(code, message, trailing)


class Readable(ServerInterceptor):
    """Says INVALID_ARGUMENT of a message that cannot be read, where gRPC would say UNKNOWN and log a traceback."""

    async def intercept_service(
        self,
        continuation: Callable[[grpc.HandlerCallDetails], Awaitable[grpc.RpcMethodHandler]],
        details: grpc.HandlerCallDetails,
    ) -> grpc.RpcMethodHandler:
        handler: Any = await continuation(details)
        if not details.method.startswith(f"/{RANKER}/") or handler is None:
            return handler
        kind = "unary_stream" if handler.response_streaming else "unary_unary"

        def read(message: bytes) -> Message | DecodeError:
            try:
                return handler.request_deserializer(message)
            except DecodeError as error:
                return error

        async def answer(request: Message | DecodeError, context: ServicerContext) -> Any:
            if isinstance(request, DecodeError):
                await context.abort(grpc.StatusCode.INVALID_ARGUMENT, f"the request: {request}")
            return await getattr(handler, kind)(request, context)

        return handler._replace(request_deserializer=read, **{kind: answer})


class BearerToken(ServerInterceptor):
    """Refuses calls without the token, health checks apart."""

    def __init__(self, token: str):
        self._expected = f"Bearer {token}"

    async def intercept_service(
        self,
        continuation: Callable[[grpc.HandlerCallDetails], Awaitable[grpc.RpcMethodHandler]],
        details: grpc.HandlerCallDetails,
    ) -> grpc.RpcMethodHandler:
        given = str(dict(details.invocation_metadata or ()).get("authorization", ""))
        if details.method.startswith(OPEN) or hmac.compare_digest(given.encode(), self._expected.encode()):
            return await continuation(details)

        async def refuse(request: Any, context: ServicerContext) -> None:
            await context.abort(grpc.StatusCode.UNAUTHENTICATED, "a bearer token is needed: authorization: Bearer ..")

        return grpc.unary_unary_rpc_method_handler(refuse)
