"""The server process: gRPC and HTTP on one event loop, a thread that scores, reload and graceful stop."""

from __future__ import annotations

import asyncio
import contextlib
import importlib.util
import logging
import math
import signal
import socket
import sys
import threading
import time
from pathlib import Path
from typing import TYPE_CHECKING

import grpc
import jax
import jax.numpy as jnp
from grpc_health.v1 import health, health_pb2_grpc
from grpc_reflection.v1alpha import reflection
from jax.sharding import Mesh
from pythonjsonlogger.json import JsonFormatter

from brewjax.bundle.bundle import Bundle
from brewjax.config import ConfigError
from brewjax.data.tasks.task import Task
from brewjax.fingerprint import hash_folder
from brewjax.model.sharding import MeshConfig
from brewjax.scoring.passes import PAGE, Bucket
from brewjax.scoring.prefix_cache import PrefixCache
from brewjax.scoring.scheduler import Scheduler
from brewjax.scoring.scorer import Scorer
from brewjax.serve import ranker_pb2 as pb
from brewjax.serve import ranker_pb2_grpc, retriever_pb2_grpc
from brewjax.serve.catalogue import Catalogue
from brewjax.serve.config import ServeConfig
from brewjax.serve.connections import WILDCARDS, HttpServer, listen
from brewjax.serve.credentials import Credentials
from brewjax.serve.health import Health
from brewjax.serve.http import make_app
from brewjax.serve.live import LiveCatalogues
from brewjax.serve.refusals import ForbiddenError, Refusals
from brewjax.serve.retrieval import Retrieval
from brewjax.serve.rpc import RANKER, RETRIEVER, Door, Ranker, Retriever, channel_options
from brewjax.serve.scoring_loop import ScoringLoop
from brewjax.serve.service import Service
from brewjax.serve.store import StoreError, open_store
from brewjax.serve.telemetry import Metrics
from brewjax.serve.tracing import trace_to_collector

if TYPE_CHECKING:
    from brewjax.serve.jetstream import Decoding

log = logging.getLogger(__name__)
LIVENESS, READINESS, STARTUP = "liveness", "readiness", "startup"  # names of the probes in gRPC's health service


class Server:
    """Serves a model folder. Construction loads the model and compiles every shape, which takes seconds to minutes.

    Args:
      folder: of the model.
      config: addresses, credentials and limits.

    Raises:
      ConfigError: for a setting that cannot be used, such as a port that is taken.
      ValueError: for a folder that is not a model's.

    Attributes:
      port, http_port: where the server listens after `start`.
    """

    def __init__(self, folder: Path, config: ServeConfig):
        self.folder, self.config = folder, config
        self._credentials = Credentials(config)
        _check_ports(config)
        axis = "context" if jax.default_backend() == "cpu" else "tensor"
        self._mesh = config.mesh or MeshConfig.model_validate({axis: jax.device_count()})
        bundle = Bundle.load(folder, self._mesh)
        task_files = config.by_surface("tasks", bundle)
        tasks = {surface: [Task.load(path) for path in paths] for surface, paths in task_files.items()}
        buckets, pages = _plan_memory(bundle, config)
        self._metrics = metrics = Metrics()
        try:
            self._store = open_store(config.changes) if config.changes else None
            catalogues = self._read_catalogues(bundle)
        except StoreError as error:
            raise config.error(f"{error}", "changes") from None
        scorer = Scorer(
            bundle.model, bundle.params, bundle.tokenizer, bundle.prompts.layout, buckets, self._mesh.build(), pages
        )
        scorer.warm_up()
        costs = scorer.profile_buckets()
        metrics.compilations.set(scorer.compilations())
        scheduler = Scheduler(costs, PrefixCache(pages))
        device = threading.Lock()
        batch_timeout = config.batch_timeout_ms / 1000
        scoring_loop = ScoringLoop(scorer, scheduler, metrics, config.max_queued_tokens, batch_timeout, device)
        self._decoding = _make_decoding(bundle, config, self._mesh.build(), device)
        version = hash_folder(folder)[:8]
        self.service = Service(bundle, version, tasks, scoring_loop, costs, config, metrics, catalogues)
        self.retrieval = Retrieval(config, self._mesh, device, self.service) if config.encoder else None
        self.port = self.http_port = 0
        self._http: HttpServer | None = None
        self._refusals = Refusals(metrics)
        self._reloading = asyncio.Lock()

    async def start(self) -> None:
        """Starts to listen on both ports.

        Raises:
          OSError: a port is taken.
        """
        config = self.config
        tracing, self._trace_http = trace_to_collector()
        self._door = Door(self._credentials, config, self.service.metrics, self._refusals)
        self._rpc = grpc.aio.server(interceptors=[*tracing, self._door], options=channel_options(config))
        ranker_pb2_grpc.add_RankerServicer_to_server(Ranker(self.service, self.reload), self._rpc)
        self._health = Health()
        health_pb2_grpc.add_HealthServicer_to_server(self._health, self._rpc)
        services = [RANKER, health.SERVICE_NAME, reflection.SERVICE_NAME]
        if self.retrieval:
            retriever_pb2_grpc.add_RetrieverServicer_to_server(Retriever(self.current_retrieval), self._rpc)
            services.append(RETRIEVER)
        if self._decoding:
            self._decoding.add_to(self._rpc)
            services.append(self._decoding.service)
        reflection.enable_server_reflection(services, self._rpc)
        try:
            self.port = self._add_port()
            http_sockets = [] if config.http_port is None else listen(config.host, config.http_port)
        except (OSError, RuntimeError) as error:
            raise OSError(f"port {config.port} or http_port {config.http_port} of {config.host}: {error}") from None
        self.service.scoring_loop.start()
        self.service.catalogues.start()
        await self._rpc.start()
        if http_sockets:
            await self._start_http(http_sockets)
        self._reporting_health = asyncio.create_task(self._report_health())
        log.info("ready", extra={"model": self.service.model, "port": self.port, "http_port": self.http_port})

    def _add_port(self) -> int:
        """Makes gRPC listen at every address of the host; returns the port."""
        host = "::" if self.config.host in WILDCARDS else self.config.host
        address = f"[{host}]:{self.config.port}" if ":" in host else f"{host}:{self.config.port}"
        if credentials := self._credentials.for_grpc():
            return self._rpc.add_secure_port(address, credentials)
        return self._rpc.add_insecure_port(address)

    async def _start_http(self, sockets: list[socket.socket]) -> None:
        self.http_port = sockets[0].getsockname()[1]
        retrieval = self.current_retrieval if self.retrieval else None
        app = make_app(self.service, self._credentials, self._refusals, self.reload, retrieval)
        self._trace_http(app)
        self._http = HttpServer(app, self.config, self._credentials.ssl_context, self.service.metrics, self._refusals)
        self._http_task = asyncio.create_task(self._http.serve(sockets))
        while not self._http.started:
            await asyncio.sleep(0.01)

    async def _report_health(self) -> None:
        """Keeps gRPC's health service at what the HTTP probes answer, by the names of the probes."""
        while True:
            ready = self.service.ready
            states = {"": ready, RANKER: ready, READINESS: ready, LIVENESS: self.service.live, STARTUP: True}
            for name, serving in states.items():
                await self._health.set(name, serving)
            await asyncio.sleep(0.2)

    def read_credentials(self) -> None:
        """Loads tokens and certificate again.

        Raises ConfigError, naming the file, for one that cannot be used; the old ones stay in use.
        """
        self._credentials.read_again()
        log.info("tokens and certificate loaded")

    async def reload(self, request: pb.ReloadRequest) -> pb.ReloadResponse:
        """Serves another checkpoint of the same shape, and another encoder with its index, from one moment on.

        What requests began with answers them to their end.

        Args:
          request: names the folders; an empty name is that of the folder that the server started with.

        Returns:
          the names and versions of what is served.

        Raises:
          ForbiddenError: for a folder that is not below `reload_below`.
          StoreError: the store of changes cannot be read.
          ValueError: for a folder that cannot be read or does not fit. All that was served stays in use.
        """
        path = self._check_folder(request.folder, str(self.folder), "folder") or ""
        encoder = self._check_folder(request.encoder, self.config.encoder, "encoder")
        index = self._check_folder(request.index, self.config.index, "index")
        async with self._reloading:
            before = self.retrieval
            try:
                bundle = await asyncio.to_thread(self._read, path)
                catalogues = await asyncio.to_thread(self._read_catalogues, bundle)
                version = await asyncio.to_thread(hash_folder, Path(path))
                prepared = await asyncio.to_thread(self.service.prepare, bundle, version[:8], catalogues)
                retrieval = before and await asyncio.to_thread(before.reopen, encoder, index)
            except (ValueError, StoreError):
                self.service.metrics.reloads.labels("refused").inc()
                raise
            old_catalogues = self.service.catalogues
            # No `await` between these lines: no request may meet the new ranker and the old encoder.
            loaded = self.service.swap(prepared)
            self.retrieval = retrieval
            if before and retrieval is not before:
                before.successor = retrieval
            catalogues.start()
            await asyncio.shield(asyncio.wrap_future(loaded))
            await asyncio.to_thread(old_catalogues.stop)
            if self._decoding:
                await asyncio.to_thread(self._decoding.load, bundle.params)
            if before and retrieval is not before:
                await before.retire()
        self.service.metrics.reloads.labels("loaded").inc()
        response = pb.ReloadResponse(model=self.service.model, encoder=retrieval.model if retrieval else "")
        log.info("reloaded", extra={"model": response.model, "folder": path, "encoder": response.encoder})
        return response

    def _check_folder(self, folder: str, started_with: str | None, field: str) -> str | None:
        """The folder that a caller names, with links resolved. Raises ForbiddenError outside of `reload_below`."""
        if not folder:
            return started_with
        if started_with is None:
            raise ValueError(f"{field}: this server was started without one")
        path, below = Path(folder).resolve(), self.config.reload_below
        if path != Path(started_with).resolve() and not (below and path.is_relative_to(Path(below).resolve())):
            raise ForbiddenError(f"{field}: not below {below}" if below else f"{field}: the server has no reload_below")
        return str(path)

    def current_retrieval(self) -> Retrieval:
        """The encoder and index of the next request, where there is an encoder."""
        assert self.retrieval
        return self.retrieval

    def _read(self, path: str) -> Bundle:
        try:
            return Bundle.load(path, self._mesh)
        except Exception as error:  # a broken checkpoint can raise any of many
            raise ValueError(f"{path} cannot be read: {error}") from error

    def _read_catalogues(self, bundle: Bundle) -> LiveCatalogues:
        folders = self.config.by_surface("catalogue", bundle)
        catalogues = {name: Catalogue.load(folder, bundle.surface(name)) for name, folder in folders.items()}
        return LiveCatalogues(bundle, catalogues, self._store, self.config.refresh_seconds, self._metrics)

    async def stop(self, hurry: asyncio.Event | None = None) -> bool:
        """Stops gracefully.

        Readiness fails at once, while requests are still answered for `lame_duck_seconds`, so that balancers send
        callers elsewhere; HTTP connections are closed with their answers. Then no request is accepted, and those in
        progress have `drain_seconds` to finish.

        Args:
          hurry: ends the lame-duck time when it is set.

        Returns:
          False if requests in progress took longer than `drain_seconds`.
        """
        log.info("lame duck")
        self.service.lame_duck = True
        if self._decoding:
            self._decoding.lame_duck = True
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for((hurry or asyncio.Event()).wait(), self.config.lame_duck_seconds)
        log.info("draining")
        start_time, limit = time.monotonic(), self.config.drain_seconds
        self._reporting_health.cancel()
        await self._health.drain()
        self._door.closing.set()
        draining = [self._rpc.stop(limit), self._stop_http(limit)]
        if self._decoding:
            draining.append(self._decoding.drain(limit))
        await asyncio.gather(*draining)
        remaining = max(0.1, limit - (time.monotonic() - start_time))
        finished = await asyncio.to_thread(self.service.scoring_loop.stop, remaining)
        if self.retrieval:
            await self.retrieval.close()
        await asyncio.to_thread(self.service.catalogues.stop)
        if self._store:
            self._store.close()
        log.info("stopped", extra={"finished": finished})
        return finished

    async def _stop_http(self, limit: float) -> None:
        if self._http is not None:
            self._http.should_exit = True
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._http_task, limit)


async def serve(folder: Path, config: ServeConfig) -> bool:
    """Serves until SIGTERM or SIGINT; SIGINT, or a second signal, skips the lame-duck time.

    SIGHUP loads the tokens and the certificate again, then model, encoder and index, all from their folders.

    Args:
      folder: of the model.
      config: ports, limits and what else a server is given.

    Returns:
      True if all requests finished.
    """
    sys.setswitchinterval(0.001)  # seconds; threads that encode and score yield to the event loop five times sooner
    server = Server(folder, config)
    await server.start()
    stop, hurry = asyncio.Event(), asyncio.Event()
    loop = asyncio.get_running_loop()
    reloads: set[asyncio.Task] = set()  # a loop holds its tasks only weakly

    async def reload() -> None:
        try:
            server.read_credentials()
        except ConfigError as error:
            log.error("tokens and certificate refused: %s", error)
        try:
            await server.reload(pb.ReloadRequest())
        except (ValueError, StoreError) as error:
            log.error("reload refused: %s", error)

    def on_signal(signal_number: int) -> None:
        if stop.is_set() or signal_number == signal.SIGINT:
            hurry.set()
        stop.set()

    for signal_number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(signal_number, on_signal, signal_number)
    loop.add_signal_handler(signal.SIGHUP, lambda: reloads.add(asyncio.create_task(reload())))
    await stop.wait()
    return await server.stop(hurry)


def log_as_json() -> None:
    """Logs to stderr, one JSON object per line."""
    handler = logging.StreamHandler()
    handler.setFormatter(
        JsonFormatter(
            "%(asctime)s %(levelname)s %(name)s %(message)s",
            rename_fields={"asctime": "time", "levelname": "level", "name": "logger"},
        )
    )
    logging.basicConfig(level=logging.INFO, handlers=[handler], force=True)
    logging.getLogger("absl").setLevel(logging.WARNING)


def _check_ports(config: ServeConfig) -> None:
    """Raises ConfigError for a port that is taken, before the model is compiled."""
    for key in ("port", "http_port"):
        try:
            if port := getattr(config, key):
                for listening in listen(config.host, port):
                    listening.close()
        except OSError as error:
            raise config.error(f"cannot listen at {config.host}:{port}: {error.strerror}", key) from None


def _plan_memory(bundle: Bundle, config: ServeConfig) -> tuple[list[Bucket], int]:
    """The shapes to compile, and the number of pages of the prefix cache.

    Raises ConfigError for a cache that cannot hold one prefix.
    """
    model = bundle.model
    prefix_pages = math.ceil((config.max_prefix_tokens or bundle.prompts.max_tokens) / PAGE)
    page_bytes = 2 * PAGE * model.layers * model.kv_heads * model.head_dim * jnp.dtype(model.compute_dtype).itemsize
    pages = int(config.prefix_cache_gb * 1e9 / page_bytes)
    if pages <= prefix_pages:
        raise config.error(
            f"{config.prefix_cache_gb} GB hold {pages * PAGE:,} tokens of this model, and one prefix may have "
            f"{prefix_pages * PAGE:,}: give {math.ceil((prefix_pages + 1) * page_bytes / 1e7) / 100} or more",
            "prefix_cache_gb",
        )
    max_pages = max(prefix_pages, max(config.token_buckets) // PAGE)
    # A pass reads as many pages as its shape has, needed or not, which costs time on a CPU: hence a smaller shape too.
    page_counts = (0, math.ceil(max_pages / 4), max_pages)
    return [Bucket(tokens, count) for tokens in config.token_buckets for count in page_counts], pages


def _make_decoding(bundle: Bundle, config: ServeConfig, mesh: Mesh, device: threading.Lock) -> Decoding | None:
    """JetStream's Decode, compiled; None if `decode` turns it off, or is unset and google-jetstream is missing."""
    if config.decode is None and importlib.util.find_spec("jetstream") is None:
        log.info("no Decode: google-jetstream is not installed")
        return None
    if config.decode is False:
        return None
    from brewjax.serve.jetstream import Decoding

    return Decoding(bundle, config.generation, mesh, device, config.special_tokens)
