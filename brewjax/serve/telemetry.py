"""Prometheus metrics of one server. Their names are in dashboards: do not rename them."""

from __future__ import annotations

from typing import Any

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, Info, ProcessCollector

SECONDS = (0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1, 2, 5, 10, 30)
SHARES = (0.0001, 0.001, 0.01, 0.05, 0.1, 0.25, 0.5, 0.75, 1)
POWERS_OF_TWO = tuple(2**n for n in range(4, 18))


class Metrics:
    """The metrics, in a registry of their own, so that two servers in one process do not share them."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        registry: dict[str, Any] = {"registry": self.registry, "namespace": "brewjax"}
        ProcessCollector(registry=self.registry)  # memory, processor time and open files, under Prometheus' own names
        self.model = Info("model", "The served model, by name and version.", **registry)
        self.requests = Counter(
            "requests",
            "Requests by method, gRPC status code, and caller with a token of its own.",
            ["method", "code", "caller"],
            **registry,
        )
        self.refused = Counter(
            "refused",
            "Refused requests and connections, by port (grpc, http) and reason.",
            ["port", "reason"],
            **registry,
        )
        self.http_responses = Counter(
            "http_responses", "HTTP responses by path and status.", ["path", "status"], **registry
        )
        self.http_connections = Gauge("http_connections", "Open connections to the HTTP port.", **registry)
        self.grpc_calls = Gauge("grpc_calls", "gRPC calls in progress.", **registry)
        self.request_seconds = Histogram(
            "request_seconds", "Seconds from arrival to response.", ["method"], buckets=SECONDS, **registry
        )
        self.queue_seconds = Histogram(
            "queue_seconds", "Seconds from being queued to the first pass.", buckets=SECONDS, **registry
        )
        self.pass_seconds = Histogram("pass_seconds", "Seconds from dispatch to scores.", buckets=SECONDS, **registry)
        self.pass_tokens = Histogram("pass_tokens", "Tokens computed in a pass.", buckets=POWERS_OF_TWO, **registry)
        self.pass_items = Histogram("pass_items", "Items scored in a pass.", buckets=POWERS_OF_TWO, **registry)
        self.padding_tokens = Counter("padding_tokens", "Padding tokens computed.", **registry)
        self.prefix_tokens = Counter(
            "prefix_tokens", "Tokens of prefixes, computed or read from the cache.", ["source"], **registry
        )
        self.waiting = Gauge("waiting_tokens", "Tokens queued or running.", **registry)
        self.compilations = Gauge("compilations", "Compiled programs; constant once ready.", **registry)
        self.index_lag = Histogram(
            "index_lag_seconds",
            "Seconds from receiving an item, as a vector or to be embedded (text), until searches find it.",
            ["content"],
            buckets=(*SECONDS, 60),
            **registry,
        )
        self.filter_share = Histogram(
            "filter_share", "Share of the index that a query's filter admits.", buckets=SHARES, **registry
        )
        self.catalogue_lag = Histogram(
            "catalogue_lag_seconds",
            "Seconds from receiving a change of the catalogue until requests read it.",
            buckets=(*SECONDS, 60),
            **registry,
        )
        self.catalogue_refresh = Histogram(
            "catalogue_refresh_seconds", "Seconds that a refresh with changes took.", buckets=(*SECONDS, 60), **registry
        )
        self.catalogue_rows = Gauge(
            "catalogue_rows", "Rows of the catalogue that requests read.", ["surface", "table"], **registry
        )
        self.catalogue_failures = Counter(
            "catalogue_failures",
            "Refreshes that failed (refresh; store: it could not be read), changes that were left out (change).",
            ["reason"],
            **registry,
        )
        self.reloads = Counter("reloads", "Reloads by outcome (loaded, refused).", ["outcome"], **registry)
