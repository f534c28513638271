"""Refusals: reported to the caller in a short message, counted by reason, and logged without their contents."""

from __future__ import annotations

import asyncio
import logging

import grpc

from brewjax.serve.scoring_loop import ClosedError, QueueFullError
from brewjax.serve.store import StoreError
from brewjax.serve.telemetry import Metrics

log = logging.getLogger(__name__)
MAX_MESSAGE = 400  # characters of an error; gRPC sends no more than a few kilobytes
MAX_ID = 200  # characters of a request's id
INTERNAL = "internal error; the server's log has it"

REASONS = {  # by gRPC's code
    grpc.StatusCode.INVALID_ARGUMENT: "invalid",
    grpc.StatusCode.UNAUTHENTICATED: "unauthenticated",
    grpc.StatusCode.PERMISSION_DENIED: "forbidden",
    grpc.StatusCode.UNIMPLEMENTED: "unknown method",
    grpc.StatusCode.RESOURCE_EXHAUSTED: "full",
    grpc.StatusCode.DEADLINE_EXCEEDED: "deadline",
    grpc.StatusCode.CANCELLED: "cancelled",
    grpc.StatusCode.UNAVAILABLE: "unavailable",
}
HTTP_REASONS = {
    400: "invalid",
    401: "unauthenticated",
    404: "unknown method",
    405: "unknown method",
    408: "slow body",
    413: "too large",
    415: "invalid",
    429: "full",
    499: "cancelled",
    503: "unavailable",
    504: "deadline",
}


class ForbiddenError(RuntimeError):
    """An authenticated caller may not make this call."""


class Refusals:
    """Counts and logs refusals of either port."""

    def __init__(self, metrics: Metrics):
        self._counter = metrics.refused

    def record(self, port: str, reason: str, method: str = "", request_id: str = "") -> None:
        """Counts and logs one refusal. Only its id of a request is logged, because the rest may be personal."""
        self._counter.labels(port, reason).inc()
        fields = {"port": port, "reason": reason, "method": method, "request_id": request_id[:MAX_ID]}
        log.info("refused", extra={key: value for key, value in fields.items() if value})


def status_of(error: BaseException) -> grpc.StatusCode:
    """The gRPC code of an error."""
    kinds: dict[type[BaseException], grpc.StatusCode] = {
        QueueFullError: grpc.StatusCode.RESOURCE_EXHAUSTED,
        ClosedError: grpc.StatusCode.UNAVAILABLE,
        StoreError: grpc.StatusCode.UNAVAILABLE,
        TimeoutError: grpc.StatusCode.DEADLINE_EXCEEDED,
        ForbiddenError: grpc.StatusCode.PERMISSION_DENIED,
        asyncio.CancelledError: grpc.StatusCode.CANCELLED,
        ValueError: grpc.StatusCode.INVALID_ARGUMENT,
    }
    return next((code for kind, code in kinds.items() if isinstance(error, kind)), grpc.StatusCode.INTERNAL)


def truncate_message(error: BaseException | str) -> str:
    """The message of an error, shortened if it quotes a long request; internal errors reveal nothing."""
    if isinstance(error, BaseException) and status_of(error) is grpc.StatusCode.INTERNAL:
        return INTERNAL
    message = str(error)
    return message if len(message) <= MAX_MESSAGE else message[:MAX_MESSAGE] + " .."
