"""gRPC's health service, whose watches end when the server drains."""

from __future__ import annotations

import asyncio

import grpc
from grpc.aio import ServicerContext
from grpc_health.v1 import health_pb2, health_pb2_grpc

SERVING, NOT_SERVING = health_pb2.HealthCheckResponse.SERVING, health_pb2.HealthCheckResponse.NOT_SERVING


class Health(health_pb2_grpc.HealthServicer):
    """Answers `Check`, and streams changes to `Watch`, for each name that `set` has given a state.

    grpc_health's own servicer leaves a `Watch` open for as long as its caller likes, and a server that stops waits for
    open calls: one watching balancer would make every stop last all of `drain_seconds`.
    """

    def __init__(self) -> None:
        self._states: dict[str, int] = {}
        self._draining = False
        self._changed = asyncio.Condition()

    async def Check(  # noqa: N802
        self, request: health_pb2.HealthCheckRequest, context: ServicerContext
    ) -> health_pb2.HealthCheckResponse:
        """The state of a name; NOT_FOUND for an unknown one."""
        if request.service not in self._states:
            await context.abort(grpc.StatusCode.NOT_FOUND, f"no service '{request.service}'")
        return health_pb2.HealthCheckResponse(status=self._states[request.service])

    async def Watch(self, request: health_pb2.HealthCheckRequest, context: ServicerContext) -> None:  # noqa: N802
        """The state of a name, again whenever it changes, until the caller leaves or the server drains."""
        sent = None
        while True:
            status = self._states.get(request.service, health_pb2.HealthCheckResponse.SERVICE_UNKNOWN)
            if status != sent:
                await context.write(health_pb2.HealthCheckResponse(status=status))
                sent = status
                continue  # the state may have changed while it was written
            if self._draining:
                return
            async with self._changed:
                await self._changed.wait()

    async def set(self, name: str, serving: bool) -> None:
        """Sets the state of a name; without effect once the server drains."""
        status = SERVING if serving else NOT_SERVING
        if self._draining or self._states.get(name) == status:
            return
        self._states[name] = status
        async with self._changed:
            self._changed.notify_all()

    async def drain(self) -> None:
        """Sets every state to NOT_SERVING for good, and ends the watches once they have sent it."""
        self._states = dict.fromkeys(self._states, NOT_SERVING)
        self._draining = True
        async with self._changed:
            self._changed.notify_all()
