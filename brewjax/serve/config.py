"""Settings of a server."""

from __future__ import annotations

import ipaddress
from typing import TYPE_CHECKING, Any, Literal, Self

import pydantic

from brewjax.config import Config, ConfigError, Seed, Words, misplaced
from brewjax.model.generate import SamplingParams
from brewjax.model.sharding import MeshConfig
from brewjax.scoring.passes import PAGE

if TYPE_CHECKING:
    from brewjax.bundle.bundle import Bundle


class DecodeConfig(Config):
    """How Decode generates text."""

    slots: int = pydantic.Field(default=8, gt=0)
    """Texts that are generated at once; each slot takes memory for the keys and values of `context` tokens."""
    context: int = pydantic.Field(default=2048, gt=1)
    """Maximum tokens of a prompt and its generated text together."""
    queue: int = pydantic.Field(default=64, ge=0)
    """Requests that may wait for a slot; more are refused with a time to retry after."""
    sampling: SamplingParams = SamplingParams()
    """Temperature and top-k of the sampling."""
    seed: Seed = 0
    """Seed of the sampling."""


class RerankConfig(Config):
    """How a query and documents are rendered for the model, and what it answers: whatever it was trained to read."""

    query: Words = "Query: {query}\n"
    """What all documents share, with `{query}` in it."""
    document: Words = "Document: {document}\nDoes the document answer the query?"
    """What follows for each document, with `{document}` in it; the label is the next token."""
    labels: tuple[str, ...] = pydantic.Field(default=(" Yes", " No"), min_length=2)
    """Words of one token each. The probability of the first one among them is the relevance."""

    @pydantic.model_validator(mode="after")
    def _has_places(self) -> Self:
        for key in ("query", "document"):
            if getattr(self, key).count(f"{{{key}}}") != 1:
                raise misplaced(f"'{getattr(self, key)}' has no {{{key}}}, or more than one", key)
        return self


class CallerConfig(Config):
    """What a caller with a token of its own may take of the server."""

    token_file: str
    """File with the caller's bearer token. SIGHUP reads it again."""
    share: float = pydantic.Field(default=1.0, gt=0, le=1)
    """Share of `max_queued_tokens` and of `max_concurrent_requests` that its requests may take at a time; more are
    refused with a time to retry after."""
    priority: int = 0
    """Requests of a higher priority are scored first, and those of a lower one in what passes have left."""


class ServeConfig(Config):
    """Addresses, credentials, memory and limits of a server."""

    host: str = "localhost"
    """Name or address to listen at: `localhost` is both loopback addresses, `0.0.0.0` or `::` every address."""
    port: int = pydantic.Field(default=9000, ge=0, lt=65536)
    """Port of gRPC; 0 takes a free one."""
    http_port: int | None = pydantic.Field(default=9001, ge=0, lt=65536)
    """Port of HTTP; 0 takes a free one, null turns HTTP off."""
    tls_cert: str | None = None
    """PEM file of the certificate chain; needed, with `tls_key`, to listen on other than loopback addresses unless
    `plaintext` is set. SIGHUP reads it again."""
    tls_key: str | None = None
    """PEM file of the certificate's private key. SIGHUP reads it again."""
    token_file: str | None = None
    """File with the bearer token that every caller must send; needed to listen on other than loopback addresses unless
    `anonymous` is set. SIGHUP reads it again."""
    callers: dict[str, CallerConfig] = {}
    """Callers with tokens, shares of the queue and priorities of their own, by name. Others need that of `token_file`,
    and without one are refused unless `anonymous` is set."""
    plaintext: bool = False
    """Other machines may connect without TLS: behind a sidecar that encrypts, or for a kubelet's gRPC probe."""
    anonymous: bool = False
    """Other machines may call without a token: behind a sidecar that authenticates callers."""
    admin_token_file: str | None = None
    """File with the bearer token for Reload and for changes of the catalogue and of the index, which also allows all
    other calls; without it these are refused."""
    reload_below: str | None = None
    """Folder below which Reload may load models, encoders and indices; by default only the served folders again."""
    special_tokens: bool = False
    """Special tokens in callers' raw texts (`<|im_start|>`) are read as such; otherwise they are ordinary text."""
    catalogue: str | dict[str, str] | None = None
    """Folder of a dataset with the card of the model's training: members and items of it are named by their ids alone,
    and attributes, history and facts come from its tables, as of the request's time. Reload reads it again. For a model
    of several surfaces, a folder for each by name, or for some: {jobs: data/jobs}."""
    changes: str | None = None
    """Where the changes of the catalogue are kept that UpsertItems, UpsertMembers and RecordEvents make: a folder, for
    one server, or a Redis stream for several, redis://HOST:PORT/DATABASE#STREAM; without it they are refused."""
    refresh_seconds: float = pydantic.Field(default=1.0, gt=0)
    """Seconds between two refreshes, from which on requests read the changes of the catalogue; at least as many as a
    refresh takes."""
    encoder: str | None = None
    """Folder of an encoder to serve beside the model: Embed, and with `index` Retrieve."""
    index: str | None = None
    """Folder of the index that the encoder's vectors are in; made if there is none."""
    max_retrieved: int = pydantic.Field(default=10_000, gt=0)
    """Maximum items of a Retrieve."""
    item_delimiter: int | None = pydantic.Field(default=None, ge=0)
    """Token id between the query and each item of /v1/score, which are then tokenised apart: SGLang's multi-item mode,
    for a model that was trained to read it."""
    rerank: RerankConfig | None = None
    """Serve /rerank and /score, in the forms of Cohere, Jina and vLLM, with these prompts."""
    tasks: tuple[str, ...] | dict[str, tuple[str, ...]] = ()
    """Task files to serve in addition to the tasks that the model was trained on. For a model of several surfaces,
    those of each by name: {jobs: [saves.yaml]}."""
    token_buckets: tuple[int, ...] = pydantic.Field(default=(256, 512, 1024, 2048, 4096), min_length=1)
    """Row lengths, in tokens, that passes are compiled for."""
    max_prefix_tokens: int | None = pydantic.Field(default=None, gt=0)
    """Maximum tokens of a prefix; by default the prompt budget of the model's training."""
    prefix_cache_gb: float = pydantic.Field(default=1.0, gt=0)
    """Gigabytes for the keys and values of cached prefixes; a mesh's `tensor` axis splits them over its devices, along
    `context` each device holds all of them."""
    mesh: MeshConfig | None = None
    """How devices share each pass, by `tensor` (heads) and `context` (tokens); by default all by heads, on CPUs by
    tokens."""
    batch_timeout_ms: float = pydantic.Field(default=2.0, ge=0)
    """Milliseconds that an idle device waits for more requests to share a pass."""
    max_queued_tokens: int = pydantic.Field(default=200_000, gt=0)
    """Maximum tokens queued or running; more requests are refused with a time to retry after."""
    max_candidates: int = pydantic.Field(default=1_000, gt=0)
    """Maximum items of a Score."""
    max_stream_candidates: int = pydantic.Field(default=50_000, gt=0)
    """Maximum items of a ScoreStream."""
    max_candidate_tokens: int = pydantic.Field(default=1_024, gt=0)
    """Maximum tokens of one item."""
    max_events: int = pydantic.Field(default=10_000, gt=0)
    """Maximum events of a history."""
    max_request_bytes: int = pydantic.Field(default=8_000_000, gt=0)
    """Maximum bytes of a request."""
    max_concurrent_requests: int = pydantic.Field(default=256, gt=0)
    """Maximum requests in progress at a time."""
    timeout_seconds: float = pydantic.Field(default=60.0, gt=0)
    """Seconds until a request is given up; a caller's shorter deadline takes precedence."""
    connections: int = pydantic.Field(default=512, gt=0)
    """Maximum connections to each port; beyond it HTTP closes the longest idle one, and gRPC refuses the new one."""
    header_seconds: float = pydantic.Field(default=10.0, gt=0)
    """Seconds for a TLS handshake, and for the header of an HTTP request, to arrive."""
    body_seconds: float = pydantic.Field(default=30.0, gt=0)
    """Seconds for the body of a request to arrive, and for a slow reader to take more of a response."""
    keep_alive_seconds: float = pydantic.Field(default=620.0, gt=0)
    """Seconds that an idle connection stays open; keep it above the balancer's own limit (60 on AWS, 600 on Google), or
    the balancer sends requests into connections that are closing, and answers 502."""
    lame_duck_seconds: float = pydantic.Field(default=5.0, ge=0)
    """Seconds after SIGTERM in which readiness fails but requests are still answered, for balancers to notice; SIGINT
    skips them."""
    drain_seconds: float = pydantic.Field(default=30.0, gt=0)
    """Seconds after that for requests in progress to finish."""
    decode: bool | None = None
    """Serve JetStream's Decode too, which generates text; by default if google-jetstream is installed."""
    generation: DecodeConfig = DecodeConfig()
    """How Decode generates text."""

    @pydantic.model_validator(mode="after")
    def _consistent(self) -> ServeConfig:
        if any(length % (2 * PAGE) or length <= 0 for length in self.token_buckets):
            raise ValueError(f"token_buckets {self.token_buckets}: lengths are multiples of {2 * PAGE}")
        if self.max_candidate_tokens > max(self.token_buckets):
            raise ValueError(
                f"max_candidate_tokens {self.max_candidate_tokens} is over the longest of token_buckets "
                f"{self.token_buckets}"
            )
        if self.changes and not self.catalogue:
            raise ValueError("changes: give the catalogue too that they are of")
        if self.index and not self.encoder:
            raise ValueError("index: give its encoder too")
        if (self.tls_cert is None) != (self.tls_key is None):
            raise ValueError("give both tls_cert and tls_key, or neither")
        if not _loopback(self.host):
            missing = [
                f"{files} (or {instead})"
                for files, instead, enough in (
                    ("tls_cert and tls_key", "plaintext: true", self.tls_cert or self.plaintext),
                    ("token_file", "anonymous: true", self.token_file or self.callers or self.anonymous),
                )
                if not enough
            ]
            if missing:
                raise ValueError(f"host {self.host} can be reached from other machines: give {', '.join(missing)}")
        return self

    def by_surface(self, key: Literal["catalogue", "tasks"], bundle: Bundle) -> dict[str, Any]:
        """Looks up a setting that each surface of a model may have of its own.

        Args:
          key: the setting.
          bundle: the model.

        Returns:
          Its value by the surface's name; empty where it is not set.

        Raises:
          ConfigError: there is no surface of a name, or a model of several is given no names.
        """
        value = getattr(self, key)
        if not value:
            return {}
        try:
            if not isinstance(value, dict):
                return {bundle.surface().name: value}
            return {bundle.surface(name).name: of_surface for name, of_surface in value.items()}
        except ConfigError as error:
            raise self.error(str(error), key) from None


def _loopback(host: str) -> bool:
    """Whether only this machine can connect to the host."""
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False
