"""What the server does with a request, whichever way it came: check, encode, queue, answer, count."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import math
import os
import time
import uuid
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor

import grpc
import jax
import jax.numpy as jnp
import numpy as np
from opentelemetry import trace

from brewjax.bundle.bundle import Bundle
from brewjax.data.tables.card import Attribute
from brewjax.data.tasks.task import Task
from brewjax.model.params import num_parameters
from brewjax.scoring.passes import LABELS_IN_PASS, PAGE, Bucket
from brewjax.scoring.scorer import NormalizeOver
from brewjax.serve import ranker_pb2 as pb
from brewjax.serve.config import ServeConfig
from brewjax.serve.encoding import EncodedRequest, RequestEncoder
from brewjax.serve.refusals import status_of
from brewjax.serve.scoring_loop import QueueFullError, ScoringLoop
from brewjax.serve.scoring_loop import Request as QueuedRequest
from brewjax.serve.telemetry import Metrics

log = logging.getLogger(__name__)
tracer = trace.get_tracer("brewjax.serve")
LONG = 1 << 16  # bytes of a request that takes more than some 20 ms to encode


class Service:
    """A model, the worker that scores with it, and the rules of who may ask what.

    Args:
      version: of the checkpoint, for answers to say which model they are from.
      tasks: what may be asked of members, beside what the model was trained on.
    """

    def __init__(
        self,
        bundle: Bundle,
        version: str,
        tasks: Sequence[Task],
        worker: ScoringLoop,
        costs: dict[Bucket, float],
        config: ServeConfig,
        metrics: Metrics,
    ):
        self.worker, self.config, self.metrics = worker, config, metrics
        self._tasks, self._context = tasks, config.max_prefix_tokens or bundle.prompts.max_tokens
        self._encoder = self._encodes(bundle, version)
        self._costs = costs
        # Tokenizers release Python's lock. Long requests have threads of their own: short ones do not wait for them.
        self._threads = ThreadPoolExecutor(thread_name_prefix="encode")
        self._threads_of_long = ThreadPoolExecutor(max(1, (os.cpu_count() or 1) // 2), "encode long")
        self._streams = 0
        self.lame_duck = False

    @property
    def model(self) -> str:
        """Name and version."""
        return self._encoder.model

    @property
    def live(self) -> bool:
        """Whether it can score again without being restarted: the thread that scores runs."""
        return self.worker.alive

    @property
    def ready(self) -> bool:
        """Whether callers should come: it is not about to stop, and the last pass did not fail."""
        return not self.lame_duck and self.worker.healthy

    @contextlib.contextmanager
    def request_scope(self, method: str, request_id: str) -> Iterator[None]:
        """Counts, times and traces what is done of a request, logs that it was answered, and takes its place among the
        streams.

        Raises QueueFullError where there is none.
        """
        start_time, code = time.monotonic(), grpc.StatusCode.OK
        self._streams += 1
        with tracer.start_as_current_span(method, attributes={"brewjax.request_id": request_id}):
            try:
                if self._streams > self.config.max_concurrent_requests:
                    raise QueueFullError(1.0, f"{self.config.max_concurrent_requests} requests are answered at a time")
                yield
            except BaseException as error:
                code = status_of(error)
                raise
            finally:
                self._streams -= 1
                seconds = time.monotonic() - start_time
                self.metrics.requests.labels(method, code.name).inc()
                self.metrics.request_seconds.labels(method).observe(seconds)
                if code is grpc.StatusCode.OK:
                    fields = {"request_id": request_id, "method": method, "code": code.name}
                    log.info("answered", extra={**fields, "seconds": round(seconds, 4)})

    async def score(self, request: pb.ScoreRequest, seconds: float | None = None) -> pb.ScoreResponse:
        """Scores a request's items; `seconds` are left until its deadline.

        Raises ValueError (the field, what is wrong with it), QueueFullError, ClosedError, TimeoutError.
        """
        request_id = request.request_id or uuid.uuid4().hex
        with self.request_scope("Score", request_id):
            async with self._deadline(seconds) as deadline:
                encoded, queued = await self._encode(request, self.config.max_candidates, deadline)
                probabilities = np.empty((len(encoded.prompt.questions), len(encoded.prompt.labels)), np.float32)

                def answer(first: int, found: np.ndarray) -> None:
                    probabilities[first : first + len(found)] = found

                queued.on_answers = answer
                self.worker.enqueue(queued)
                with tracer.start_as_current_span("queue and pass"):
                    cached = await asyncio.wrap_future(queued)  # cancelled, it takes the request out of the queue
            return _response(request_id, encoded, 0, probabilities, cached, request.top_k)

    async def stream(
        self,
        request: pb.ScoreRequest,
        send: Callable[[pb.ScoreResponse], Awaitable[object]],
        seconds: float | None = None,
    ) -> None:
        """As `score`, a response for each pass; `seconds` count until the last one is sent."""
        request_id = request.request_id or uuid.uuid4().hex
        with self.request_scope("ScoreStream", request_id):
            if request.top_k:
                raise ValueError("top_k: not for ScoreStream, whose responses hold every item once")
            async with self._deadline(seconds) as deadline:
                encoded, queued = await self._encode(request, self.config.max_stream_candidates, deadline)
                loop = asyncio.get_running_loop()
                found: asyncio.Queue[tuple[int, np.ndarray] | None] = asyncio.Queue()

                def answer(first: int, probabilities: np.ndarray) -> None:
                    loop.call_soon_threadsafe(found.put_nowait, (first, probabilities))

                queued.on_answers = answer
                self.worker.enqueue(queued)
                queued.add_done_callback(lambda _: loop.call_soon_threadsafe(found.put_nowait, None))
                try:
                    while (chunk := await found.get()) is not None:
                        await send(_response(request_id, encoded, *chunk, queued.job.num_cached_tokens or 0))
                    queued.result()
                finally:
                    queued.cancel()

    def describe(self) -> pb.DescribeResponse:
        """What is served, and its limits."""
        config, bundle = self.config, self._encoder.bundle
        card = bundle.card

        def attributes(those: Sequence[Attribute]) -> list[pb.AttributeDescription]:
            return [pb.AttributeDescription(column=attribute.column, kind=attribute.kind) for attribute in those]

        return pb.DescribeResponse(
            model=self.model,
            parameters=num_parameters(bundle.params),
            tasks=[
                pb.TaskDescription(
                    name=task.name,
                    instruction=task.instruction,
                    labels=task.words,
                    label_values=task.values,
                    history_actions=task.history.actions,
                    member_attributes=attributes(card.members.attributes),
                    event_attributes=attributes(card.events.attributes),
                    item_attributes=attributes(card.items.attributes),
                )
                for task in self._encoder.tasks.values()
                if card is not None
            ],
            limits=pb.Limits(
                max_candidates=config.max_candidates,
                max_stream_candidates=config.max_stream_candidates,
                max_prefix_tokens=self._context,
                max_candidate_tokens=config.max_candidate_tokens,
                max_labels=LABELS_IN_PASS,
                max_request_bytes=config.max_request_bytes,
                max_queued_tokens=config.max_queued_tokens,
                max_concurrent_requests=config.max_concurrent_requests,
                max_events=config.max_events,
            ),
            shapes=[
                pb.Shape(tokens=bucket.tokens, cached_tokens=bucket.cached_pages * PAGE, seconds=seconds)
                for bucket, seconds in self._costs.items()
            ],
            compilations=self.worker.scorer.compilations(),
        )

    async def reload(self, bundle: Bundle, version: str) -> None:
        """Other weights, from the next request on; ValueError where they do not fit what is compiled, or are broken."""
        await asyncio.to_thread(self._check, bundle)
        encoder = await asyncio.to_thread(self._encodes, bundle, version)
        taken_up = self.worker.reload(bundle.params)
        self._encoder = encoder  # without a pause since: what is queued behind the weights is what it encoded
        await asyncio.shield(asyncio.wrap_future(taken_up))

    def _check(self, bundle: Bundle) -> None:
        old = self._encoder.bundle
        if bundle.model.model_copy(update={"name": old.model.name}) != old.model:
            raise ValueError("the checkpoint's model has another shape; start a new server for it")
        if bundle.tokenizer.hf.backend_tokenizer.to_str() != old.tokenizer.hf.backend_tokenizer.to_str():
            raise ValueError("the checkpoint has another tokenizer; start a new server for it")
        finite = jax.tree.leaves(jax.tree.map(lambda leaf: bool(jnp.isfinite(leaf).all()), bundle.params))
        if not all(finite):
            raise ValueError("the checkpoint has weights that are not finite")

    def _encodes(self, bundle: Bundle, version: str) -> RequestEncoder:
        return RequestEncoder(bundle, f"{bundle.model.name}@{version}", self._tasks, self.config, self._context)

    @contextlib.asynccontextmanager
    async def _deadline(self, seconds: float | None) -> AsyncIterator[float]:
        """A limit of time: the caller's, or the server's; gives the moment when it ends, by `time.monotonic`."""
        limit = min(self.config.timeout_seconds, math.inf if seconds is None else seconds)
        try:
            async with asyncio.timeout(limit):
                yield time.monotonic() + limit
        except TimeoutError:
            raise TimeoutError(f"not answered within {limit:.3g} seconds") from None

    async def _encode(
        self, request: pb.ScoreRequest, max_items: int, deadline: float
    ) -> tuple[EncodedRequest, QueuedRequest]:
        """By the encoder that is in use when it is done: its caller enqueues the result without an `await` between."""
        loop = asyncio.get_running_loop()
        threads = self._threads if request.ByteSize() <= LONG else self._threads_of_long

        def encode(encoder: RequestEncoder) -> tuple[EncodedRequest, QueuedRequest]:
            encoded = encoder.encode(request, max_items)
            return encoded, self.worker.prepare(encoded.prompt, _against(request), deadline)

        with tracer.start_as_current_span("encode"):
            while True:
                encoder = self._encoder
                prepared = await loop.run_in_executor(threads, encode, encoder)
                if encoder is self._encoder:
                    return prepared


def _against(request: pb.ScoreRequest) -> NormalizeOver:
    return "vocabulary" if request.normalize_over == pb.ScoreRequest.VOCABULARY else "labels"


def _response(
    request_id: str, encoded: EncodedRequest, first: int, found: np.ndarray, cached: int, top_k: int = 0
) -> pb.ScoreResponse:
    order = np.argsort(-(found @ encoded.values), kind="stable")[: top_k or None]
    prompt = encoded.prompt
    return pb.ScoreResponse(
        request_id=request_id,
        labels=encoded.labels,
        scores=[
            pb.ItemScore(index=first + row, id=encoded.ids[first + row], probabilities=found[row]) for row in order
        ],
        usage=pb.Usage(
            prefix_tokens=prompt.prefix_length,
            cached_tokens=cached,
            item_tokens=sum(map(len, prompt.questions[first : first + len(found)])),
            truncated_events=encoded.num_truncated_events,
            truncated_tokens=encoded.num_truncated_tokens,
        ),
        model=encoded.model,
    )
