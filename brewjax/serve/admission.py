"""The middleware that every HTTP request passes first: it checks the token, then reads the body within limits."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from http import HTTPStatus

from starlette.datastructures import Headers, MutableHeaders
from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from brewjax.serve.callers import UNNAMED, current_caller
from brewjax.serve.credentials import Credentials
from brewjax.serve.refusals import HTTP_REASONS, Refusals, truncate_message
from brewjax.serve.service import Service


class Refused(Exception):  # noqa: N818
    """A request that does not reach the application; `args` are status and message."""


def error_response(status: int, message: str, headers: dict[str, str] | None = None) -> JSONResponse:
    """A response in the common form of all errors, which is SGLang's, of bounded length."""
    phrase = "Client Closed Request" if status == 499 else HTTPStatus(status).phrase
    kind = f"{phrase.replace(' ', '').removesuffix('Error')}Error"
    return JSONResponse(
        {"object": "error", "message": truncate_message(message), "type": kind, "param": None, "code": status},
        status,
        headers,
    )


class Admission:
    """Checks the token before a byte of the body is read, reads the body, and counts refusals.

    HEAD is answered like GET; uvicorn omits the body. While the server stops, responses close their connection.

    Args:
      app: the application.
      service: whose limits apply.
      credentials: checks tokens.
      refusals: counts and logs.
      open_paths: paths that need no token.
    """

    def __init__(
        self,
        app: ASGIApp,
        service: Service,
        credentials: Credentials,
        refusals: Refusals,
        open_paths: Sequence[str] = (),
    ):
        self._app, self._service, self._credentials = app, service, credentials
        self._refusals, self._open_paths = refusals, frozenset(open_paths)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            return
        headers = Headers(scope=scope)

        async def answer(message: Message) -> None:
            if message["type"] == "http.response.start":
                if self._service.lame_duck:
                    MutableHeaders(scope=message)["connection"] = "close"
                path = getattr(scope.get("route"), "path", "")  # a known one: what a caller sent may hold secrets
                self._service.metrics.http_responses.labels(path, message["status"]).inc()
                if message["status"] >= 400:
                    reason = HTTP_REASONS.get(message["status"], "failed")
                    self._refusals.record("http", reason, path, headers.get("x-request-id", ""))
            await send(message)

        if scope["method"] == "HEAD":
            scope = {**scope, "method": "GET"}
        try:
            caller = self._credentials.find_caller(headers.get("authorization", ""))
            current_caller.set(caller or UNNAMED)
            if caller is None and scope["path"] not in self._open_paths:
                raise Refused(401, "a bearer token is needed: authorization: Bearer ..")
            if "content-length" in headers and "transfer-encoding" in headers:  # a proxy may believe the other one
                raise Refused(400, "the headers: give content-length or transfer-encoding, not both")
            body = await self._read(headers.get("content-length", ""), receive)
        except Refused as refused:
            status, message = refused.args
            extra = {"WWW-Authenticate": "Bearer"} if status == 401 else {}
            if status in (400, 408):
                extra["Connection"] = "close"
            await error_response(status, message, extra)(scope, receive, answer)
            return
        if body is None:  # the caller hung up
            self._refusals.record("http", "cancelled")
            return
        messages: list[Message] = [{"type": "http.request", "body": body, "more_body": False}]

        async def replay() -> Message:
            return messages.pop() if messages else await receive()

        await self._app(scope, replay, answer)

    async def _read(self, declared: str, receive: Receive) -> bytes | None:
        """The body; None if the caller hangs up. Raises Refused for one that is too large or too slow."""
        limit, seconds = self._service.config.max_request_bytes, self._service.config.body_seconds
        if declared.isdigit() and int(declared) > limit:
            raise Refused(413, f"the body: over {limit:,} bytes")
        chunks: list[bytes] = []
        size = 0
        try:
            async with asyncio.timeout(seconds):
                while True:
                    message = await receive()
                    if message["type"] == "http.disconnect":
                        return None
                    chunks.append(message.get("body", b""))
                    size += len(chunks[-1])
                    if size > limit:
                        raise Refused(413, f"the body: over {limit:,} bytes")
                    if not message.get("more_body", False):
                        return b"".join(chunks)
        except TimeoutError:
            raise Refused(408, f"the body did not arrive within {seconds:g} seconds") from None
