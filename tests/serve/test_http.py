"""The HTTP face over the wire: fields, statuses, probes, and what it says of itself."""

import json
import re
import socket
from unittest import mock

import httpx
import pytest

from brewjax.serve.http import OPEN_PATHS
from tests.serve.serving import TOKEN, eventually, held


@pytest.mark.parametrize(
    ("body", "message"),
    [
        ({"items": ["a"]}, "label_token_ids: Field required"),
        ({"items": ["a", 3], "label_token_ids": [5]}, "items: Input should be"),
        ({"items": ["a"], "label_token_ids": []}, "label_token_ids: List should have at least 1 item"),
        ({"items": ["a"], "label_token_ids": [5] * 257}, "label_token_ids: List should have at most 256 items"),
        ({"items": ["a"], "label_token_ids": [-1]}, "label_token_ids[0]: Input should be greater"),
        ({"items": ["a"], "label_token_ids": [60_000]}, "label_token_ids: no token 60000"),
        ({"items": ["a"], "label_token_ids": [5], "query": [60_000]}, "query: no token 60000"),
        ({"items": ["a"], "label_token_ids": [5], "query": [7] * 1025}, "query: 1,025 tokens before the items"),
        (
            {"items": ["a"], "label_token_ids": [5], "query": "\ud800"},
            "the body: Invalid JSON: unexpected end of hex escape",
        ),
        ({"items": ["a"], "label_token_ids": [5], "temperatur": 1}, "temperatur: Extra inputs"),
        ({"items": ["a"], "label_token_ids": [5], "temperature": 2}, "the body: Value error, temperature needs apply"),
        (
            {"items": ["a"], "label_token_ids": [5], "return_token_logprobs": 1},
            "return_token_logprobs: Input should",
        ),
        ({"items": ["a"] * 1001, "label_token_ids": [5]}, "items: 1,001 of them"),
        (b"{", "the body: Invalid JSON: EOF"),
        (b"\xff", "the body: Invalid JSON: "),
        (b"[" * 100_000, "the body: Invalid JSON: recursion limit"),
        (b"", "the body: Invalid JSON: EOF"),
    ],
)
def test_http_names_the_field(http, body, message):
    content = body if isinstance(body, bytes) else json.dumps(body).encode()
    response = http.post("/v1/score", content=content, headers={"content-type": "application/json"})
    assert response.status_code == 400
    expected = {"object": "error", "code": 400, "message": mock.ANY, "type": "BadRequestError", "param": None}
    assert response.json() == expected
    assert response.json()["message"].startswith(message)


def test_http_answers_in_one_form_whatever_is_wrong(server, http):
    for response, status in (
        (http.get("/nowhere"), 404),
        (http.get("/v1/score"), 405),
        (http.post("/v1/score", content=b"x" * 8_000_001, headers={"content-type": "application/json"}), 413),
        (http.post("/v1/score", content=(b"x" * 1_000_000 for _ in range(9)), headers={"content-type": "a/json"}), 413),
    ):
        assert response.status_code == status
        assert response.json()["code"] == status
    echoed = http.post(
        "/v1/score", json={"items": ["a"], "label_token_ids": [5]}, headers={"x-request-id": "mine"}
    ).headers["x-request-id"]
    assert echoed == "mine"


def test_http_answers_are_sent_at_once(server):
    """A head and a body are two packets, and the second would wait for the first to be acknowledged."""
    for listening in server._http.servers:
        assert listening.sockets[0].getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY)


def test_an_error_is_short_however_much_it_quotes(http):
    for body in ({"a" * 7_900_000: 1}, {"items": ["a"], "label_token_ids": [-1] * 1_000_000}):
        response = http.post("/v1/score", json=body)
        assert response.status_code == 400
        assert len(response.content) < 600


@pytest.mark.parametrize("label", [True, "5", 5.0, None])
def test_a_label_is_a_whole_number(http, label):
    response = http.post("/v1/score", json={"items": ["a"], "label_token_ids": [label]})
    assert response.status_code == 400
    assert response.json()["message"] == "label_token_ids[0]: Input should be a valid integer"


@pytest.mark.parametrize("headers", [{"content-type": "text/plain"}, {"content-encoding": "gzip"}])
def test_what_is_no_json_is_refused_as_such(http, headers):
    body = json.dumps({"items": ["a"], "label_token_ids": [5]})
    assert http.post("/v1/score", content=body, headers={"content-type": "application/json"}).status_code == 200
    assert http.post("/v1/score", content=body, headers=headers).status_code == 415


@pytest.mark.parametrize("path", [*OPEN_PATHS, "/metrics"])
def test_head_is_get_without_a_body(http, path):
    head, get = http.head(path), http.get(path)
    assert (head.status_code, head.content) == (get.status_code, b"") == (200, b"")
    assert head.headers["content-type"] == get.headers["content-type"]


def test_the_probes_are_three(http, server):
    def probes() -> list[int]:
        return [http.get(path).status_code for path in ("/livez", "/readyz", "/health", "/startupz")]

    assert probes() == [200] * 4
    with mock.patch.object(server.service.scoring_loop, "_passes_work", False):
        assert probes() == [200, 503, 503, 200]
    with mock.patch.object(server.service, "lame_duck", True):
        assert probes() == [200, 503, 503, 200]
    with mock.patch.object(type(server.service.scoring_loop), "alive", False):
        assert probes() == [503, 503, 503, 200]


def test_metrics(http):
    metrics = http.get("/metrics").text
    for name in ("requests_total", "queue_seconds", "pass_seconds", "pass_tokens", "pass_items", "padding_tokens_total",
                 "prefix_tokens_total", "waiting_tokens", "compilations", "reloads", "refused", "http_connections",
                 "grpc_calls"):  # fmt: skip
        assert f"# TYPE brewjax_{name.removesuffix('_total')}" in metrics, name
    assert f'brewjax_model_info{{model="{http.get("/v1/models").json()["data"][0]["id"]}"}} 1.0' in metrics
    assert "\nprocess_resident_memory_bytes " in metrics
    assert http.get("/nowhere").status_code == 404
    for path, status in (("/metrics", 200), ("", 404)):
        assert f'brewjax_http_responses_total{{path="{path}",status="{status}"}}' in http.get("/metrics").text


# --- what it says of itself


def test_the_page_needs_nothing_from_elsewhere(http):
    page = http.get("/docs").text
    assert not re.findall(r"https?://|<script|@import|src=", page)
    for text in ("POST /v1/score", "GET /readyz", "label_token_ids", "Retry-After"):
        assert text in page
    assert http.get("/redoc").status_code == 404


def test_every_status_is_in_the_schema(http, strict, strict_http):
    """Each that callers can bring about; and none that is not so."""
    schema, guarded = (client.get("/openapi.json").json() for client in (http, strict_http))
    probes = {"/livez", "/readyz", "/health", "/startupz", "/metrics"}
    rerank = {"/rerank", "/v1/rerank", "/v2/rerank", "/score"}
    assert set(schema["paths"]) == {"/v1/score", "/v1/rank", "/v1/reload", "/v1/models", *rerank, *probes}
    responses = schema["paths"]["/v1/score"]["post"]["responses"]
    assert set(responses) == {"200", "400", "408", "413", "415", "429", "500", "503", "504"}
    body = schema["paths"]["/v1/score"]["post"]["requestBody"]["content"]["application/json"]["schema"]
    assert set(schema["components"]["schemas"][body["$ref"].split("/")[-1]]["required"]) == {"items", "label_token_ids"}
    assert "securitySchemes" not in schema["components"]
    assert guarded["components"]["securitySchemes"]["bearer"]["scheme"] == "bearer"
    for path, operations in guarded["paths"].items():
        (operation,) = operations.values()
        assert ("401" in operation["responses"]) == ("security" in operation) == (path not in OPEN_PATHS)
        method = next(iter(operations)).upper()
        assert (strict_http.request(method, path).status_code == 401) == (path not in OPEN_PATHS)


# --- who may ask


@pytest.mark.parametrize(
    ("authorization", "status"),
    [
        ("", 401),
        ("Bearer", 401),
        ("Bearer " + TOKEN.upper(), 401),
        (TOKEN, 401),
        ("Bearer sesam\xe9", 401),
        ("Basic " + TOKEN, 401),
        ("Bearer " + TOKEN, 200),
        ("bearer " + TOKEN, 200),
        ("BEARER  " + TOKEN, 200),
    ],
)
def test_http_asks_for_the_token(strict_http, authorization, status):
    response = strict_http.get("/metrics", headers={"authorization": authorization.encode("latin-1")})
    assert response.status_code == status
    assert (response.headers.get("www-authenticate") == "Bearer") == (status == 401)
    assert strict_http.get("/readyz").status_code == 200


def test_refusals_are_counted_and_logged_without_what_was_in_them(http, server, caplog):
    def refused(reason: str) -> float:
        return server.service.metrics.refused.labels("http", reason)._value.get()

    secret = "member 4711"
    cases = {
        "invalid": lambda: http.post("/v1/score", json={secret: secret}),
        "unknown method": lambda: http.get(f"/{secret}"),
        "too large": lambda: http.post("/v1/score", content=secret.encode() * 1_000_000),
    }
    with caplog.at_level("INFO", "brewjax.serve"):
        for reason, ask in cases.items():
            before = refused(reason)
            assert ask().status_code >= 400
            assert refused(reason) == before + 1
            assert vars(caplog.records[-1])["reason"] == reason
        assert not any(secret in str(vars(record)) for record in caplog.records)


def test_a_caller_that_hangs_up_is_not_logged_as_answered(server, caplog):
    metrics = server.service.metrics
    before = metrics.refused.labels("http", "cancelled")._value.get()
    with caplog.at_level("INFO", "brewjax.serve"), held(server.service.scoring_loop) as gate:
        body = {"query": [7], "items": [[8]], "label_token_ids": [5]}
        with pytest.raises(httpx.ReadTimeout):
            httpx.post(f"http://127.0.0.1:{server.http_port}/v1/score", json=body, timeout=0.5)
        eventually(lambda: metrics.refused.labels("http", "cancelled")._value.get() == before + 1)
        gate.open()
    assert [record.message for record in caplog.records] == ["refused"]
