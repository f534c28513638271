"""The path of a request, over gRPC or HTTP: check, encode, queue, answer, count."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import functools
import logging
import math
import os
import time
import uuid
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor

import grpc
import jax
import jax.numpy as jnp
import numpy as np
from opentelemetry import trace

from brewjax.bundle.bundle import Bundle
from brewjax.data.tables.card import Attribute
from brewjax.data.tables.facts import Fact
from brewjax.data.tasks.task import Task
from brewjax.model.params import num_parameters
from brewjax.scoring.passes import LABELS_IN_PASS, PAGE, Bucket
from brewjax.scoring.scorer import NormalizeOver
from brewjax.serve import ranker_pb2 as pb
from brewjax.serve.callers import current_caller
from brewjax.serve.catalogue import Catalogue
from brewjax.serve.config import ServeConfig
from brewjax.serve.encoding import MAX_LABELS, EncodedRequest, RequestEncoder
from brewjax.serve.live import LiveCatalogues
from brewjax.serve.refusals import MAX_ID, status_of
from brewjax.serve.scoring_loop import QueueFullError, ScoringLoop
from brewjax.serve.scoring_loop import Request as QueuedRequest
from brewjax.serve.telemetry import Metrics

log = logging.getLogger(__name__)
tracer = trace.get_tracer("brewjax.serve")
ChangeRequest = pb.UpsertItemsRequest | pb.UpsertMembersRequest | pb.RecordEventsRequest
LONG = 1 << 16  # bytes of a request that takes more than some 20 ms to encode


class Service:
    """A model, the loop that scores with it, and the limits of requests.

    Args:
      bundle: the served model.
      version: of the checkpoint, returned in responses.
      tasks: for member requests, in addition to the tasks that the model was trained on, by surface.
      scoring_loop: scores with the bundle's parameters.
      costs: seconds that a full pass of each bucket takes, for `describe`.
      config: limits of requests.
      metrics: are updated with every request.
      catalogues: know the members that requests name by `id`.

    Attributes:
      lame_duck: set while the server is about to stop: readiness fails, and requests are still answered.
    """

    def __init__(
        self,
        bundle: Bundle,
        version: str,
        tasks: Mapping[str, Sequence[Task]],
        scoring_loop: ScoringLoop,
        costs: dict[Bucket, float],
        config: ServeConfig,
        metrics: Metrics,
        catalogues: LiveCatalogues | None = None,
    ):
        self.scoring_loop, self.config, self.metrics = scoring_loop, config, metrics
        self._tasks = tasks
        self._max_prefix_tokens = config.max_prefix_tokens or bundle.prompts.max_tokens
        self._encoder = self._make_encoder(bundle, version, catalogues)
        metrics.model.info({"model": self.model})
        self._costs = costs
        # Tokenizers release Python's lock. Long requests have their own threads, so that short ones do not wait.
        self._threads = ThreadPoolExecutor(thread_name_prefix="encode")
        self._long_request_threads = ThreadPoolExecutor(max(1, (os.cpu_count() or 1) // 2), "encode long")
        self._num_requests: Counter[str] = Counter()  # in progress, by the caller's name
        self.lame_duck = False

    @property
    def model(self) -> str:
        """Name and version of the served model."""
        return self._encoder.model

    @property
    def catalogues(self) -> LiveCatalogues:
        """The catalogues that are served."""
        return self._encoder.catalogues

    def catalogue(self, member: pb.Member) -> Catalogue | None:
        """The catalogue that a member's id is of, if there is one. Raises ValueError if there is no such surface."""
        return self._encoder.catalogue(member)

    def task(self, member: pb.Member) -> Task:
        """The served task of a member. Raises ValueError if there is none of this name."""
        return self._encoder.task(member)

    @property
    def live(self) -> bool:
        """Liveness: whether the scoring thread runs. Without it the server can only be restarted."""
        return self.scoring_loop.alive

    @property
    def ready(self) -> bool:
        """Readiness: whether the server is not about to stop, and its last pass succeeded."""
        return not self.lame_duck and self.scoring_loop.healthy

    @contextlib.contextmanager
    def request_scope(self, method: str, request_id: str) -> Iterator[None]:
        """Context manager: counts, times, traces and logs a request of the current caller, as one of
        `max_concurrent_requests`.

        Args:
          method: its name in the .proto file.
          request_id: of the caller, or made for it.

        Yields:
          Nothing.

        Raises:
          QueueFullError: there are too many requests already, of this caller or of all.
        """
        start_time, code = time.monotonic(), grpc.StatusCode.OK
        caller, limit = current_caller.get(), self.config.max_concurrent_requests
        self._num_requests[caller.name] += 1
        with tracer.start_as_current_span(method, attributes={"brewjax.request_id": request_id}):
            try:
                if self._num_requests.total() > limit:
                    raise QueueFullError(1.0, f"{limit} requests are answered at a time")
                if self._num_requests[caller.name] > max(1, int(caller.share * limit)):
                    raise QueueFullError(1.0, f"caller '{caller.name}' has its share of {limit} requests")
                yield
            except BaseException as error:
                code = status_of(error)
                raise
            finally:
                self._num_requests[caller.name] -= 1
                seconds = time.monotonic() - start_time
                self.metrics.requests.labels(method, code.name, caller.name).inc()
                self.metrics.request_seconds.labels(method).observe(seconds)
                if code is grpc.StatusCode.OK:
                    fields = {"request_id": request_id, "method": method, "code": code.name}
                    log.info("answered", extra={**fields, "seconds": round(seconds, 4)})

    async def score(
        self, request: pb.ScoreRequest, seconds: float | None = None, catalogue: Catalogue | None = None
    ) -> pb.ScoreResponse:
        """Scores the items of a request.

        Args:
          request: a member or a raw prompt, with at most `max_candidates` items.
          seconds: until the caller's deadline; None without one.
          catalogue: that a member by id is read from; by default the surface's, as it is now.

        Raises:
          ValueError: naming the field and what is wrong with it.
          QueueFullError: if the queue is full.
          ClosedError: if the server stops.
          TimeoutError: if the deadline passes.
        """
        request_id = request.request_id or uuid.uuid4().hex
        with self.request_scope("Score", request_id):
            async with self._deadline(seconds) as deadline:
                encoded, parts = await self._encode(request, self.config.max_candidates, deadline, catalogue)
                probabilities = np.empty((len(encoded.prompt.questions), len(encoded.prompt.labels)), np.float32)

                def store(columns: np.ndarray, first: int, chunk: np.ndarray) -> None:
                    columns[first : first + len(chunk)] = chunk

                for start, part in zip(range(0, probabilities.shape[1], LABELS_IN_PASS), parts, strict=True):
                    part.on_scores = functools.partial(store, probabilities[:, start : start + LABELS_IN_PASS])
                self.scoring_loop.enqueue(*parts)
                with tracer.start_as_current_span("queue and pass"):  # cancelling the parts takes them out of the queue
                    num_cached, *_ = await asyncio.gather(*map(asyncio.wrap_future, parts))
            if len(parts) > 1 and request.normalize_over == pb.ScoreRequest.LABELS:
                probabilities /= probabilities.sum(axis=1, keepdims=True)
            return _response(request_id, encoded, 0, probabilities, num_cached, request.top_k)

    async def stream(
        self,
        request: pb.ScoreRequest,
        send: Callable[[pb.ScoreResponse], Awaitable[object]],
        seconds: float | None = None,
    ) -> None:
        """As `score` for up to `max_stream_candidates` items: sends a response for each pass.

        The deadline is that of the last response, so a caller who reads slowly does not hold its place for ever.

        Args:
          request: without `top_k`, and with at most `LABELS_IN_PASS` labels.
          send: takes each response when it is computed.
          seconds: until the caller's deadline; None without one.

        Raises:
          ValueError: as `score`; or `top_k` is given, or more labels.
        """
        request_id = request.request_id or uuid.uuid4().hex
        with self.request_scope("ScoreStream", request_id):
            if request.top_k:
                raise ValueError("top_k: not for ScoreStream, whose responses hold every item once")
            if (count := len(request.raw.labels) + len(request.raw.label_tokens)) > LABELS_IN_PASS:
                raise ValueError(f"raw.labels: {count:,} of them; give at most {LABELS_IN_PASS} to ScoreStream")
            async with self._deadline(seconds) as deadline:
                encoded, (queued,) = await self._encode(request, self.config.max_stream_candidates, deadline)
                loop = asyncio.get_running_loop()
                chunks: asyncio.Queue[tuple[int, np.ndarray] | None] = asyncio.Queue()

                def pass_on(first: int, probabilities: np.ndarray) -> None:
                    loop.call_soon_threadsafe(chunks.put_nowait, (first, probabilities))

                queued.on_scores = pass_on
                self.scoring_loop.enqueue(queued)
                queued.add_done_callback(lambda _: loop.call_soon_threadsafe(chunks.put_nowait, None))
                try:
                    while (chunk := await chunks.get()) is not None:
                        await send(_response(request_id, encoded, *chunk, queued.job.num_cached_tokens or 0))
                    queued.result()
                finally:
                    queued.cancel()

    async def change(self, request: ChangeRequest, seconds: float | None = None) -> pb.ChangeResponse:
        """Changes the catalogue of a surface.

        Args:
          request: the rows.
          seconds: until the caller's deadline; None without one.

        Returns:
          How many rows: they are in the store of changes.

        Raises:
          ValueError: naming the field and what is wrong with it.
          StoreError: the store cannot be written to.
          TimeoutError: the deadline passes; the store may have the rows.
        """
        request_id = request.request_id or uuid.uuid4().hex
        with self.request_scope(type(request).__name__.removesuffix("Request"), request_id[:MAX_ID]):
            async with self._deadline(seconds):
                if len(request.request_id) > MAX_ID:
                    raise ValueError(f"request_id: {len(request.request_id):,} characters; give at most {MAX_ID}")
                if (size := request.ByteSize()) > self.config.max_request_bytes:
                    limit = f"{self.config.max_request_bytes:,} are read (max_request_bytes)"
                    raise ValueError(f"the request: {size:,} bytes; at most {limit}")
                change = pb.Change.FromString(request.SerializeToString())  # whose fields have the same numbers
                rows = len(change.items) + len(change.members) + len(change.events)
                if not rows:
                    raise ValueError(f"{request.DESCRIPTOR.fields[-1].name}: none; give at least one")
                await self.catalogues.append(change)
            return pb.ChangeResponse(request_id=request_id, rows=rows)

    def describe(self) -> pb.DescribeResponse:
        """The model, its tasks, and the limits."""
        config, bundle = self.config, self._encoder.bundle

        def describe_attributes(
            attributes: Sequence[Attribute], facts: Sequence[Fact]
        ) -> list[pb.AttributeDescription]:
            columns = [
                pb.AttributeDescription(column=attribute.column, kind=attribute.kind) for attribute in attributes
            ]
            return columns + [pb.AttributeDescription(column=fact.name, kind="number") for fact in facts]

        return pb.DescribeResponse(
            model=self.model,
            parameters=num_parameters(bundle.params),
            tasks=[
                pb.TaskDescription(
                    surface=surface,
                    name=task.name,
                    instruction=task.instruction,
                    labels=task.words,
                    label_values=task.values,
                    history_actions=task.history.actions,
                    member_attributes=describe_attributes(card.members.attributes, card.facts.members),
                    event_attributes=describe_attributes(card.events.attributes, card.facts.events),
                    item_attributes=describe_attributes(card.items.attributes, (*card.facts.items, *card.facts.pairs)),
                )
                for surface, tasks in self._encoder.tasks.items()
                for card in [bundle.surfaces[surface].card]
                for task in tasks.values()
            ],
            limits=pb.Limits(
                max_candidates=config.max_candidates,
                max_stream_candidates=config.max_stream_candidates,
                max_prefix_tokens=self._max_prefix_tokens,
                max_candidate_tokens=config.max_candidate_tokens,
                max_labels=MAX_LABELS,
                max_request_bytes=config.max_request_bytes,
                max_queued_tokens=config.max_queued_tokens,
                max_concurrent_requests=config.max_concurrent_requests,
                max_events=config.max_events,
            ),
            shapes=[
                pb.Shape(tokens=bucket.tokens, cached_tokens=bucket.cached_pages * PAGE, seconds=seconds)
                for bucket, seconds in self._costs.items()
            ],
            compilations=self.scoring_loop.scorer.compilations(),
        )

    def prepare(self, bundle: Bundle, version: str, catalogues: LiveCatalogues) -> RequestEncoder:
        """Makes ready to serve other weights, and other catalogues, by `swap`.

        Raises ValueError for a bundle of another shape or tokenizer, or with weights that are not finite.
        """
        self._check(bundle)
        return self._make_encoder(bundle, version, catalogues)

    def swap(self, encoder: RequestEncoder) -> Future:
        """Serves what was prepared from the next request on; the future is done when its weights are in use."""
        loaded = self.scoring_loop.reload(encoder.bundle.params)
        # No `await` between these lines: every request of the new encoder must be queued behind the new weights.
        self._encoder = encoder
        self.metrics.model.info({"model": self.model})
        return loaded

    def _check(self, bundle: Bundle) -> None:
        """Raises ValueError for a bundle that the compiled programs cannot serve."""
        old = self._encoder.bundle
        if bundle.model.model_copy(update={"name": old.model.name}) != old.model:
            raise ValueError("the checkpoint's model has another shape; start a new server for it")
        if bundle.tokenizer.hf.backend_tokenizer.to_str() != old.tokenizer.hf.backend_tokenizer.to_str():
            raise ValueError("the checkpoint has another tokenizer; start a new server for it")
        check_finite(bundle)

    def _make_encoder(self, bundle: Bundle, version: str, catalogues: LiveCatalogues | None) -> RequestEncoder:
        model = f"{bundle.model.name}@{version}"
        return RequestEncoder(bundle, model, self._tasks, self.config, self._max_prefix_tokens, catalogues)

    @contextlib.asynccontextmanager
    async def _deadline(self, seconds: float | None) -> AsyncIterator[float]:
        """Raises TimeoutError at the caller's deadline or the server's; yields its time, as of `time.monotonic`."""
        limit = min(self.config.timeout_seconds, math.inf if seconds is None else seconds)
        try:
            async with asyncio.timeout(limit):
                yield time.monotonic() + limit
        except TimeoutError:
            raise TimeoutError(f"not answered within {limit:.3g} seconds") from None

    async def _encode(
        self, request: pb.ScoreRequest, max_items: int, deadline: float, catalogue: Catalogue | None = None
    ) -> tuple[EncodedRequest, list[QueuedRequest]]:
        """Encodes a request with the encoder that is in use when it is done; its parts have `LABELS_IN_PASS` labels.

        The caller enqueues them without an `await` in between, so that they are scored with the encoder's weights.
        """
        loop = asyncio.get_running_loop()
        caller = current_caller.get()
        threads = self._threads if request.ByteSize() <= LONG else self._long_request_threads

        def encode(encoder: RequestEncoder) -> tuple[EncodedRequest, list[QueuedRequest]]:
            encoded = encoder.encode(request, max_items, catalogue)
            labels = encoded.prompt.labels
            parts = [labels[start : start + LABELS_IN_PASS] for start in range(0, len(labels), LABELS_IN_PASS)]
            prompts = [dataclasses.replace(encoded.prompt, labels=part) for part in parts]
            over_vocabulary = len(parts) > 1 or request.normalize_over == pb.ScoreRequest.VOCABULARY
            over: NormalizeOver = "vocabulary" if over_vocabulary else "labels"
            return encoded, [self.scoring_loop.prepare(prompt, over, deadline, caller) for prompt in prompts]

        with tracer.start_as_current_span("encode"):
            while True:
                encoder = self._encoder
                prepared = await loop.run_in_executor(threads, encode, encoder)
                if encoder is self._encoder:
                    return prepared


def check_finite(bundle: Bundle) -> None:
    """Checks the weights of a checkpoint.

    Args:
      bundle: the checkpoint.

    Raises:
      ValueError: weights are not finite, and would make NaN of all that is computed with them.
    """
    finite = jax.tree.map(lambda leaf: bool(jnp.isfinite(leaf).all()), bundle.params)
    if not all(jax.tree.leaves(finite)):
        raise ValueError("the checkpoint has weights that are not finite")


def _response(
    request_id: str, encoded: EncodedRequest, first: int, probabilities: np.ndarray, num_cached: int, top_k: int = 0
) -> pb.ScoreResponse:
    """The response for the items from `first` on, given their probabilities [items, labels]; best first."""
    order = np.argsort(-(probabilities @ encoded.values), kind="stable")[: top_k or None]
    prompt = encoded.prompt
    return pb.ScoreResponse(
        request_id=request_id,
        labels=encoded.labels,
        scores=[
            pb.ItemScore(index=first + row, id=encoded.ids[first + row], probabilities=probabilities[row])
            for row in order
        ],
        usage=pb.Usage(
            prefix_tokens=prompt.prefix_length,
            cached_tokens=num_cached,
            item_tokens=sum(map(len, prompt.questions[first : first + len(probabilities)])),
            truncated_events=encoded.num_truncated_events,
            truncated_tokens=encoded.num_truncated_tokens,
        ),
        model=encoded.model,
    )
