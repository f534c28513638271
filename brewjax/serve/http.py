"""The HTTP API: SGLang's scoring endpoint, probes, metrics, and their documentation at /docs."""

from __future__ import annotations

import time
from typing import Annotated, Any

import pydantic
import starlette.exceptions
from fastapi import FastAPI, HTTPException, Request, Response
from fastapi.responses import HTMLResponse, JSONResponse, PlainTextResponse
from prometheus_client import CONTENT_TYPE_LATEST, generate_latest

from brewjax.serve import ranker_pb2 as pb
from brewjax.serve.admission import Admission, error_response
from brewjax.serve.client import raw
from brewjax.serve.credentials import Credentials
from brewjax.serve.http_requests import parse_body, refusing, until_disconnect
from brewjax.serve.http_retrieval import add_retrieval
from brewjax.serve.openapi import DESCRIPTION, describe, render_page
from brewjax.serve.refusals import Refusals
from brewjax.serve.retrieval import Retrieval
from brewjax.serve.service import Service

OPEN_PATHS = ("/livez", "/readyz", "/startupz", "/health", "/docs", "/openapi.json")

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


def make_app(
    service: Service, credentials: Credentials, refusals: Refusals, retrieval: Retrieval | None = None
) -> FastAPI:
    """The application. All paths but `OPEN_PATHS` need the callers' token, if the server has one."""
    app = FastAPI(title="brewjax", description=DESCRIPTION, docs_url=None, redoc_url=None, redirect_slashes=False)
    app.add_middleware(Admission, service=service, credentials=credentials, refusals=refusals, open_paths=OPEN_PATHS)

    @app.exception_handler(starlette.exceptions.HTTPException)
    async def format_error(request: Request, error: starlette.exceptions.HTTPException) -> JSONResponse:
        return error_response(error.status_code, error.detail, dict(error.headers or {}))

    @app.post("/v1/score")
    async def score(request: Request, response: Response) -> ScoreResponse:
        """Scores items behind a query, in one pass if they fit."""
        with refusing(request, FIELDS):
            rpc_request = await parse_body(request, lambda body: to_rpc(ScoreRequest.model_validate_json(body)))
            rpc_request.request_id = request.headers.get("x-request-id", "")
            answer = await until_disconnect(request, service.score(rpc_request))
        response.headers["x-request-id"] = answer.request_id
        num_tokens = answer.usage.prefix_tokens + answer.usage.item_tokens
        return ScoreResponse(
            scores=[list(item.probabilities) for item in sorted(answer.scores, key=lambda item: item.index)],
            model=answer.model,
            usage=Usage(prompt_tokens=num_tokens, cached_tokens=answer.usage.cached_tokens, total_tokens=num_tokens),
            created=int(time.time()),
        )

    if retrieval:
        add_retrieval(app, retrieval, credentials)

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
