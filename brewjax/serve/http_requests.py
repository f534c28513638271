"""What every HTTP endpoint does: read a body of JSON, turn errors into statuses, notice that the caller hung up."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import re
from collections.abc import Callable, Coroutine, Iterator, Mapping
from typing import Any, TypeVar

import grpc
import pydantic
from fastapi import HTTPException, Request

from brewjax.serve.refusals import status_of, truncate_message
from brewjax.serve.scoring_loop import QueueFullError

log = logging.getLogger(__name__)
PARSED_INLINE = 1 << 16  # bytes; larger bodies are parsed in a thread, not on the event loop
T = TypeVar("T")

HTTP_STATUS = {
    grpc.StatusCode.INVALID_ARGUMENT: 400,
    grpc.StatusCode.PERMISSION_DENIED: 403,
    grpc.StatusCode.RESOURCE_EXHAUSTED: 429,
    grpc.StatusCode.CANCELLED: 499,
    grpc.StatusCode.UNAVAILABLE: 503,
    grpc.StatusCode.DEADLINE_EXCEEDED: 504,
}


@contextlib.contextmanager
def refusing(request: Request, fields: Mapping[str, str]) -> Iterator[None]:
    """Context manager: turns errors into HTTPException.

    Args:
      request: that is answered.
      fields: patterns of the names of fields in gRPC's errors, and their names here.

    Yields:
      Nothing.

    Raises:
      HTTPException: in place of any error in the block; its status is that of the error.
    """
    try:
        yield
    except HTTPException:
        raise
    except Exception as error:
        code = status_of(error)
        if code not in HTTP_STATUS:
            log.exception("request failed", extra={"request_id": request.headers.get("x-request-id", "")})
        retry = {"Retry-After": str(round(error.retry_after + 0.5))} if isinstance(error, QueueFullError) else None
        message = truncate_message(error)
        for rpc_field, field in fields.items():
            message = re.sub(rpc_field, field, message)
        raise HTTPException(HTTP_STATUS.get(code, 500), message, retry) from None


async def parse_body(request: Request, parse: Callable[[bytes], T]) -> T:
    """Reads the body of a request.

    Args:
      request: with a body in JSON.
      parse: what reads it; a long body in a thread.

    Returns:
      What `parse` returns.

    Raises:
      HTTPException: 415 for a body that is not JSON; 400 for one that `parse` refuses, naming the field that is wrong.
    """
    kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if kind != "application/json" and not kind.endswith("+json"):
        raise HTTPException(415, "content-type: give application/json")
    if request.headers.get("content-encoding", "identity") != "identity":
        raise HTTPException(415, "content-encoding: leave it out")
    body = await request.body()
    try:
        return parse(body) if len(body) <= PARSED_INLINE else await asyncio.to_thread(parse, body)
    except pydantic.ValidationError as error:
        first = error.errors(include_url=False, include_context=False, include_input=False)[0]
        field = "the body"
        if first["loc"]:
            field = str(first["loc"][0]) + "".join(f"[{part}]" for part in first["loc"][1:] if isinstance(part, int))
        raise HTTPException(400, f"{truncate_message(field)}: {first['msg']}") from None


async def until_disconnect(request: Request, answer: Coroutine[Any, Any, T]) -> T:
    """Awaits an answer, which is cancelled when the caller hangs up, as neither FastAPI nor uvicorn does it.

    Args:
      request: that is answered.
      answer: to await.

    Returns:
      What `answer` returns.

    Raises:
      HTTPException: 499, the caller hung up.
    """

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
