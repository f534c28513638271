"""What a server is told when it starts."""

from __future__ import annotations

import ipaddress

import pydantic

from brewjax.config import Config, Seed
from brewjax.model.generate import SamplingParams
from brewjax.model.sharding import MeshConfig
from brewjax.scoring.passes import PAGE


class DecodeConfig(Config):
    """How text is generated for callers of Decode.

    Attributes:
      slots: texts that grow at once; each takes memory for the keys and values of `context` tokens.
      context: most tokens of a prompt and its text together.
      queue: requests that wait for a slot; those beyond are told to come back.
      seed: of the sampling.
    """

    slots: int = pydantic.Field(default=8, gt=0)
    context: int = pydantic.Field(default=2048, gt=1)
    queue: int = pydantic.Field(default=64, ge=0)
    sampling: SamplingParams = SamplingParams()
    seed: Seed = 0


class ServeConfig(Config):
    """Where a server listens, what it keeps in memory, and its limits.

    Attributes:
      host: a name or an address; `localhost` is both loopback addresses, `0.0.0.0` and `::` every address of IPv4 and
        IPv6.
      port, http_port: of gRPC, and of HTTP (null: none); 0 takes a free one.
      tls_cert, tls_key: PEM files; token_file: holds the bearer token that every caller must send. Both are needed
        to listen on any but a loopback address, unless `plaintext` or `anonymous` says otherwise. SIGHUP reads the
        files again.
      plaintext: other machines may connect without TLS: behind a sidecar that encrypts, or for a kubelet's gRPC probe.
      anonymous: other machines may call without a token: behind a sidecar that knows the callers.
      admin_token_file: holds the bearer token for Reload, which is refused where there is none; good for all else too.
      reload_below: the folder that holds the models which Reload may take up; by default only the one that is served.
      special_tokens: special tokens that callers write in raw texts (`<|im_start|>`) count as such; otherwise they are
        read as ordinary text.
      tasks: task files to answer beside those that the model was trained on.
      token_buckets: lengths of rows that passes are compiled for.
      max_prefix_tokens: most tokens of a prefix; by default as many as the model was trained to read.
      prefix_cache_gb: memory for the keys and values of prefixes; `tensor` splits it over devices, along `context` each
        has all of it.
      mesh: how devices share each pass, by `tensor` (heads) and `context` (tokens); by default all of them by heads, on
        a CPU by tokens.
      batch_timeout_ms: how long an idle device waits for requests to share a pass.
      max_queued_tokens: tokens that may be queued or running; requests beyond them are told to come back.
      max_candidates, max_stream_candidates: most items of a Score and of a ScoreStream.
      max_candidate_tokens: most tokens of one item.
      max_events: most events of a history.
      max_request_bytes: most bytes of a request.
      max_concurrent_requests: most requests at a time.
      timeout_seconds: seconds for requests that come without a deadline.
      connections: most connections to each port. Where they are all in use, HTTP closes the one that is idle for
        longest, and gRPC refuses the next.
      header_seconds, body_seconds: how long a request's head and its body may take to arrive.
      keep_alive_seconds: how long an idle connection stays open. Longer than a balancer's own limit, or the
        balancer sends requests into connections that are being closed (and answers 502): 60 s of AWS, 600 of Google.
      lame_duck_seconds: after SIGTERM, how long readiness fails and requests are still answered, for balancers to
        notice; SIGINT leaves it out.
      drain_seconds: how long what runs may take to finish after that.
      decode: serve JetStream's Decode too, which generates text; by default where google-jetstream is installed.
      generation: how it does.
    """

    host: str = "localhost"
    port: int = pydantic.Field(default=9000, ge=0, lt=65536)
    http_port: int | None = pydantic.Field(default=9001, ge=0, lt=65536)
    tls_cert: str | None = None
    tls_key: str | None = None
    token_file: str | None = None
    plaintext: bool = False
    anonymous: bool = False
    admin_token_file: str | None = None
    reload_below: str | None = None
    special_tokens: bool = False
    tasks: tuple[str, ...] = ()
    token_buckets: tuple[int, ...] = pydantic.Field(default=(256, 512, 1024, 2048, 4096), min_length=1)
    max_prefix_tokens: int | None = pydantic.Field(default=None, gt=0)
    prefix_cache_gb: float = pydantic.Field(default=1.0, gt=0)
    mesh: MeshConfig | None = None
    batch_timeout_ms: float = pydantic.Field(default=2.0, ge=0)
    max_queued_tokens: int = pydantic.Field(default=200_000, gt=0)
    max_candidates: int = pydantic.Field(default=1_000, gt=0)
    max_stream_candidates: int = pydantic.Field(default=50_000, gt=0)
    max_candidate_tokens: int = pydantic.Field(default=1_024, gt=0)
    max_events: int = pydantic.Field(default=10_000, gt=0)
    max_request_bytes: int = pydantic.Field(default=8_000_000, gt=0)
    max_concurrent_requests: int = pydantic.Field(default=256, gt=0)
    timeout_seconds: float = pydantic.Field(default=60.0, gt=0)
    connections: int = pydantic.Field(default=512, gt=0)
    header_seconds: float = pydantic.Field(default=10.0, gt=0)
    body_seconds: float = pydantic.Field(default=30.0, gt=0)
    keep_alive_seconds: float = pydantic.Field(default=620.0, gt=0)
    lame_duck_seconds: float = pydantic.Field(default=5.0, ge=0)
    drain_seconds: float = pydantic.Field(default=30.0, gt=0)
    decode: bool | None = None
    generation: DecodeConfig = DecodeConfig()

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
