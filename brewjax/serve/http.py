"""The HTTP face: SGLang's scoring API, health, metrics, and an OpenAPI page at /docs."""

from __future__ import annotations

import asyncio
import hmac
import re
import time
from collections.abc import Coroutine
from typing import Annotated, Any

import grpc
import pydantic
import starlette.exceptions
from fastapi import Depends, FastAPI, HTTPException, Request, Response
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse, PlainTextResponse
from prometheus_client import CONTENT_TYPE_LATEST, generate_latest
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from brewjax.serve import ranker_pb2 as pb
from brewjax.serve.client import raw
from brewjax.serve.service import Service, shortened, status_of
from brewjax.serve.worker import QueueFullError

TokenId = Annotated[int, pydantic.Field(ge=0, lt=2**32)]

HTTP_STATUS = {
    grpc.StatusCode.INVALID_ARGUMENT: 400,
    grpc.StatusCode.RESOURCE_EXHAUSTED: 429,
    grpc.StatusCode.UNAVAILABLE: 503,
    grpc.StatusCode.DEADLINE_EXCEEDED: 504,
}


FIELDS = {  # of errors that name them as gRPC does
    r"^raw\.items": "items",
    r"^raw\.label(s|_tokens)": "label_token_ids",
    r"^raw(\.prefix)?:": "query:",
}


class ScoreRequest(pydantic.BaseModel):
    """As SGLang's /v1/score takes it."""

    model_config = pydantic.ConfigDict(extra="forbid")
    query: str | list[TokenId] = pydantic.Field("", description="What all items share: a member's history, say.")
    items: str | list[str] | list[list[TokenId]] = pydantic.Field(description="Texts, or token ids of each.")
    label_token_ids: list[TokenId] = pydantic.Field(description="The tokens whose probabilities are asked for.")
    apply_softmax: bool = pydantic.Field(False, description="Among the labels; otherwise among all words of the model.")
    item_first: bool = pydantic.Field(False, description="Items are read before the query: nothing is shared then.")
    model: str = pydantic.Field("", description="Ignored: one model is served.")

    @pydantic.field_validator("query", "items", mode="before")
    @classmethod
    def _of_characters(cls, given: Any) -> Any:
        for text in given if isinstance(given, list) else [given]:
            if isinstance(text, str):
                text.encode()  # JSON can say half of a surrogate pair, which is no character
        return given


class Usage(pydantic.BaseModel):
    prompt_tokens: int
    cached_tokens: int
    total_tokens: int
    completion_tokens: int = 0


class ScoreResponse(pydantic.BaseModel):
    scores: list[list[float]] = pydantic.Field(description="Probabilities of the labels, in the order of the request.")
    model: str
    usage: Usage
    object: str = "scoring"
    created: int


def make_app(service: Service, token: str | None = None) -> FastAPI:
    """The application; `token` is what callers must bear, /health apart."""
    app = FastAPI(title="brewjax", description="Ranks items for members: one history, many items, one pass.")
    app.add_middleware(BodyLimit, most_bytes=service.config.request_bytes)

    async def authorised(request: Request) -> None:  # were it not async, it would run in a thread
        given = request.headers.get("authorization", "")
        if token is not None and not hmac.compare_digest(given.encode(), f"Bearer {token}".encode()):
            raise HTTPException(401, "a bearer token is needed", {"WWW-Authenticate": "Bearer"})

    @app.exception_handler(RequestValidationError)
    async def name_the_field(request: Request, error: RequestValidationError) -> JSONResponse:
        first = error.errors()[0]
        place = "the body"
        if len(first["loc"]) > 1 and first["type"] != "json_invalid":
            place = first["loc"][1] + "".join(f"[{part}]" for part in first["loc"][2:] if isinstance(part, int))
        return _error(400, f"{place}: {first['msg']}")

    @app.exception_handler(starlette.exceptions.HTTPException)
    async def in_one_form(request: Request, error: starlette.exceptions.HTTPException) -> JSONResponse:
        return _error(error.status_code, error.detail, error.headers)

    @app.post("/v1/score", dependencies=[Depends(authorised)])
    async def score(body: ScoreRequest, request: Request, response: Response) -> ScoreResponse:
        """Scores items behind a query, in one pass where they fit."""
        try:
            asked = to_rpc(body)
            asked.request_id = request.headers.get("x-request-id", "")
            answer = await _unless_gone(request, service.score(asked))
        except HTTPException:
            raise
        except Exception as error:
            code = status_of(error)
            if code not in HTTP_STATUS:
                raise HTTPException(500, "internal error; the server's log has it") from None
            retry = {"Retry-After": str(round(error.retry_after + 0.5))} if isinstance(error, QueueFullError) else None
            message = shortened(error)
            for ours, theirs in FIELDS.items():
                message = re.sub(ours, theirs, message)
            raise HTTPException(HTTP_STATUS[code], message, retry) from None
        response.headers["x-request-id"] = answer.request_id
        read = answer.usage.prefix_tokens + answer.usage.item_tokens
        return ScoreResponse(
            scores=[list(item.probabilities) for item in sorted(answer.scores, key=lambda item: item.index)],
            model=answer.model,
            usage=Usage(prompt_tokens=read, cached_tokens=answer.usage.cached_tokens, total_tokens=read),
            created=int(time.time()),
        )

    @app.get("/health")
    async def health() -> Response:
        """200 when requests are answered; 503 when not: the server drains, or its last pass failed."""
        return PlainTextResponse("", 200 if service.ready else 503)

    @app.get("/metrics", dependencies=[Depends(authorised)])
    async def metrics() -> Response:
        """For Prometheus."""
        return Response(generate_latest(service.metrics.registry), media_type=CONTENT_TYPE_LATEST)

    return app


def to_rpc(body: ScoreRequest) -> pb.ScoreRequest:
    """The same request as gRPC has it. ValueError where items and query are not both texts or both tokens."""
    items: list[Any] = [body.items] if isinstance(body.items, str) else list(body.items)
    prefix: str | list[int] = body.query
    if body.item_first:
        if any(isinstance(item, str) != isinstance(prefix, str) for item in items):
            raise HTTPException(400, "items: with item_first, give texts with a text, tokens with tokens")
        items, prefix = [item + prefix for item in items], prefix[:0]
    asked = raw(prefix, items, body.label_token_ids)
    return pb.ScoreRequest(raw=asked, over_vocabulary=not body.apply_softmax)


async def _unless_gone(request: Request, answer: Coroutine[Any, Any, pb.ScoreResponse]) -> pb.ScoreResponse:
    """The answer; it is given up when the caller hangs up, which the stack leaves to us."""

    async def hangs_up() -> None:
        while (await request.receive())["type"] != "http.disconnect":
            pass

    answering, gone = asyncio.create_task(answer), asyncio.create_task(hangs_up())
    try:
        await asyncio.wait((answering, gone), return_when=asyncio.FIRST_COMPLETED)
        if not answering.done():
            raise HTTPException(499, "the caller is gone")
        return answering.result()
    finally:
        answering.cancel()
        gone.cancel()


def _error(status: int, message: str, headers: Any = None) -> JSONResponse:
    return JSONResponse({"object": "error", "message": message, "code": status}, status, headers)


class BodyLimit:
    """Refuses bodies of more bytes with 413, whatever length they declare."""

    def __init__(self, app: ASGIApp, most_bytes: int):
        self._app, self._most = app, most_bytes

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        read = 0

        async def counted() -> Message:
            nonlocal read
            message = await receive()
            read += len(message.get("body", b""))
            if read > self._most:
                raise HTTPException(413, f"the body: over {self._most:,} bytes")
            return message

        await self._app(scope, counted, send)
