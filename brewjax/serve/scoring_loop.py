"""The thread that scores: it takes requests from a bounded queue, runs passes on the device and resolves futures."""

from __future__ import annotations

import contextlib
import dataclasses
import gc
import logging
import math
import threading
import time
from collections import Counter, deque
from collections.abc import Callable
from concurrent.futures import Future, InvalidStateError
from typing import Any

import numpy as np

from brewjax.data.text.encode import EncodedPrompt
from brewjax.model.params import Params
from brewjax.scoring.passes import Chunk, Pass
from brewjax.scoring.scheduler import Job, Scheduler
from brewjax.scoring.scorer import InFlight, NormalizeOver, Scorer, normalize_over_labels
from brewjax.serve.callers import UNNAMED, Caller
from brewjax.serve.telemetry import Metrics

log = logging.getLogger(__name__)
BUSY_FOR = 60.0  # seconds without an idle moment after which old garbage is collected all the same
PROBE_EVERY = 1.0  # seconds between probes of the device after a pass failed

OnScores = Callable[[int, np.ndarray], None]  # index of the first question, float32 probabilities [questions, labels]


class QueueFullError(RuntimeError):
    """The request was not queued.

    Attributes:
      retry_after: seconds until there may be room.
    """

    def __init__(self, retry_after: float, reason: str = "the queue is full"):
        super().__init__(f"{reason}; try again in {retry_after:.1f} s")
        self.retry_after = retry_after


class ClosedError(RuntimeError):
    """The loop takes no more requests: the caller has to go to another server."""

    def __init__(self) -> None:
        super().__init__("the server stops, or cannot score any more")


class Request(Future):
    """A job in the queue, and the future of its completion. The result is how many prefix tokens were cached.

    `cancel` takes it out of the queue. It fails with TimeoutError if its deadline passes first.

    Attributes:
      deadline: as of `time.monotonic`.
      caller: who sent it.
      on_scores: called from the loop's thread with each chunk of scores, before the request is done.
      num_tokens: tokens of rows that it counts for in the queue.
      arrival_time, start_time: as of `time.monotonic`; `start_time` is 0 before its first pass.
    """

    def __init__(self, prompt: EncodedPrompt, normalize_over: NormalizeOver, deadline: float, caller: Caller = UNNAMED):
        super().__init__()
        self.job, self.deadline, self.caller = Job(prompt, normalize_over, self, caller.priority), deadline, caller
        self.on_scores: OnScores = lambda first, probabilities: None
        self.num_tokens = self.job.remaining_tokens()
        self.arrival_time = time.monotonic()
        self.start_time = 0.0


@dataclasses.dataclass(frozen=True)
class _Reload:
    """New weights, at their place in the queue: earlier requests are scored with the old ones, later with these."""

    params: Params
    done: Future


class ScoringLoop:
    """Runs passes for as long as the server lives.

    Args:
      scorer: with a prefix cache, warmed up.
      scheduler: of the scorer's buckets and pages.
      metrics: are updated after every pass.
      max_queued_tokens: tokens of rows that may be queued or running; more are refused with QueueFullError.
      batch_timeout: seconds that an idle device waits for a pass to fill up.
      device: held while a pass is dispatched, because programs of two threads must reach all devices in one order.
    """

    def __init__(
        self,
        scorer: Scorer,
        scheduler: Scheduler,
        metrics: Metrics,
        max_queued_tokens: int,
        batch_timeout: float = 0.002,
        device: threading.Lock | None = None,
    ):
        self.scorer, self._scheduler, self._metrics = scorer, scheduler, metrics
        self._max_queued_tokens, self._batch_timeout = max_queued_tokens, batch_timeout
        self._full = max(bucket.tokens for bucket in scorer.buckets)
        self._changed = threading.Condition()  # a reentrant lock: `cancel` calls back while it is held
        self._inbox: deque[Request | _Reload] = deque()
        self._running: tuple[InFlight, float] | None = None
        self._queued_tokens: Counter[str] = Counter()  # of the requests that are not done, by the caller's name
        self._tokens_per_second = 1e4  # moving average
        self._stopping = self._paused_gc = False
        self._passes_work = True  # whether the last one succeeded
        self._collect_old_at = 0.0
        self._device = device or threading.Lock()
        self._thread = threading.Thread(target=self._run, name="scoring", daemon=True)

    @property
    def healthy(self) -> bool:
        """Whether the last pass succeeded and the thread runs."""
        return self._passes_work and self.alive

    @property
    def alive(self) -> bool:
        """Whether the thread runs."""
        return self._thread.is_alive()

    def start(self) -> None:
        """Starts the thread. Until `stop`, the garbage collector runs between passes only, and skips older objects."""
        self._paused_gc = gc.isenabled()
        gc.collect()
        gc.freeze()
        gc.disable()
        self._thread.start()

    def submit(
        self,
        prompt: EncodedPrompt,
        normalize_over: NormalizeOver = "labels",
        deadline: float = math.inf,
        on_scores: OnScores = lambda first, probabilities: None,
    ) -> Request:
        """Queues a prompt.

        Args:
          prompt: to score.
          normalize_over: what the probabilities add up to one over.
          deadline: as of `time.monotonic`.
          on_scores: called from the loop's thread with each chunk of scores, before the request is done.

        Raises:
          QueueFullError: if there is no room for the prompt.
          ClosedError: after `stop`, or if the thread died.
          ValueError: for a prompt that no pass can hold.
        """
        request = self.prepare(prompt, normalize_over, deadline)
        request.on_scores = on_scores
        self.enqueue(request)
        return request

    def prepare(
        self,
        prompt: EncodedPrompt,
        normalize_over: NormalizeOver = "labels",
        deadline: float = math.inf,
        caller: Caller = UNNAMED,
    ) -> Request:
        """The part of `submit` that takes long for a long list; raises ValueError for what no pass can hold."""
        self._scheduler.check(prompt)
        return Request(prompt, normalize_over, deadline, caller)

    def enqueue(self, *requests: Request) -> None:
        """Queues requests of one caller that `prepare` made: all of them or, with an error, none.

        Args:
          requests: futures, which get the scores.

        Raises:
          QueueFullError: too many tokens are queued, of the caller or of all.
          ClosedError: the loop is stopping.
        """
        with self._changed:
            if self._stopping:
                raise ClosedError
            caller, queued = requests[0].caller, self._queued_tokens.total()
            num_tokens = sum(request.num_tokens for request in requests)
            of_caller, retry_after = self._queued_tokens[caller.name], max(0.05, queued / self._tokens_per_second / 2)
            if queued and queued + num_tokens > self._max_queued_tokens:
                raise QueueFullError(retry_after)
            if of_caller and of_caller + num_tokens > caller.share * self._max_queued_tokens:
                raise QueueFullError(retry_after, f"caller '{caller.name}' has its share of the queue")
            self._queued_tokens[caller.name] += num_tokens
            self._metrics.waiting.set(queued + num_tokens)
            for request in requests:
                request.add_done_callback(self._on_done)
            self._inbox.extend(requests)
            self._changed.notify()

    def reload(self, params: Params) -> Future:
        """Scores later requests with other weights; the future is done when they are in use."""
        done: Future = Future()
        with self._changed:
            if self._stopping:
                raise ClosedError
            self._inbox.append(_Reload(params, done))
            self._changed.notify()
        return done

    def stop(self, timeout: float) -> bool:
        """Takes no more requests and finishes those queued. False if that took longer than `timeout` seconds."""
        with self._changed:
            self._stopping = True
            self._changed.notify()
        self._thread.join(timeout)
        if self._paused_gc:
            gc.unfreeze()
            gc.enable()
        return not self._thread.is_alive()

    def _run(self) -> None:
        try:
            while True:
                try:
                    if not self._step():
                        return
                except Exception as error:  # outside of a pass, so it cannot be attributed to a request
                    self._fail_all(error)
        finally:
            with self._changed:
                self._stopping = True
            waiting = [entry if isinstance(entry, Request) else entry.done for entry in self._inbox]
            for promise in [*self._started_requests(), *waiting]:
                _fail(promise, ClosedError())

    def _step(self) -> bool:
        """Starts a pass and finishes the one before, as there is work; False after `stop`, with nothing left to do."""
        with self._changed:
            if not self._has_work():
                if self._stopping:
                    return False
                self._collect_garbage()
                self._changed.wait(None if self._passes_work else PROBE_EVERY)
            if self._running is None:
                self._wait_for_batch()
            while self._inbox and isinstance(request := self._inbox[0], Request):
                self._scheduler.add(request.job)
                self._inbox.popleft()
        self._drop_expired()
        # While a pass runs, the next one is dispatched only when it is full: later requests may share it.
        following = None
        if self._running is None or self._scheduler.tokens >= self._full:
            following = self._start_pass()
        running, self._running = self._running, following
        if running:
            self._finish_pass(*running)
        if not self._running and not self._scheduler:
            self._take_new_params()
            if not self._passes_work:
                self._probe()
        return True

    def _started_requests(self) -> list[Request]:
        """Requests in the running pass or in the scheduler."""
        chunks = self._running[0].passes[0].chunks if self._running else ()
        return [job.owner for job in (*(chunk.owner for chunk in chunks), *self._scheduler)]

    def _has_work(self) -> bool:
        return bool(self._running or self._inbox or self._scheduler)

    def _collect_garbage(self) -> None:
        """Runs the garbage collector while the device is busy or idle, because it stops all threads.

        The oldest generation is collected when there is no work, and otherwise rarely: it may hold a list of 50,000
        items.
        """
        now = time.monotonic()
        old = now >= self._collect_old_at and (not self._has_work() or now >= self._collect_old_at + BUSY_FOR)
        gc.collect(2 if old else 1)
        if old:
            self._collect_old_at = time.monotonic() + 1.0

    def _wait_for_batch(self) -> None:
        """Waits up to `batch_timeout` after the first request for others to share its pass."""
        while not self._stopping:
            requests = [entry for entry in self._inbox if isinstance(entry, Request)]
            if len(requests) < len(self._inbox) or sum(request.num_tokens for request in requests) >= self._full:
                return
            until = min((request.arrival_time for request in requests), default=0.0) + self._batch_timeout
            if (seconds := until - time.monotonic()) <= 0:
                return
            self._changed.wait(seconds)

    def _drop_expired(self) -> None:
        """Takes cancelled requests, and those whose deadline passed, out of the queue."""
        now = time.monotonic()
        for job in list(self._scheduler):
            request = job.owner
            if request.deadline <= now:
                _fail(request, TimeoutError("the deadline passed while the request was queued"))
            if request.done():
                self._scheduler.remove(job)

    def _start_pass(self) -> tuple[InFlight, float] | None:
        """Dispatches the next pass; returns it with the time, or None if there is none, or it failed."""
        pass_ = self._scheduler.next_pass()
        if pass_ is None:
            return None
        now = time.monotonic()
        jobs = [chunk.owner for chunk in pass_.chunks]
        for job in jobs:
            if not job.owner.start_time:
                job.owner.start_time = now
                self._metrics.queue_seconds.observe(now - job.owner.arrival_time)
                self._metrics.prefix_tokens.labels("cached").inc(job.num_cached_tokens)
                self._metrics.prefix_tokens.labels("computed").inc(job.prompt.prefix_length - job.num_cached_tokens)
        # Log-probabilities over the vocabulary also serve those who want them over the labels.
        over_vocabulary = any(job.normalize_over == "vocabulary" for job in jobs)
        try:
            running = self._dispatch(pass_, "vocabulary" if over_vocabulary else "labels")
        except Exception as error:
            self._fail_pass(pass_, error)
            return None
        self._collect_garbage()
        return running, now

    def _dispatch(self, pass_: Pass, normalize_over: NormalizeOver) -> InFlight:
        with self._device:
            return self.scorer.dispatch([pass_], normalize_over)

    def _finish_pass(self, running: InFlight, start_time: float) -> None:
        """Waits for a pass and hands its scores to their requests."""
        (pass_,) = running.passes
        try:
            (chunk_log_probs,) = self.scorer.collect(running)
        except Exception as error:
            self._fail_pass(pass_, error)
            return
        self._passes_work = True
        self._observe_pass(pass_, time.monotonic() - start_time)
        for chunk, log_probs in zip(pass_.chunks, chunk_log_probs, strict=True):
            try:
                self._hand_out(chunk, log_probs)
            except Exception as error:
                _fail(chunk.owner.owner, error)

    def _observe_pass(self, pass_: Pass, seconds: float) -> None:
        num_computed = sum(chunk.stop - chunk.start + len(chunk.question_tokens) for chunk in pass_.chunks)
        self._tokens_per_second += 0.2 * (pass_.tokens / seconds - self._tokens_per_second)
        self._metrics.pass_seconds.observe(seconds)
        self._metrics.pass_tokens.observe(num_computed)
        self._metrics.padding_tokens.inc(pass_.bucket.tokens - num_computed)
        self._metrics.pass_items.observe(pass_.num_questions)
        self._metrics.compilations.set(self.scorer.compilations())

    def _hand_out(self, chunk: Chunk, log_probs: np.ndarray) -> None:
        """Calls a request back with the scores of a chunk, and completes it after its last question."""
        job, request = chunk.owner, chunk.owner.owner
        if request.done() or not chunk.questions:
            return
        if not np.isfinite(log_probs).all():
            raise FloatingPointError("the model's scores are not finite")
        over_labels = job.normalize_over == "labels"
        temperature = chunk.prompt.temperature
        probabilities = normalize_over_labels(log_probs, temperature) if over_labels else np.exp(log_probs)
        request.on_scores(chunk.questions.start, probabilities)
        if chunk.questions.stop == len(chunk.prompt.questions):
            _succeed(request, job.num_cached_tokens)

    def _probe(self) -> None:
        """After a failed pass: runs an empty one, which raises while the device is still gone."""
        self.scorer.collect(self._dispatch(Pass(min(self.scorer.buckets), []), "labels"))
        self._passes_work = True

    def _fail_pass(self, pass_: Pass, error: Exception) -> None:
        """Fails the requests of a failed pass. The pool of cached pages is lost with it, so other requests restart."""
        log.error("a pass failed", exc_info=error)
        self._passes_work = False
        for chunk in pass_.chunks:
            _fail(chunk.owner.owner, RuntimeError(f"the pass failed: {error}"))
        self._scheduler.invalidate()
        self.scorer.reset_cache()

    def _fail_all(self, error: Exception) -> None:
        """Fails every started request, after an error outside of a pass."""
        log.error("scoring failed", exc_info=error)
        self._passes_work = False
        for request in self._started_requests():
            _fail(request, RuntimeError(f"scoring failed: {error}"))
        self._running = None
        self._scheduler.invalidate()
        self.scorer.reset_cache()

    def _take_new_params(self) -> None:
        """Swaps the weights if a reload is next in the queue."""
        with self._changed:
            reload = self._inbox[0] if self._inbox else None
            if not isinstance(reload, _Reload):
                return
            self._inbox.popleft()
        self.scorer.params = reload.params
        self._scheduler.invalidate()  # cached prefixes were computed by the old model
        _succeed(reload.done, None)

    def _on_done(self, request: Future) -> None:
        assert isinstance(request, Request)
        with self._changed:
            self._queued_tokens[request.caller.name] -= request.num_tokens
            self._metrics.waiting.set(self._queued_tokens.total())


def _succeed(promise: Future, result: Any) -> None:
    with contextlib.suppress(InvalidStateError):  # cancelled at this very moment
        promise.set_result(result)


def _fail(promise: Future, error: Exception) -> None:
    with contextlib.suppress(InvalidStateError):
        promise.set_exception(error)
