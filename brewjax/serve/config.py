"""What a server is told when it starts."""

from __future__ import annotations

import ipaddress

import pydantic

from brewjax.config import Config, Seed
from brewjax.model.generate import SamplingParams
from brewjax.model.sharding import MeshConfig
from brewjax.scoring.passes import PAGE


class DecodeConfig(Config):
    """How text is generated for callers of Decode."""

    slots: int = pydantic.Field(default=8, gt=0)
    """Texts that grow at once; each takes memory for the keys and values of `context` tokens."""
    context: int = pydantic.Field(default=2048, gt=1)
    """Most tokens of a prompt and its text together."""
    queue: int = pydantic.Field(default=64, ge=0)
    """Requests that wait for a slot; those beyond are told to come back."""
    sampling: SamplingParams = SamplingParams()
    seed: Seed = 0
    """Of the sampling."""


class ServeConfig(Config):
    """Where a server listens, what it keeps in memory, and its limits."""

    host: str = "localhost"
    """A name or an address; `localhost` is both loopback addresses, `0.0.0.0` and `::` every address of IPv4 and
    IPv6."""
    port: int = pydantic.Field(default=9000, ge=0, lt=65536)
    """Of gRPC, and of HTTP (null: none); 0 takes a free one."""
    http_port: int | None = pydantic.Field(default=9001, ge=0, lt=65536)
    """See `port`."""
    tls_cert: str | None = None
    """PEM files; token_file: holds the bearer token that every caller must send. Both are needed to listen on any
    but a loopback address, unless `plaintext` or `anonymous` says otherwise. SIGHUP reads the files again."""
    tls_key: str | None = None
    """See `tls_cert`."""
    token_file: str | None = None
    plaintext: bool = False
    """Other machines may connect without TLS: behind a sidecar that encrypts, or for a kubelet's gRPC probe."""
    anonymous: bool = False
    """Other machines may call without a token: behind a sidecar that knows the callers."""
    admin_token_file: str | None = None
    """Holds the bearer token for Reload, which is refused where there is none; good for all else too."""
    reload_below: str | None = None
    """The folder that holds the models which Reload may take up; by default only the one that is served."""
    special_tokens: bool = False
    """Special tokens that callers write in raw texts (`<|im_start|>`) count as such; otherwise they are read as
    ordinary text."""
    tasks: tuple[str, ...] = ()
    """Task files to answer beside those that the model was trained on."""
    token_buckets: tuple[int, ...] = pydantic.Field(default=(256, 512, 1024, 2048, 4096), min_length=1)
    """Lengths of rows that passes are compiled for."""
    max_prefix_tokens: int | None = pydantic.Field(default=None, gt=0)
    """Most tokens of a prefix; by default as many as the model was trained to read."""
    prefix_cache_gb: float = pydantic.Field(default=1.0, gt=0)
    """Memory for the keys and values of prefixes; `tensor` splits it over devices, along `context` each has all of
    it."""
    mesh: MeshConfig | None = None
    """How devices share each pass, by `tensor` (heads) and `context` (tokens); by default all of them by heads, on
    a CPU by tokens."""
    batch_timeout_ms: float = pydantic.Field(default=2.0, ge=0)
    """How long an idle device waits for requests to share a pass."""
    max_queued_tokens: int = pydantic.Field(default=200_000, gt=0)
    """Tokens that may be queued or running; requests beyond them are told to come back."""
    max_candidates: int = pydantic.Field(default=1_000, gt=0)
    """Most items of a Score and of a ScoreStream."""
    max_stream_candidates: int = pydantic.Field(default=50_000, gt=0)
    """See `max_candidates`."""
    max_candidate_tokens: int = pydantic.Field(default=1_024, gt=0)
    """Most tokens of one item."""
    max_events: int = pydantic.Field(default=10_000, gt=0)
    """Most events of a history."""
    max_request_bytes: int = pydantic.Field(default=8_000_000, gt=0)
    """Most bytes of a request."""
    max_concurrent_requests: int = pydantic.Field(default=256, gt=0)
    """Most requests at a time."""
    timeout_seconds: float = pydantic.Field(default=60.0, gt=0)
    """Seconds for requests that come without a deadline."""
    connections: int = pydantic.Field(default=512, gt=0)
    """Most connections to each port. Where they are all in use, HTTP closes the one that is idle for longest, and
    gRPC refuses the next."""
    header_seconds: float = pydantic.Field(default=10.0, gt=0)
    """How long a request's head and its body may take to arrive."""
    body_seconds: float = pydantic.Field(default=30.0, gt=0)
    """See `header_seconds`."""
    keep_alive_seconds: float = pydantic.Field(default=620.0, gt=0)
    """How long an idle connection stays open. Longer than a balancer's own limit, or the balancer sends requests
    into connections that are being closed (and answers 502): 60 s of AWS, 600 of Google."""
    lame_duck_seconds: float = pydantic.Field(default=5.0, ge=0)
    """After SIGTERM, how long readiness fails and requests are still answered, for balancers to notice; SIGINT
    leaves it out."""
    drain_seconds: float = pydantic.Field(default=30.0, gt=0)
    """How long what runs may take to finish after that."""
    decode: bool | None = None
    """Serve JetStream's Decode too, which generates text; by default where google-jetstream is installed."""
    generation: DecodeConfig = DecodeConfig()
    """How it does."""

    @pydantic.model_validator(mode="after")
    def _consistent(self) -> ServeConfig:
        if any(length % (2 * PAGE) or length <= 0 for length in self.token_buckets):
            raise ValueError(f"token_buckets {self.token_buckets}: lengths are multiples of {2 * PAGE}")
        if self.max_candidate_tokens > max(self.token_buckets):
            raise ValueError(
                f"max_candidate_tokens {self.max_candidate_tokens} is over the longest of token_buckets {self.token_buckets}"
            )
        if (self.tls_cert is None) != (self.tls_key is None):
            raise ValueError("give both tls_cert and tls_key, or neither")
        if not _loopback(self.host):
            missing = [
                f"{files} (or {instead})"
                for files, instead, enough in (
                    ("tls_cert and tls_key", "plaintext: true", self.tls_cert or self.plaintext),
                    ("token_file", "anonymous: true", self.token_file or self.anonymous),
                )
                if not enough
            ]
            if missing:
                raise ValueError(f"host {self.host} can be reached from other machines: give {', '.join(missing)}")
        return self


def _loopback(host: str) -> bool:
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False
