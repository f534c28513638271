"""Documentation of the HTTP API: its OpenAPI schema, and a self-contained page made from it."""

from __future__ import annotations

import html
import json
from collections.abc import Sequence
from typing import Any

import pydantic
from fastapi import FastAPI
from google.protobuf.descriptor import Descriptor, FieldDescriptor

DESCRIPTION = "Ranks items for members: one history, many items, one pass."
BEARER = {"type": "http", "scheme": "bearer", "description": "The token of the server's token_file."}
ERRORS = {  # of scoring
    "400": "A field is missing, unknown, or of a wrong value; the message names it.",
    "408": "The body did not arrive in time.",
    "413": "The body has too many bytes.",
    "415": "The body is not JSON, or it is compressed.",
    "429": "The queue is full; Retry-After is the time to wait.",
    "500": "A pass failed; the server's log has more.",
    "503": "The server stops.",
    "504": "Not answered in time.",
}
JSON_TYPES = {
    FieldDescriptor.CPPTYPE_INT32: "integer",
    FieldDescriptor.CPPTYPE_UINT32: "integer",
    FieldDescriptor.CPPTYPE_FLOAT: "number",
    FieldDescriptor.CPPTYPE_DOUBLE: "number",
    FieldDescriptor.CPPTYPE_BOOL: "boolean",
}
UNAUTHENTICATED = "The bearer token is missing or wrong."
PAGE = """<!doctype html>
<html lang="en"><head><meta charset="utf-8"><title>{title}</title>
<style>
body {{ font: 15px/1.5 sans-serif; max-width: 60em; margin: 2em auto; padding: 0 1em }}
h2 {{ border-top: 1px solid #ccc; padding-top: 1em }} code, pre {{ font-size: 13px; background: #f4f4f4 }}
pre {{ padding: 1em; overflow-x: auto }} td, th {{ text-align: left; vertical-align: top; padding: 0 1em .3em 0 }}
</style></head><body><h1>{title}</h1><p>{description} The same as <a href="openapi.json">OpenAPI schema</a>.</p>
{operations}
<h2>Schemas</h2><pre>{schemas}</pre></body></html>
"""


class Error(pydantic.BaseModel):
    """An error; the message names the field and what is wrong with it."""

    object: str = "error"
    message: str
    type: str
    param: None = None
    code: int


def describe(app: FastAPI, request: type[pydantic.BaseModel], needs_token: bool, open_paths: Sequence[str]) -> None:
    """Adds to the application's schema every status, the body of `/v1/score`, and which paths need a token."""
    make_schema = app.openapi

    def openapi() -> dict[str, Any]:
        if app.openapi_schema:
            return app.openapi_schema
        schema = make_schema()
        components = schema["components"]
        components["schemas"] |= {
            model.__name__: model.model_json_schema(ref_template="#/components/schemas/{model}")
            for model in (request, Error)
        }
        if needs_token:
            components["securitySchemes"] = {"bearer": BEARER}
        for path, operations in schema["paths"].items():
            (operation,) = operations.values()
            responses = operation["responses"]
            if path == "/v1/score":
                operation["requestBody"] = {"required": True, "content": _json(request.__name__)}
            if "requestBody" in operation:
                responses |= {code: _error(text) for code, text in ERRORS.items()}
            elif path in ("/livez", "/readyz", "/health"):
                responses["503"] = {"description": "The probe fails."}
            if needs_token and path not in open_paths:
                operation["security"] = [{"bearer": []}]
                responses["401"] = _error(UNAUTHENTICATED)
        return schema

    app.openapi = openapi  # type: ignore[method-assign]


def json_body(schema: dict[str, Any]) -> dict[str, Any]:
    """What FastAPI adds to the description of an operation that reads its body itself, as JSON of a schema."""
    return {"requestBody": {"required": True, "content": {"application/json": {"schema": schema}}}}


def message_schema(message: Descriptor) -> dict[str, Any]:
    """The JSON schema of a protobuf message's JSON form (https://protobuf.dev/programming-guides/json)."""
    if message.full_name == "google.protobuf.Timestamp":
        return {"type": "string", "format": "date-time"}
    properties = {field.name: _field_schema(field) for field in message.fields}
    return {"type": "object", "properties": properties, "additionalProperties": False}


def _field_schema(field: FieldDescriptor) -> dict[str, Any]:
    if field.message_type and field.message_type.GetOptions().map_entry:
        value = field.message_type.fields_by_name["value"]
        return {"type": "object", "additionalProperties": _field_schema(value)}
    if field.message_type:
        schema = message_schema(field.message_type)
    elif field.enum_type:
        schema = {"type": "string", "enum": [value.name for value in field.enum_type.values]}
    else:
        schema = {"type": JSON_TYPES.get(field.cpp_type, "string")}  # of 64 bits: a string
    return {"type": "array", "items": schema} if field.is_repeated else schema


def render_page(schema: dict[str, Any]) -> str:
    """The schema as a page of HTML without scripts."""
    operations = []
    for path, methods in schema["paths"].items():
        for method, operation in methods.items():
            rows = [
                f"<tr><th>{html.escape(code)}<td>{html.escape(response['description'])}"
                for code, response in sorted(operation["responses"].items())
            ]
            token = "<p>Needs a bearer token.</p>" if operation.get("security") else ""
            text = html.escape(operation.get("description", ""))
            operations.append(
                f"<h2><code>{method.upper()} {html.escape(path)}</code></h2><p>{text}</p>{token}"
                f"<table>{''.join(rows)}</table>"
            )
    return PAGE.format(
        title=html.escape(schema["info"]["title"]),
        description=html.escape(schema["info"]["description"]),
        operations="".join(operations),
        schemas=html.escape(json.dumps(schema["components"], indent=2)),
    )


def _json(name: str) -> dict[str, Any]:
    return {"application/json": {"schema": {"$ref": f"#/components/schemas/{name}"}}}


def _error(text: str) -> dict[str, Any]:
    return {"description": text, "content": _json(Error.__name__)}
