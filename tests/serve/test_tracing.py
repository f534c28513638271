"""Spans reach a collector, and go on from the caller's own."""

import gzip
import http.server
import threading

import grpc
import pytest
from opentelemetry import trace
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest

from brewjax.serve import ranker_pb2 as pb
from brewjax.serve import ranker_pb2_grpc
from brewjax.serve.client import raw
from brewjax.serve.tracing import ENDPOINT, trace_to_collector
from tests.serve.serving import CONFIG, running

TRACE, PARENT = "0af7651916cd43dd8448eb211c80319c", "b7ad6b7169203331"


@pytest.fixture
def collector(monkeypatch):
    """What was posted to it."""
    posted: list[ExportTraceServiceRequest] = []

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            body = self.rfile.read(int(self.headers["content-length"]))
            if self.headers.get("content-encoding") == "gzip":
                body = gzip.decompress(body)
            posted.append(ExportTraceServiceRequest.FromString(body))
            self.send_response(200)
            self.end_headers()

        def log_message(self, *of_every_request: object) -> None: ...

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        monkeypatch.setenv(ENDPOINT, f"http://127.0.0.1:{server.server_port}")
        yield posted
        server.shutdown()


def test_a_request_is_traced_from_its_caller_on(model_folder, collector):
    with running(model_folder, CONFIG) as server, grpc.insecure_channel(f"127.0.0.1:{server.port}") as channel:
        request = pb.ScoreRequest(raw=raw([3, 4], [[5]], [6, 7]), request_id="mine")
        metadata = [("traceparent", f"00-{TRACE}-{PARENT}-01")]
        stub = ranker_pb2_grpc.RankerStub(channel)
        assert [len(response.scores) for response in stub.ScoreStream(request, metadata=metadata)] == [1]
        stub.Score(request, metadata=metadata)
    trace.get_tracer_provider().shutdown()
    spans = {
        span.name: span
        for posted in collector
        for resource in posted.resource_spans
        for scope in resource.scope_spans
        for span in scope.spans
    }
    assert {span.trace_id.hex() for span in spans.values()} == {TRACE}
    assert spans["ScoreStream"].parent_span_id == spans["/brewjax.ranker.v1.Ranker/ScoreStream"].span_id
    outermost = spans["/brewjax.ranker.v1.Ranker/Score"]
    assert outermost.parent_span_id.hex() == PARENT
    assert spans["Score"].parent_span_id == outermost.span_id
    for inner in ("encode", "queue and pass"):
        assert spans[inner].parent_span_id == spans["Score"].span_id
    assert ("brewjax.request_id", "mine") in {
        (attribute.key, attribute.value.string_value) for attribute in spans["Score"].attributes
    }


def test_nothing_is_traced_unless_told(monkeypatch):
    monkeypatch.delenv(ENDPOINT, raising=False)
    assert trace_to_collector()[0] == []
