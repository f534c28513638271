"""The HTTP API: SGLang's scoring endpoint, probes, metrics, and their documentation at /docs."""

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
PARSED_INLINE = 1 << 16  # bytes; larger bodies are parsed in a thread, not on the event loop
OPEN_PATHS = ("/livez", "/readyz", "/startupz", "/health", "/docs", "/openapi.json")

HTTP_STATUS = {
    grpc.StatusCode.INVALID_ARGUMENT: 400,
    grpc.StatusCode.RESOURCE_EXHAUSTED: 429,
    grpc.StatusCode.CANCELLED: 499,
    grpc.StatusCode.UNAVAILABLE: 503,
    grpc.StatusCode.DEADLINE_EXCEEDED: 504,
}

FIELDS = {  # names of fields in gRPC's errors, and their names here
    r"^raw\.items": "items",
    r"^raw\.label(s|_tokens)": "label_token_ids",
    r"^raw(\.prefix)?:": "query:",
}

TokenId = Annotated[int, pydantic.Field(ge=0, lt=2**32)]
_FIRST = pydantic.Field(fail_fast=True)  # a list of a million mistakes is reported as one
TokenIds = Annotated[list[TokenId], _FIRST]


class ScoreRequest(pydantic.BaseModel):
    """A request of SGLang's /v1/score."""

    model_config = pydantic.ConfigDict(extra="forbid", strict=True)
    query: str | TokenIds = pydantic.Field(
        "", description="The prefix that all items share, such as a member's history."
    )
    items: str | Annotated[list[str], _FIRST] | Annotated[list[TokenIds], _FIRST] = pydantic.Field(
        description="Texts, or token ids, of the items."
    )
    label_token_ids: TokenIds = pydantic.Field(description="The tokens whose probabilities are returned.")
    apply_softmax: bool = pydantic.Field(False, description="Normalize over the labels; otherwise over the vocabulary.")
    item_first: bool = pydantic.Field(False, description="Items are read before the query, so they share no prefix.")
    model: str = pydantic.Field("", description="Ignored: one model is served.")


class Usage(pydantic.BaseModel):
    """Tokens of the request."""

    prompt_tokens: int
    cached_tokens: int
    total_tokens: int
    completion_tokens: int = 0


class ScoreResponse(pydantic.BaseModel):
    """A response of SGLang's /v1/score."""

    scores: list[list[float]] = pydantic.Field(description="Probabilities of the labels, in the order of the request.")
    model: str
    usage: Usage
    object: str = "scoring"
    created: int


def make_app(service: Service, credentials: Credentials, refusals: Refusals) -> FastAPI:
    """The application. All paths but `OPEN_PATHS` need the callers' token, if the server has one."""
    app = FastAPI(title="brewjax", description=DESCRIPTION, docs_url=None, redoc_url=None, redirect_slashes=False)
    app.add_middleware(Admission, service=service, credentials=credentials, refusals=refusals, open_paths=OPEN_PATHS)

    @app.exception_handler(starlette.exceptions.HTTPException)
    async def format_error(request: Request, error: starlette.exceptions.HTTPException) -> JSONResponse:
        return error_response(error.status_code, error.detail, dict(error.headers or {}))

    @app.post("/v1/score")
    async def score(request: Request, response: Response) -> ScoreResponse:
        """Scores items behind a query, in one pass if they fit."""
        try:
            rpc_request = await _parse(request)
            rpc_request.request_id = request.headers.get("x-request-id", "")
            answer = await _until_disconnect(request, service.score(rpc_request))
        except HTTPException:
            raise
        except Exception as error:
            code = status_of(error)
            if code not in HTTP_STATUS:
                log.exception("request failed", extra={"request_id": request.headers.get("x-request-id", "")})
            retry = {"Retry-After": str(round(error.retry_after + 0.5))} if isinstance(error, QueueFullError) else None
            message = truncate_message(error)
            for rpc_field, field in FIELDS.items():
                message = re.sub(rpc_field, field, message)
            raise HTTPException(HTTP_STATUS.get(code, 500), message, retry) from None
        response.headers["x-request-id"] = answer.request_id
        num_tokens = answer.usage.prefix_tokens + answer.usage.item_tokens
        return ScoreResponse(
            scores=[list(item.probabilities) for item in sorted(answer.scores, key=lambda item: item.index)],
            model=answer.model,
            usage=Usage(prompt_tokens=num_tokens, cached_tokens=answer.usage.cached_tokens, total_tokens=num_tokens),
            created=int(time.time()),
        )

    @app.get("/livez", response_class=PlainTextResponse)
    async def live() -> Response:
        """Liveness: 503 if the process has to be restarted, because its scoring thread has ended."""
        return PlainTextResponse("", 200 if service.live else 503)

    @app.get("/readyz", response_class=PlainTextResponse)
    @app.get("/health", response_class=PlainTextResponse)
    async def ready() -> Response:
        """Readiness: 503 if the server is about to stop, or its last pass failed."""
        return PlainTextResponse("", 200 if service.ready else 503)

    @app.get("/startupz", response_class=PlainTextResponse)
    async def started() -> Response:
        """Startup: always 200, because the server listens only once everything is compiled."""
        return PlainTextResponse("")

    @app.get("/metrics", response_class=PlainTextResponse)
    async def metrics() -> Response:
        """Metrics in Prometheus' text format."""
        return Response(generate_latest(service.metrics.registry), media_type=CONTENT_TYPE_LATEST)

    @app.get("/docs", include_in_schema=False)
    async def docs() -> HTMLResponse:
        return HTMLResponse(render_page(app.openapi()))

    describe(app, ScoreRequest, credentials.needs_token, OPEN_PATHS)
    return app


async def _parse(request: Request) -> pb.ScoreRequest:
    """The body as a gRPC request. Raises HTTPException, naming the field that is wrong."""
    kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if kind != "application/json" and not kind.endswith("+json"):
        raise HTTPException(415, "content-type: give application/json")
    if request.headers.get("content-encoding", "identity") != "identity":
        raise HTTPException(415, "content-encoding: leave it out")
    body = await request.body()

    def parse() -> pb.ScoreRequest:
        return to_rpc(ScoreRequest.model_validate_json(body))

    try:
        return parse() if len(body) <= PARSED_INLINE else await asyncio.to_thread(parse)
    except pydantic.ValidationError as error:
        first = error.errors(include_url=False, include_context=False, include_input=False)[0]
        field = "the body"
        if first["loc"]:
            field = str(first["loc"][0]) + "".join(f"[{part}]" for part in first["loc"][1:] if isinstance(part, int))
        raise HTTPException(400, f"{truncate_message(field)}: {first['msg']}") from None


def to_rpc(body: ScoreRequest) -> pb.ScoreRequest:
    """The same request for gRPC. Raises HTTPException if item_first would join texts with tokens."""
    items: list[Any] = [body.items] if isinstance(body.items, str) else list(body.items)
    prefix: str | list[int] = body.query
    if body.item_first:
        if any(isinstance(item, str) != isinstance(prefix, str) for item in items):
            raise HTTPException(400, "items: with item_first, give texts with a text, tokens with tokens")
        items, prefix = [item + prefix for item in items], prefix[:0]
    question = raw(prefix, items, body.label_token_ids)
    normalize_over = pb.ScoreRequest.LABELS if body.apply_softmax else pb.ScoreRequest.VOCABULARY
    return pb.ScoreRequest(raw=question, normalize_over=normalize_over)


async def _until_disconnect(request: Request, answer: Coroutine[Any, Any, pb.ScoreResponse]) -> pb.ScoreResponse:
    """The answer; cancelled when the caller hangs up, which neither FastAPI nor uvicorn does."""

    async def disconnected() -> None:
        while (await request.receive())["type"] != "http.disconnect":
            pass

    answering, hanging_up = asyncio.create_task(answer), asyncio.create_task(disconnected())
    try:
        await asyncio.wait((answering, hanging_up), return_when=asyncio.FIRST_COMPLETED)
        if not answering.done():
            raise HTTPException(499, "the caller hung up")
        return answering.result()
    finally:
        answering.cancel()
        hanging_up.cancel()
