"""What operators look at: Prometheus metrics of one server."""

from __future__ import annotations

from typing import Any

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram

SECONDS = (0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1, 2, 5, 10, 30)
POWERS_OF_TWO = tuple(2**n for n in range(4, 18))


class Metrics:
    """In a registry of their own, so that two servers in one process do not share them."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        registry: dict[str, Any] = {"registry": self.registry, "namespace": "brewjax"}
        self.requests = Counter("requests", "By method and gRPC status code.", ["method", "code"], **registry)
        self.refused = Counter(
            "refused", "Requests and connections, by port (grpc, http) and reason.", ["port", "reason"], **registry
        )
        self.http_connections = Gauge("http_connections", "Open connections to the HTTP port.", **registry)
        self.grpc_calls = Gauge("grpc_calls", "Calls that are read, queued or answered.", **registry)
        self.request_seconds = Histogram(
            "request_seconds", "From arrival to answer.", ["method"], buckets=SECONDS, **registry
        )
        self.queue_seconds = Histogram(
            "queue_seconds", "From being queued to the first pass.", buckets=SECONDS, **registry
        )
        self.pass_seconds = Histogram("pass_seconds", "From dispatch to scores.", buckets=SECONDS, **registry)
        self.pass_tokens = Histogram("pass_tokens", "Tokens computed in a pass.", buckets=POWERS_OF_TWO, **registry)
        self.pass_items = Histogram("pass_items", "Items scored in a pass.", buckets=POWERS_OF_TWO, **registry)
        self.padding_tokens = Counter("padding_tokens", "Tokens computed for nothing.", **registry)
        self.prefix_tokens = Counter(
            "prefix_tokens", "Of prefixes: computed, or found in the cache.", ["source"], **registry
        )
        self.waiting = Gauge("waiting_tokens", "Tokens queued or running.", **registry)
        self.compilations = Gauge("compilations", "Compiled programs; constant once ready.", **registry)
        self.reloads = Counter("reloads", "Checkpoints taken up, or refused.", ["outcome"], **registry)
