"""Texts ranked for a query over HTTP, as the clients of Cohere, Jina and vLLM ask for it."""

from __future__ import annotations

import time
from typing import Annotated, Any

import pydantic
from fastapi import FastAPI, HTTPException, Request

from brewjax.serve import ranker_pb2 as pb
from brewjax.serve.client import raw
from brewjax.serve.config import RerankConfig
from brewjax.serve.http_requests import parse_body, refusing, until_disconnect
from brewjax.serve.openapi import json_body
from brewjax.serve.service import Service

FIELDS = {r"^raw\.items": "documents", r"^raw(\.prefix)?:": "query:"}  # of gRPC's errors, and their names here
_FIRST = pydantic.Field(fail_fast=True)


class Document(pydantic.BaseModel):
    """A document as an object, as Cohere and Jina have it."""

    text: str


class RerankRequest(pydantic.BaseModel):
    """A request of Cohere's /v1/rerank and /v2/rerank, Jina's and vLLM's /v1/rerank."""

    model_config = pydantic.ConfigDict(extra="forbid")
    query: str
    documents: Annotated[list[str | Document], _FIRST]
    top_n: int | None = pydantic.Field(None, ge=0, description="Only so many of the best; 0 and null: all.")
    return_documents: bool | None = pydantic.Field(None, description="Documents in the answer; by default not in /v2.")
    max_tokens_per_doc: int | None = pydantic.Field(None, description="Ignored: the server's max_candidate_tokens.")
    priority: int | None = pydantic.Field(None, description="Ignored: requests are served in order.")
    user: str | None = pydantic.Field(None, description="Ignored.")
    model: str = pydantic.Field("", description="Ignored: one model is served.")

    @property
    def texts(self) -> list[str]:
        """The documents."""
        return [entry if isinstance(entry, str) else entry.text for entry in self.documents]


class PairsRequest(pydantic.BaseModel):
    """A request of vLLM's /score: one text against each of others, or pairs of as many."""

    model_config = pydantic.ConfigDict(extra="forbid")
    text_1: str | Annotated[list[str], _FIRST]
    text_2: str | Annotated[list[str], _FIRST]
    priority: int | None = pydantic.Field(None, description="Ignored: requests are served in order.")
    user: str | None = pydantic.Field(None, description="Ignored.")
    model: str = pydantic.Field("", description="Ignored: one model is served.")

    def groups(self) -> list[tuple[str, list[str]]]:
        """Each query with its documents.

        Raises:
          HTTPException: neither one against many, nor pairs.
        """
        queries = [self.text_1] if isinstance(self.text_1, str) else self.text_1
        documents = [self.text_2] if isinstance(self.text_2, str) else self.text_2
        if len(queries) == 1:
            return [(queries[0], documents)]
        if len(queries) != len(documents):
            counts = f"{len(queries)} texts, and text_2 has {len(documents)}"
            raise HTTPException(400, f"text_1: {counts}; give a single one, or as many")
        return [(query, [document]) for query, document in zip(queries, documents, strict=True)]


def add_rerank(app: FastAPI, service: Service, config: RerankConfig) -> None:
    """Adds the endpoints."""

    async def score(request: Request, query: str, documents: list[str]) -> pb.ScoreResponse:
        prefix = config.query.replace("{query}", query)
        items = [config.document.replace("{document}", document) for document in documents]
        rpc_request = pb.ScoreRequest(raw=raw(prefix, items, config.labels))
        rpc_request.request_id = request.headers.get("x-request-id", "")
        return await until_disconnect(request, service.score(rpc_request))

    @app.post("/rerank", openapi_extra=json_body(RerankRequest.model_json_schema()))
    @app.post("/v1/rerank", openapi_extra=json_body(RerankRequest.model_json_schema()))
    @app.post("/v2/rerank", openapi_extra=json_body(RerankRequest.model_json_schema()))
    async def rerank(request: Request) -> dict[str, Any]:
        """Documents by the probability that they answer the query, best first."""
        with refusing(request, FIELDS):
            body = await parse_body(request, RerankRequest.model_validate_json)
            texts = body.texts
            answer = await score(request, body.query, texts)
        show = body.return_documents if body.return_documents is not None else request.url.path != "/v2/rerank"
        results: list[dict[str, Any]] = [
            {"index": item.index, "relevance_score": item.probabilities[0]}
            | ({"document": {"text": texts[item.index]}} if show else {})
            for item in answer.scores[: body.top_n or None]
        ]
        tokens = _tokens(answer)
        meta = {"api_version": {"version": request.url.path[2:3] or "1"}, "billed_units": {"search_units": 1}}
        usage = {"prompt_tokens": tokens, "total_tokens": tokens}
        return {"id": answer.request_id, "model": answer.model, "results": results, "usage": usage, "meta": meta}

    @app.post("/score", openapi_extra=json_body(PairsRequest.model_json_schema()))
    async def score_pairs(request: Request) -> dict[str, Any]:
        """Pairs of texts by the probability that the second answers the first, in their order."""
        with refusing(request, {r"^documents": "text_2", **FIELDS}):
            body = await parse_body(request, PairsRequest.model_validate_json)
            groups = body.groups()
            if not 0 < len(groups) <= service.config.max_candidates:
                raise HTTPException(400, f"text_1: {len(groups)} texts; give 1 to {service.config.max_candidates:,}")
            answers = [await score(request, query, documents) for query, documents in groups]
        scores = [
            item.probabilities[0] for answer in answers for item in sorted(answer.scores, key=lambda item: item.index)
        ]
        data = [{"index": index, "object": "score", "score": score} for index, score in enumerate(scores)]
        tokens = sum(map(_tokens, answers))
        return {
            "id": answers[0].request_id,
            "object": "list",
            "created": int(time.time()),
            "model": answers[0].model,
            "data": data,
            "usage": {"prompt_tokens": tokens, "total_tokens": tokens},
        }


def _tokens(answer: pb.ScoreResponse) -> int:
    return answer.usage.prefix_tokens + answer.usage.item_tokens
