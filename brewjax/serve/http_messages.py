"""The messages of the .proto files over HTTP, as JSON: what gRPC can do, HTTP can."""

from __future__ import annotations

import re
from collections.abc import Callable, Coroutine
from typing import Any

from fastapi import FastAPI, HTTPException, Request
from google.protobuf.json_format import MessageToDict, Parse, ParseError
from google.protobuf.message import Message

from brewjax.serve.credentials import Credentials
from brewjax.serve.http_requests import parse_body, refusing, until_disconnect
from brewjax.serve.openapi import json_body, message_schema

TIMEOUT_UNITS = {"H": 3600, "M": 60, "S": 1, "m": 1e-3, "u": 1e-6, "n": 1e-9}
FORBIDDEN = "this needs the token of the server's admin_token_file"
Call = Callable[[Any, float | None], Coroutine[Any, Any, Message]]


def add_call(
    app: FastAPI, path: str, request_type: type[Message], call: Call, admin: Credentials | None = None
) -> None:
    """Adds an endpoint that reads a message as JSON, and answers with one.

    Args:
      request_type: of the message in the body.
      call: what gRPC calls, of the message and the seconds until the caller's deadline, None without one.
      admin: given where the caller needs the admin token.
    """
    descriptor = request_type.DESCRIPTOR
    summary = f"`{descriptor.name}` of {descriptor.file.name.rpartition('/')[2]}, as JSON."

    @app.post(
        path,
        name=path,
        description=f"{summary} A deadline is given as gRPC does: `grpc-timeout: 500m`.",
        openapi_extra=json_body(message_schema(descriptor)),
        responses={403: {"description": FORBIDDEN}} if admin else {},
    )
    async def answer(request: Request) -> dict[str, Any]:
        if admin and not admin.may_reload(request.headers.get("authorization", "")):
            raise HTTPException(403, f"{path}: {FORBIDDEN}")
        with refusing(request, {}):
            seconds = _deadline(request.headers.get("grpc-timeout"))
            message = await parse_body(request, lambda body: _parse(body, request_type))
            if "request_id" in message.DESCRIPTOR.fields_by_name and not message.request_id:
                message.request_id = request.headers.get("x-request-id", "")
            response = await until_disconnect(request, call(message, seconds))
            return MessageToDict(response, preserving_proto_field_name=True, always_print_fields_with_no_presence=True)


def _parse(body: bytes, request_type: type[Message]) -> Message:
    try:
        return Parse(body, request_type())
    except (ParseError, UnicodeDecodeError) as error:
        raise ValueError(f"the body: {error}") from None


def _deadline(header: str | None) -> float | None:
    """Seconds, of a `grpc-timeout` such as "500m" (gRPC over HTTP/2: a number of at most 8 digits, and a unit)."""
    if header is None:
        return None
    if not (match := re.fullmatch(r"(\d{1,8})([HMSmun])", header)):
        raise ValueError("grpc-timeout: give a number and a unit, such as 500m for half a second")
    return int(match[1]) * TIMEOUT_UNITS[match[2]]
