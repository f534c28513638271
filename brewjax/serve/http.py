"""The HTTP face: SGLang's scoring API, probes, metrics, and a page about them at /docs."""

from __future__ import annotations

import asyncio
import logging
import re
import time
from collections.abc import Coroutine
from typing import Annotated, Any

import grpc
import pydantic
import starlette.exceptions
from fastapi import FastAPI, HTTPException, Request, Response
from fastapi.responses import HTMLResponse, JSONResponse, PlainTextResponse
from prometheus_client import CONTENT_TYPE_LATEST, generate_latest

from brewjax.serve import ranker_pb2 as pb
from brewjax.serve.admission import Admission, error_response
from brewjax.serve.client import raw
from brewjax.serve.credentials import Credentials
from brewjax.serve.openapi import DESCRIPTION, describe, render_page
from brewjax.serve.refusals import Refusals, status_of, truncate_message
from brewjax.serve.scoring_loop import QueueFullError
from brewjax.serve.service import Service

log = logging.getLogger(__name__)
PARSED_AT_ONCE = 1 << 16  # bytes of a body that the event loop parses itself
OPEN_PATHS = ("/livez", "/readyz", "/startupz", "/health", "/docs", "/openapi.json")

HTTP_STATUS = {
    grpc.StatusCode.INVALID_ARGUMENT: 400,
    grpc.StatusCode.RESOURCE_EXHAUSTED: 429,
    grpc.StatusCode.CANCELLED: 499,
    grpc.StatusCode.UNAVAILABLE: 503,
    grpc.StatusCode.DEADLINE_EXCEEDED: 504,
}

FIELDS = {  # of errors that name them as gRPC does
    r"^raw\.items": "items",
    r"^raw\.label(s|_tokens)": "label_token_ids",
    r"^raw(\.prefix)?:": "query:",
}

TokenId = Annotated[int, pydantic.Field(ge=0, lt=2**32)]
_FIRST = pydantic.Field(fail_fast=True)  # a list of a million mistakes is one mistake
TokenIds = Annotated[list[TokenId], _FIRST]


class ScoreRequest(pydantic.BaseModel):
    """As SGLang's /v1/score takes it."""

    model_config = pydantic.ConfigDict(extra="forbid", strict=True)
    query: str | TokenIds = pydantic.Field("", description="What all items share: a member's history, say.")
    items: str | Annotated[list[str], _FIRST] | Annotated[list[TokenIds], _FIRST] = pydantic.Field(
        description="Texts, or token ids of each."
    )
    label_token_ids: TokenIds = pydantic.Field(description="The tokens whose probabilities are asked for.")
    apply_softmax: bool = pydantic.Field(False, description="Among the labels; otherwise among all words of the model.")
    item_first: bool = pydantic.Field(False, description="Items are read before the query: nothing is shared then.")
    model: str = pydantic.Field("", description="Ignored: one model is served.")


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


def make_app(service: Service, credentials: Credentials, refusals: Refusals) -> FastAPI:
    """The application; all but `OPEN_PATHS` needs the callers' token, where there is one."""
    app = FastAPI(title="brewjax", description=DESCRIPTION, docs_url=None, redoc_url=None, redirect_slashes=False)
    app.add_middleware(Admission, service=service, credentials=credentials, refusals=refusals, open_paths=OPEN_PATHS)

    @app.exception_handler(starlette.exceptions.HTTPException)
    async def in_one_form(request: Request, error: starlette.exceptions.HTTPException) -> JSONResponse:
        return error_response(error.status_code, error.detail, dict(error.headers or {}))

    @app.post("/v1/score")
    async def score(request: Request, response: Response) -> ScoreResponse:
        """Scores items behind a query, in one pass where they fit."""
        try:
            asked = await _parse(request)
            asked.request_id = request.headers.get("x-request-id", "")
            answer = await _unless_gone(request, service.score(asked))
        except HTTPException:
            raise
        except Exception as error:
            code = status_of(error)
            if code not in HTTP_STATUS:
                log.exception("request failed", extra={"request_id": request.headers.get("x-request-id", "")})
            retry = {"Retry-After": str(round(error.retry_after + 0.5))} if isinstance(error, QueueFullError) else None
            message = truncate_message(error)
            for ours, theirs in FIELDS.items():
                message = re.sub(ours, theirs, message)
            raise HTTPException(HTTP_STATUS.get(code, 500), message, retry) from None
        response.headers["x-request-id"] = answer.request_id
        read = answer.usage.prefix_tokens + answer.usage.item_tokens
        return ScoreResponse(
            scores=[list(item.probabilities) for item in sorted(answer.scores, key=lambda item: item.index)],
            model=answer.model,
            usage=Usage(prompt_tokens=read, cached_tokens=answer.usage.cached_tokens, total_tokens=read),
            created=int(time.time()),
        )

    @app.get("/livez", response_class=PlainTextResponse)
    async def live() -> Response:
        """Whether the process is of use: 503 where it can only be restarted, for the thread that scores has ended."""
        return PlainTextResponse("", 200 if service.live else 503)

    @app.get("/readyz", response_class=PlainTextResponse)
    @app.get("/health", response_class=PlainTextResponse)
    async def ready() -> Response:
        """Whether callers should come: 503 where the server is about to stop, or its last pass failed."""
        return PlainTextResponse("", 200 if service.ready else 503)

    @app.get("/startupz", response_class=PlainTextResponse)
    async def started() -> Response:
        """200: the server listens only once everything is compiled."""
        return PlainTextResponse("")

    @app.get("/metrics", response_class=PlainTextResponse)
    async def metrics() -> Response:
        """For Prometheus."""
        return Response(generate_latest(service.metrics.registry), media_type=CONTENT_TYPE_LATEST)

    @app.get("/docs", include_in_schema=False)
    async def docs() -> HTMLResponse:
        return HTMLResponse(render_page(app.openapi()))

    describe(app, ScoreRequest, credentials.needs_token, OPEN_PATHS)
    return app


async def _parse(request: Request) -> pb.ScoreRequest:
    """A request as gRPC has it; HTTPException names the field that is wrong."""
    kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if kind != "application/json" and not kind.endswith("+json"):
        raise HTTPException(415, "content-type: give application/json")
    if request.headers.get("content-encoding", "identity") != "identity":
        raise HTTPException(415, "content-encoding: leave it out")
    body = await request.body()

    def parse() -> pb.ScoreRequest:
        return to_rpc(ScoreRequest.model_validate_json(body))

    try:
        return parse() if len(body) <= PARSED_AT_ONCE else await asyncio.to_thread(parse)
    except pydantic.ValidationError as error:
        first = error.errors(include_url=False, include_context=False, include_input=False)[0]
        field = "the body"
        if first["loc"]:
            field = str(first["loc"][0]) + "".join(f"[{part}]" for part in first["loc"][1:] if isinstance(part, int))
        raise HTTPException(400, f"{truncate_message(field)}: {first['msg']}") from None


def to_rpc(body: ScoreRequest) -> pb.ScoreRequest:
    """The same request as gRPC has it. HTTPException where items and query are not both texts or both tokens."""
    items: list[Any] = [body.items] if isinstance(body.items, str) else list(body.items)
    prefix: str | list[int] = body.query
    if body.item_first:
        if any(isinstance(item, str) != isinstance(prefix, str) for item in items):
            raise HTTPException(400, "items: with item_first, give texts with a text, tokens with tokens")
        items, prefix = [item + prefix for item in items], prefix[:0]
    asked = raw(prefix, items, body.label_token_ids)
    normalize_over = pb.ScoreRequest.LABELS if body.apply_softmax else pb.ScoreRequest.VOCABULARY
    return pb.ScoreRequest(raw=asked, normalize_over=normalize_over)


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
