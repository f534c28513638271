"""OpenTelemetry traces, configured by OpenTelemetry's own environment variables (needs the `trace` extra)."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any

from fastapi import FastAPI
from opentelemetry import trace

ENDPOINT = "OTEL_EXPORTER_OTLP_ENDPOINT"


def trace_to_collector() -> tuple[list[Any], Callable[[FastAPI], None]]:
    """Sends spans to a collector, as children of the callers' own.

    Returns:
      gRPC interceptors, and a function that instruments the HTTP application; without effect unless
      `OTEL_EXPORTER_OTLP_ENDPOINT` is set.

    Raises:
      ValueError: if the extra is not installed.
    """
    if not os.environ.get(ENDPOINT):
        return [], lambda app: None
    try:
        from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
        from opentelemetry.instrumentation.fastapi import FastAPIInstrumentor
        from opentelemetry.instrumentation.grpc import aio_server_interceptor
        from opentelemetry.sdk.resources import SERVICE_NAME, Resource
        from opentelemetry.sdk.trace import TracerProvider
        from opentelemetry.sdk.trace.export import BatchSpanProcessor
    except ImportError as error:
        raise ValueError(
            f"{ENDPOINT} is set, but {error.name} is not installed: pip install 'brewjax[trace]'"
        ) from None
    attributes = {} if os.environ.get("OTEL_SERVICE_NAME") else {SERVICE_NAME: "brewjax"}
    provider = TracerProvider(resource=Resource.create(attributes))
    provider.add_span_processor(BatchSpanProcessor(OTLPSpanExporter()))
    trace.set_tracer_provider(provider)
    return [aio_server_interceptor()], FastAPIInstrumentor.instrument_app
