"""Retrieval over HTTP: OpenAI's /v1/embeddings, and the messages of retriever.proto as JSON."""

from __future__ import annotations

import base64
from collections.abc import Callable
from typing import Annotated, Any, Literal

import numpy as np
import pydantic
from fastapi import FastAPI, Request, Response

from brewjax.serve import ranker_pb2
from brewjax.serve import retriever_pb2 as pb
from brewjax.serve.credentials import Credentials
from brewjax.serve.http_messages import add_call
from brewjax.serve.http_requests import parse_body, refusing, until_disconnect
from brewjax.serve.openapi import json_body
from brewjax.serve.retrieval import Retrieval

TokenIds = Annotated[list[Annotated[int, pydantic.Field(ge=0, lt=2**32)]], pydantic.Field(fail_fast=True)]
FIELDS = {r"^inputs\[(\d+)\]\.(text|tokens)": r"input[\1]"}


class EmbeddingsRequest(pydantic.BaseModel):
    """A request of OpenAI's /v1/embeddings."""

    model_config = pydantic.ConfigDict(extra="forbid", strict=True)
    input: str | Annotated[list[str], pydantic.Field(fail_fast=True)] | TokenIds | list[TokenIds] = pydantic.Field(
        description="Texts, or token ids."
    )
    dimensions: int | None = pydantic.Field(None, gt=0, description="Size of the vectors, one that training taught.")
    encoding_format: Literal["float", "base64"] = pydantic.Field("float", description="base64: of float32.")
    model: str = pydantic.Field("", description="Ignored: one encoder is served.")
    user: str = pydantic.Field("", description="Ignored.")

    def to_rpc(self) -> pb.EmbedRequest:
        """The same request for gRPC."""
        values: list[Any] = [self.input] if isinstance(self.input, str) else list(self.input)
        if values and isinstance(values[0], int):
            values = [values]
        inputs = [
            pb.Input(text=value) if isinstance(value, str) else pb.Input(tokens=ranker_pb2.Tokens(ids=value))
            for value in values
        ]
        return pb.EmbedRequest(inputs=inputs, dimensions=self.dimensions or 0)


def add_retrieval(app: FastAPI, retrieval: Callable[[], Retrieval], credentials: Credentials) -> None:
    """Adds the endpoints. Upsert and delete need the server's admin token.

    Args:
      retrieval: gives the encoder and the index that are served, to every request.
    """

    @app.post("/v1/embeddings", openapi_extra=json_body(EmbeddingsRequest.model_json_schema()))
    async def embeddings(request: Request, response: Response) -> dict[str, Any]:
        """Vectors of texts, in OpenAI's form."""
        with refusing(request, FIELDS):
            body = await parse_body(request, EmbeddingsRequest.model_validate_json)
            rpc_request = body.to_rpc()
            rpc_request.request_id = request.headers.get("x-request-id", "")
            answer = await until_disconnect(request, retrieval().embed(rpc_request))
        response.headers["x-request-id"] = answer.request_id
        data = [
            {"object": "embedding", "index": index, "embedding": _format(vector, body.encoding_format)}
            for index, vector in enumerate(answer.vectors)
        ]
        usage = {"prompt_tokens": answer.tokens, "total_tokens": answer.tokens}
        return {"object": "list", "data": data, "model": answer.model, "usage": usage}

    add_call(app, "/v1/embed", pb.EmbedRequest, lambda message, _: retrieval().embed(message))
    add_call(app, "/v1/retrieve", pb.RetrieveRequest, lambda message, _: retrieval().retrieve(message))
    add_call(
        app, "/v1/retrieve_and_score", pb.RetrieveAndScoreRequest, lambda *call: retrieval().retrieve_and_score(*call)
    )
    add_call(app, "/v1/upsert", pb.UpsertRequest, lambda message, _: retrieval().upsert(message), admin=credentials)
    add_call(app, "/v1/delete", pb.DeleteRequest, lambda message, _: retrieval().delete(message), admin=credentials)


def _format(vector: pb.Vector, encoding: str) -> list[float] | str:
    if encoding == "float":
        return list(vector.values)
    return base64.b64encode(np.array(vector.values, "<f4").tobytes()).decode()
