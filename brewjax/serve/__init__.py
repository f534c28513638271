"""Scoring as a service. `Client` is what callers need; `brewjax serve` starts the server."""

from brewjax.serve.client import Client

__all__ = ["Client"]
