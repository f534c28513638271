"""The HTTP API: SGLang's scoring endpoint, probes, metrics, and their documentation at /docs."""

from __future__ import annotations

import time
from collections.abc import Callable, Coroutine
from typing import Annotated, Any, Literal, Self

import numpy as np
import pydantic
import starlette.exceptions
from fastapi import FastAPI, HTTPException, Request, Response
from fastapi.responses import HTMLResponse, JSONResponse, PlainTextResponse
from prometheus_client import CONTENT_TYPE_LATEST, generate_latest

from brewjax.serve import ranker_pb2 as pb
from brewjax.serve.admission import Admission, error_response
from brewjax.serve.client import raw
from brewjax.serve.credentials import Credentials
from brewjax.serve.encoding import MAX_LABELS
from brewjax.serve.http_messages import add_call
from brewjax.serve.http_requests import parse_body, refusing, until_disconnect
from brewjax.serve.http_rerank import add_rerank
from brewjax.serve.http_retrieval import add_retrieval
from brewjax.serve.openapi import DESCRIPTION, describe, render_page
from brewjax.serve.refusals import Refusals
from brewjax.serve.retrieval import Retrieval
from brewjax.serve.service import Service

OPEN_PATHS = ("/livez", "/readyz", "/startupz", "/health", "/docs", "/openapi.json")

FIELDS = {  # names of fields in gRPC's errors, and their names here
    r"^raw\.items": "items",
    r"^raw\.joint": "joint",
    r"^raw\.label(s|_tokens)": "label_token_ids",
    r"^raw(\.prefix)?:": "query:",
}

CHANGES = {
    "/v1/upsert_items": pb.UpsertItemsRequest,
    "/v1/upsert_members": pb.UpsertMembersRequest,
    "/v1/record_events": pb.RecordEventsRequest,
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
        description="Texts, or token ids, of the items. An empty one is scored right after the query."
    )
    label_token_ids: TokenIds = pydantic.Field(
        min_length=1,
        max_length=MAX_LABELS,
        description="The tokens whose probabilities are returned; a repeated one is returned as often.",
    )
    apply_softmax: bool = pydantic.Field(False, description="Normalize over the labels; otherwise over the vocabulary.")
    temperature: float = pydantic.Field(
        1.0, gt=0, allow_inf_nan=False, description="Divides the labels' logits; needs apply_softmax."
    )
    item_first: bool = pydantic.Field(False, description="Items are read before the query, so they share no prefix.")
    joint: bool = pydantic.Field(True, description="Query and item are one text to the tokenizer; false: each its own.")
    return_pooled_hidden_states: Literal[False] = pydantic.Field(False, description="Not available.")
    return_token_logprobs: Literal[False] = pydantic.Field(False, description="Not available.")
    model: str = pydantic.Field("", description="Ignored: one model is served.")
    rid: str | None = pydantic.Field(None, description="An id of the request, for the logs; or give x-request-id.")
    user: str | None = pydantic.Field(None, description="Ignored.")
    priority: int | None = pydantic.Field(None, description="Ignored: requests are served in order.")

    @pydantic.model_validator(mode="after")
    def _fit(self) -> Self:
        if self.temperature != 1 and not self.apply_softmax:
            raise ValueError("temperature needs apply_softmax")
        return self

    @property
    def _labels(self) -> list[int]:
        return list(dict.fromkeys(self.label_token_ids))  # each once

    def to_rpc(self, delimiter: int | None = None) -> pb.ScoreRequest:
        """The same request for gRPC; with a `delimiter`, a token id, between the query and each item.

        Raises:
          HTTPException: item_first would join texts with tokens.
        """
        items: list[Any] = [self.items] if isinstance(self.items, str) else list(self.items)
        prefix: str | list[int] = self.query
        if self.item_first:
            if any(isinstance(item, str) != isinstance(prefix, str) for item in items):
                raise HTTPException(400, "items: with item_first, give texts with a text, tokens with tokens")
            items, prefix = [item + prefix for item in items], prefix[:0]
        over = pb.ScoreRequest.LABELS if self.apply_softmax else pb.ScoreRequest.VOCABULARY
        between = [] if delimiter is None else [[delimiter]]
        joint = self.joint and not between and all(isinstance(text, str) for text in (prefix, *items))
        return pb.ScoreRequest(raw=raw(prefix, items, self._labels, between, joint), normalize_over=over)

    def scores(self, response: pb.ScoreResponse) -> list[list[float]]:
        """Probabilities [items, labels], in the order of the request, from the response to `to_rpc`."""
        by_item = sorted(response.scores, key=lambda score: score.index)
        probabilities = np.array([score.probabilities for score in by_item], np.float64)
        if self.apply_softmax:
            with np.errstate(divide="ignore"):
                powers = np.log(probabilities) / self.temperature
            powers = np.exp(powers - powers.max(axis=1, keepdims=True))
            probabilities = powers / powers.sum(axis=1, keepdims=True)
        column = {label: index for index, label in enumerate(self._labels)}
        return probabilities[:, [column[label] for label in self.label_token_ids]].tolist()


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
    service: Service,
    credentials: Credentials,
    refusals: Refusals,
    reload: Callable[[pb.ReloadRequest], Coroutine[Any, Any, pb.ReloadResponse]],
    retrieval: Callable[[], Retrieval] | None = None,
) -> FastAPI:
    """The application. All paths but `OPEN_PATHS` need the callers' token, if the server has one.

    Args:
      reload: serves what is in other folders.
      retrieval: gives the encoder and the index that are served, if the server has them.
    """
    started_at = int(time.time())
    app = FastAPI(title="brewjax", description=DESCRIPTION, docs_url=None, redoc_url=None, redirect_slashes=False)
    app.add_middleware(Admission, service=service, credentials=credentials, refusals=refusals, open_paths=OPEN_PATHS)

    @app.exception_handler(starlette.exceptions.HTTPException)
    async def format_error(request: Request, error: starlette.exceptions.HTTPException) -> JSONResponse:
        return error_response(error.status_code, error.detail, dict(error.headers or {}))

    def parse_score(body: bytes) -> tuple[ScoreRequest, pb.ScoreRequest]:
        request = ScoreRequest.model_validate_json(body)
        return request, request.to_rpc(service.config.item_delimiter)

    @app.post("/v1/score")
    async def score(request: Request, response: Response) -> ScoreResponse:
        """Scores items behind a query, in one pass if they fit."""
        with refusing(request, FIELDS):
            body, rpc_request = await parse_body(request, parse_score)
            rpc_request.request_id = request.headers.get("x-request-id") or body.rid or ""
            answer = pb.ScoreResponse(request_id=rpc_request.request_id, model=service.model)
            if body.items != []:
                answer = await until_disconnect(request, service.score(rpc_request))
        response.headers["x-request-id"] = answer.request_id
        num_tokens = answer.usage.prefix_tokens + answer.usage.item_tokens
        return ScoreResponse(
            scores=body.scores(answer) if answer.scores else [],
            model=answer.model,
            usage=Usage(prompt_tokens=num_tokens, cached_tokens=answer.usage.cached_tokens, total_tokens=num_tokens),
            created=int(time.time()),
        )

    @app.get("/v1/models")
    async def models() -> dict[str, Any]:
        """What is served, in OpenAI's form: the ranker, and the encoder if there is one."""
        names = [service.model, *([retrieval().model] if retrieval else [])]
        served = [{"id": name, "object": "model", "created": started_at, "owned_by": "brewjax"} for name in names]
        return {"object": "list", "data": served}

    add_call(app, "/v1/rank", pb.ScoreRequest, service.score)
    if service.config.changes:
        for path, request_type in CHANGES.items():
            add_call(app, path, request_type, service.change, admin=credentials)
    add_call(app, "/v1/reload", pb.ReloadRequest, lambda message, _: reload(message), admin=credentials)
    if service.config.rerank:
        add_rerank(app, service, service.config.rerank)
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
