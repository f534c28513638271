"""OpenTelemetry traces, where they are configured by its own environment variables (the `trace` extra)."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any

from fastapi import FastAPI
from opentelemetry import trace

ENDPOINT = "OTEL_EXPORTER_OTLP_ENDPOINT"


def trace_to_collector() -> tuple[list[Any], Callable[[FastAPI], None]]:
    """gRPC interceptors, and what to do to the HTTP application, for spans to go on from the callers' own.

    Nothing unless `OTEL_EXPORTER_OTLP_ENDPOINT` says where they go. Raises ValueError where the extra is missing.
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
    named = {} if os.environ.get("OTEL_SERVICE_NAME") else {SERVICE_NAME: "brewjax"}
    provider = TracerProvider(resource=Resource.create(named))
    provider.add_span_processor(BatchSpanProcessor(OTLPSpanExporter()))
    trace.set_tracer_provider(provider)
    return [aio_server_interceptor()], FastAPIInstrumentor.instrument_app
