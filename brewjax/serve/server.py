"""One process that serves a model: gRPC and HTTP on one event loop, a thread that scores, and a way to stop."""

from __future__ import annotations

import asyncio
import contextlib
import importlib.util
import logging
import math
import signal
import socket
import ssl
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import grpc
import jax
import jax.numpy as jnp
import uvicorn
from grpc_health.v1 import health, health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection
from jax.sharding import Mesh
from pythonjsonlogger.json import JsonFormatter

from brewjax.data.task import Task
from brewjax.fingerprints import hash_folder
from brewjax.model.sharding import MeshConfig
from brewjax.scoring.batcher import Batcher
from brewjax.scoring.bundle import Bundle
from brewjax.scoring.passes import PAGE, Bucket
from brewjax.scoring.prefix_cache import PrefixCache
from brewjax.scoring.scorer import Scorer
from brewjax.serve import ranker_pb2_grpc
from brewjax.serve.config import ServeConfig
from brewjax.serve.http import make_app
from brewjax.serve.metrics import Metrics
from brewjax.serve.rpc import RANKER, BearerToken, Ranker, Readable
from brewjax.serve.service import Service
from brewjax.serve.tracing import trace_to_collector
from brewjax.serve.worker import Worker

if TYPE_CHECKING:
    from brewjax.serve.jetstream import Decoding

log = logging.getLogger(__name__)


class Server:
    """A model folder, served.

    After `start`, `port` and `http_port` say where; `stop` drains.
    """

    def __init__(self, folder: Path, config: ServeConfig):
        self.folder, self.config = folder, config
        self._token, self._tls = _secrets(config)
        _check_ports(config)
        tasks = [Task.load(path) for path in config.tasks]
        share = "context" if jax.default_backend() == "cpu" else "tensor"
        self._mesh = config.mesh or MeshConfig.model_validate({share: jax.device_count()})
        bundle = Bundle.load(folder, self._mesh)
        buckets, pages = _memory(bundle, config)
        metrics = Metrics()
        scorer = Scorer(
            bundle.model, bundle.params, bundle.tokenizer, bundle.prompts.layout, buckets, self._mesh.build(), pages
        )
        scorer.warm_up()
        costs = scorer.measure()
        metrics.compilations.set(scorer.compilations())
        batcher = Batcher(costs, PrefixCache(pages))
        device = threading.Lock()
        worker = Worker(scorer, batcher, metrics, config.waiting_tokens, config.max_wait_ms / 1000, device)
        self._decoding = _decoding(bundle, config, self._mesh.build(), device)
        self.service = Service(bundle, hash_folder(folder)[:8], tasks, worker, costs, config, metrics)
        self.port = self.http_port = 0
        self._http: _Uvicorn | None = None
        self._reloading = asyncio.Lock()

    async def start(self) -> None:
        """Listens; OSError where a port is taken."""
        config = self.config
        host = f"[{config.host}]" if ":" in config.host else config.host
        traced, self._trace_http = trace_to_collector()
        self._rpc = grpc.aio.server(
            interceptors=[*traced, *([BearerToken(self._token)] if self._token else []), Readable()],
            options=[
                # Larger ones are refused with a clear code by the service, much larger ones by gRPC.
                ("grpc.max_receive_message_length", 4 * config.request_bytes),
                ("grpc.max_concurrent_streams", 2 * config.streams),
                ("grpc.so_reuseport", 0),
            ],
        )
        ranker_pb2_grpc.add_RankerServicer_to_server(Ranker(self.service, self.reload), self._rpc)
        self._health = health.aio.HealthServicer()
        health_pb2_grpc.add_HealthServicer_to_server(self._health, self._rpc)
        services = [RANKER, health.SERVICE_NAME, reflection.SERVICE_NAME]
        if self._decoding:
            self._decoding.add_to(self._rpc)
            services.append(self._decoding.service)
        reflection.enable_server_reflection(services, self._rpc)
        address = f"{host}:{config.port}"
        try:
            if self._tls:
                self.port = self._rpc.add_secure_port(address, grpc.ssl_server_credentials([self._tls]))
            else:
                self.port = self._rpc.add_insecure_port(address)
            http = None if config.http_port is None else _listen(config.host, config.http_port)
        except (OSError, RuntimeError) as error:
            raise OSError(f"port {config.port} or http_port {config.http_port} of {config.host}: {error}") from None
        self.service.worker.start()
        await self._rpc.start()
        if http is not None:
            await self._start_http(http)
        self._telling = asyncio.create_task(self._tell_health())
        log.info("ready", extra={"model": self.service.model, "port": self.port, "http_port": self.http_port})

    async def _start_http(self, listening: socket.socket) -> None:
        config = self.config
        # asyncio leaves this out for a socket of ours, and answers then wait 40 ms for the caller to acknowledge.
        listening.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self.http_port = listening.getsockname()[1]
        app = make_app(self.service, self._token)
        self._trace_http(app)
        settings = uvicorn.Config(
            app,
            log_config=None,
            access_log=False,
            lifespan="off",
            ssl_certfile=config.tls_cert,
            ssl_keyfile=config.tls_key,
        )
        self._http = _Uvicorn(settings)
        self._http_task = asyncio.create_task(self._http.serve([listening]))
        while not self._http.started:
            await asyncio.sleep(0.01)

    async def _tell_health(self) -> None:
        """To those who ask in gRPC's way: what /health says."""
        told = None
        while True:
            if (ready := self.service.ready) != told:
                told, state = ready, health_pb2.HealthCheckResponse
                for name in ("", RANKER):
                    await self._health.set(name, state.SERVING if ready else state.NOT_SERVING)
            await asyncio.sleep(0.2)

    async def reload(self, folder: str) -> str:
        """Serves another checkpoint of the same shape, and returns its name and version.

        Raises ValueError where it cannot be read or does not fit; the one before is served on.
        """
        path = Path(folder) if folder else self.folder
        async with self._reloading:
            try:
                bundle = await asyncio.to_thread(self._read, path)
                version = await asyncio.to_thread(hash_folder, path)
                await self.service.reload(bundle, version[:8])
                if self._decoding:
                    await asyncio.to_thread(self._decoding.load, bundle.params)
            except ValueError:
                self.service.metrics.reloads.labels("refused").inc()
                raise
        self.service.metrics.reloads.labels("taken up").inc()
        log.info("reloaded", extra={"model": self.service.model, "folder": str(path)})
        return self.service.model

    def _read(self, path: Path) -> Bundle:
        try:
            return Bundle.load(path, self._mesh)
        except Exception as error:  # of the many that a broken checkpoint can raise
            raise ValueError(f"{path} cannot be read: {error}") from error

    async def stop(self) -> bool:
        """Accepts no more, lets what runs finish; False where that took longer than `drain_seconds`."""
        log.info("draining")
        self.service.draining = True
        began, limit = time.monotonic(), self.config.drain_seconds
        self._telling.cancel()
        await self._health.enter_graceful_shutdown()
        draining = [self._rpc.stop(limit)] + ([self._decoding.drain(limit)] if self._decoding else [])
        await asyncio.gather(*draining)
        if self._http is not None:
            self._http.should_exit = True
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._http_task, max(1.0, limit - (time.monotonic() - began)))
        left = max(0.1, limit - (time.monotonic() - began))
        finished = await asyncio.to_thread(self.service.worker.stop, left)
        log.info("stopped", extra={"finished": finished})
        return finished


async def serve(folder: Path, config: ServeConfig) -> bool:
    """Serves until SIGTERM or SIGINT; SIGHUP reads the folder's checkpoint again. True where all requests finished."""
    server = Server(folder, config)
    await server.start()
    stop, loop = asyncio.Event(), asyncio.get_running_loop()
    reloads: set[asyncio.Task] = set()  # a loop holds its tasks only weakly

    async def reload() -> None:
        try:
            await server.reload("")
        except ValueError as error:
            log.error("reload refused: %s", error)

    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, stop.set)
    loop.add_signal_handler(signal.SIGHUP, lambda: reloads.add(asyncio.create_task(reload())))
    await stop.wait()
    return await server.stop()


def log_as_json() -> None:
    """Logs go to stderr, a JSON object a line."""
    handler = logging.StreamHandler()
    handler.setFormatter(
        JsonFormatter(
            "%(asctime)s %(levelname)s %(name)s %(message)s",
            rename_fields={"asctime": "time", "levelname": "level", "name": "logger"},
        )
    )
    logging.basicConfig(level=logging.INFO, handlers=[handler], force=True)
    logging.getLogger("absl").setLevel(logging.WARNING)


class _Uvicorn(uvicorn.Server):
    """Whose process is not its own: signals are not its business."""

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield


def _secrets(config: ServeConfig) -> tuple[str | None, tuple[bytes, bytes] | None]:
    """The bearer token, and private key and certificate; ConfigError names the file that is of no use."""
    token = tls = None
    key = "token_file"
    try:
        if config.token_file:
            token = Path(config.token_file).read_text().strip()
            if not (token and token.isascii() and token.isprintable()):
                raise ValueError(f"{config.token_file} holds no token: write one line of ASCII there")
        key = "tls_cert"
        if config.tls_cert and config.tls_key:
            ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER).load_cert_chain(config.tls_cert, config.tls_key)
            tls = Path(config.tls_key).read_bytes(), Path(config.tls_cert).read_bytes()
    except (OSError, ValueError) as error:
        raise config.error(f"{error}", key) from None
    return token, tls


def _check_ports(config: ServeConfig) -> None:
    """Raises ConfigError for a port that is taken: before the model is compiled, not after."""
    for key in ("port", "http_port"):
        try:
            if port := getattr(config, key):
                _listen(config.host, port).close()
        except OSError as error:
            raise config.error(f"cannot listen at {config.host}:{port}: {error.strerror}", key) from None


def _listen(host: str, port: int) -> socket.socket:
    return socket.create_server((host, port), family=socket.AF_INET6 if ":" in host else socket.AF_INET)


def _memory(bundle: Bundle, config: ServeConfig) -> tuple[list[Bucket], int]:
    """The shapes to compile, and how many pages the cache of prefixes has."""
    model = bundle.model
    context = math.ceil((config.context or bundle.prompts.max_tokens) / PAGE)
    bytes_in_page = 2 * PAGE * model.layers * model.kv_heads * model.head_dim * jnp.dtype(model.compute_dtype).itemsize
    pages = int(config.cache_gigabytes * 1e9 / bytes_in_page)
    if pages <= context:
        raise config.error(
            f"{config.cache_gigabytes} GB hold {pages * PAGE:,} tokens of this model, and one prefix may have "
            f"{context * PAGE:,}: give {math.ceil((context + 1) * bytes_in_page / 1e7) / 100} or more",
            "cache_gigabytes",
        )
    most = max(context, max(config.row_tokens) // PAGE)
    pasts = (0, math.ceil(most / 4), most)  # pages that are not needed are read all the same, which a CPU feels
    return [Bucket(tokens, past) for tokens in config.row_tokens for past in pasts], pages


def _decoding(bundle: Bundle, config: ServeConfig, mesh: Mesh, device: threading.Lock) -> Decoding | None:
    """JetStream's Decode, compiled, where it is asked for or can be."""
    if config.decode is None and importlib.util.find_spec("jetstream") is None:
        log.info("no Decode: google-jetstream is not installed")
        return None
    if config.decode is False:
        return None
    from brewjax.serve.jetstream import Decoding

    return Decoding(bundle, config.generation, mesh, device)
