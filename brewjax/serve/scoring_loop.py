"""The thread that scores: takes jobs from a bounded queue, runs passes on the device, answers futures."""

from __future__ import annotations

import contextlib
import dataclasses
import gc
import logging
import math
import threading
import time
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future, InvalidStateError
from typing import Any

import numpy as np

from brewjax.data.text.encode import EncodedPrompt
from brewjax.model.params import Params
from brewjax.scoring.passes import Chunk, Pass
from brewjax.scoring.scheduler import Job, Scheduler
from brewjax.scoring.scorer import InFlight, NormalizeOver, Scorer, normalize_over_labels
from brewjax.serve.telemetry import Metrics

log = logging.getLogger(__name__)
BUSY_FOR = 60.0  # seconds without a pause, after which old garbage is collected all the same
TRY_AGAIN = 1.0  # seconds until passes are tried again after one failed

Answers = Callable[[int, np.ndarray], None]  # hears the number of the first question, and probabilities [Q, labels]


class QueueFullError(RuntimeError):
    """Nothing was queued.

    Attributes:
      retry_after: seconds until there may be room.
    """

    def __init__(self, retry_after: float, what: str = "the queue is full"):
        super().__init__(f"{what}; try again in {retry_after:.1f} s")
        self.retry_after = retry_after


class ClosedError(RuntimeError):
    """Nothing is queued any more: another server has to be asked."""

    def __init__(self) -> None:
        super().__init__("the server stops, or cannot score any more")


class Request(Future):
    """A job in the queue, and the promise that it is done; its result is how many tokens of its prefix were cached.

    `cancel` takes it out of the queue. Fails with TimeoutError where its deadline passes first.
    """

    def __init__(self, prompt: EncodedPrompt, against: NormalizeOver, deadline: float):
        super().__init__()
        self.job, self.deadline = Job(prompt, against, self), deadline
        self.on_answers: Answers = lambda first, probabilities: None
        self.places = self.job.remaining_tokens()
        self.arrived = time.monotonic()
        self.began = 0.0


@dataclasses.dataclass(frozen=True)
class _Reload:
    """Stands in the queue: who came before it is scored with the old weights, who comes after it with these."""

    params: Params
    done: Future


class ScoringLoop:
    """Scores for as long as it runs.

    Args:
      most_waiting: places of rows (tokens, nearly) that may wait; more is refused by QueueFullError.
      max_wait: seconds that an idle device waits for a pass to fill up.
      device: held while a pass is dispatched: programs of two threads must come to all devices in the same order.
    """

    def __init__(
        self,
        scorer: Scorer,
        batcher: Scheduler,
        metrics: Metrics,
        most_waiting: int,
        max_wait: float = 0.002,
        device: threading.Lock | None = None,
    ):
        self.scorer, self._batcher, self._metrics = scorer, batcher, metrics
        self._most_waiting, self._max_wait = most_waiting, max_wait
        self._full = max(bucket.tokens for bucket in scorer.buckets)
        self._changed = threading.Condition()  # a reentrant lock: `cancel` calls back from within
        self._inbox: deque[Request | _Reload] = deque()
        self._running: tuple[InFlight, float] | None = None
        self._waiting = 0  # places, of all requests that are not done
        self._speed = 1e4  # places a second, lately
        self._stopping = self._collected = False
        self._passes_work = True  # the last one did
        self._collect_old_at = 0.0
        self._device = device or threading.Lock()
        self._thread = threading.Thread(target=self._run, name="scoring", daemon=True)

    @property
    def healthy(self) -> bool:
        """Whether the last pass did not fail, and there will be a next one."""
        return self._passes_work and self.alive

    @property
    def alive(self) -> bool:
        """Whether there is a thread to score."""
        return self._thread.is_alive()

    def start(self) -> None:
        """Begins to work. What lives by now is never looked at by the garbage collector again, until `stop`."""
        self._collected = gc.isenabled()
        gc.collect()
        gc.freeze()
        gc.disable()
        self._thread.start()

    def submit(
        self,
        prompt: EncodedPrompt,
        against: NormalizeOver = "labels",
        deadline: float = math.inf,
        on_answers: Answers = lambda first, probabilities: None,
    ) -> Request:
        """Queues a prompt; `on_answers` is called from the worker's thread, and everything before the request is done.

        Raises QueueFullError, ClosedError, and ValueError for what no pass can hold.
        """
        request = self.prepare(prompt, against, deadline)
        request.on_answers = on_answers
        self.enqueue(request)
        return request

    def prepare(self, prompt: EncodedPrompt, against: NormalizeOver = "labels", deadline: float = math.inf) -> Request:
        """All of `submit` that takes time for a long list; ValueError for what no pass can hold."""
        self._batcher.check(prompt)
        return Request(prompt, against, deadline)

    def enqueue(self, request: Request) -> None:
        """The rest of `submit`."""
        with self._changed:
            if self._stopping:
                raise ClosedError
            if self._waiting and self._waiting + request.places > self._most_waiting:
                raise QueueFullError(max(0.05, self._waiting / self._speed / 2))
            self._waiting += request.places
            self._metrics.waiting.set(self._waiting)
            request.add_done_callback(self._on_done)
            self._inbox.append(request)
            self._changed.notify()

    def reload(self, params: Params) -> Future:
        """Other weights for whatever is submitted from now on; done when they are in use."""
        done: Future = Future()
        with self._changed:
            if self._stopping:
                raise ClosedError
            self._inbox.append(_Reload(params, done))
            self._changed.notify()
        return done

    def stop(self, timeout: float) -> bool:
        """Takes no more, finishes what is queued; False where that took longer."""
        with self._changed:
            self._stopping = True
            self._changed.notify()
        self._thread.join(timeout)
        if self._collected:
            gc.unfreeze()
            gc.enable()
        return not self._thread.is_alive()

    def _run(self) -> None:
        try:
            while True:
                try:
                    if not self._step():
                        return
                except Exception as error:  # not of a pass: whose fault it is, nobody knows
                    self._lose_all(error)
        finally:
            with self._changed:
                self._stopping = True
            for promise in [*self._begun(), *(one if isinstance(one, Request) else one.done for one in self._inbox)]:
                _fail(promise, ClosedError())

    def _step(self) -> bool:
        """Begins a pass and finishes the one before, as there is work; False when there will be none any more."""
        with self._changed:
            if not self._has_work():
                if self._stopping:
                    return False
                self._collect()
                self._changed.wait(None if self._passes_work else TRY_AGAIN)
            if self._running is None:
                self._wait_for_batch()
            while self._inbox and isinstance(one := self._inbox[0], Request):
                self._batcher.add(one.job)
                self._inbox.popleft()
        self._drop_expired()
        # While a pass runs, the next one is put behind it only when it is full: later ones may share it.
        following = None
        if self._running is None or self._batcher.tokens >= self._full:
            following = self._begin_pass()
        running, self._running = self._running, following
        if running:
            self._finish_pass(*running)
        if not self._running and not self._batcher:
            self._take_new_params()
            if not self._passes_work:
                self._probe()
        return True

    def _begun(self) -> list[Request]:
        """Who is in the running pass, or waits for the next ones."""
        parts = self._running[0].passes[0].chunks if self._running else ()
        return [job.owner for job in (*(part.owner for part in parts), *self._batcher)]

    def _has_work(self) -> bool:
        return bool(self._running or self._inbox or self._batcher)

    def _collect(self) -> None:
        """Garbage, when the device is busy or nothing is to be done.

        All threads stand still for it. What is old is looked at when nothing is to be done, and otherwise rarely: it
        may hold a list of 50,000 items.
        """
        now = time.monotonic()
        old = now >= self._collect_old_at and (not self._has_work() or now >= self._collect_old_at + BUSY_FOR)
        gc.collect(2 if old else 1)
        if old:
            self._collect_old_at = time.monotonic() + 1.0

    def _wait_for_batch(self) -> None:
        """Waits a little for requests to share a pass with the first one."""
        while not self._stopping:
            requests = [one for one in self._inbox if isinstance(one, Request)]
            if len(requests) < len(self._inbox) or sum(request.places for request in requests) >= self._full:
                return
            until = min((request.arrived for request in requests), default=0.0) + self._max_wait
            if (seconds := until - time.monotonic()) <= 0:
                return
            self._changed.wait(seconds)

    def _drop_expired(self) -> None:
        """Takes out jobs that nobody waits for."""
        now = time.monotonic()
        for job in list(self._batcher):
            request = job.owner
            if request.deadline <= now:
                _fail(request, TimeoutError("the deadline passed while the request was queued"))
            if request.done():
                self._batcher.remove(job)

    def _begin_pass(self) -> tuple[InFlight, float] | None:
        one = self._batcher.next_pass()
        if one is None:
            return None
        now = time.monotonic()
        for part in one.chunks:
            if not part.owner.owner.began:
                part.owner.owner.began = now
                self._metrics.queue_seconds.observe(now - part.owner.owner.arrived)
                self._metrics.prefix_tokens.labels("cached").inc(part.owner.num_cached_tokens)
                self._metrics.prefix_tokens.labels("computed").inc(
                    part.prompt.prefix_length - part.owner.num_cached_tokens
                )
        against: NormalizeOver = "labels"
        if any(part.owner.normalize_over == "vocabulary" for part in one.chunks):
            against = "vocabulary"
        try:
            running = self._start(one, against)
        except Exception as error:
            self._fail_pass(one, error)
            return None
        self._collect()
        return running, now

    def _start(self, one: Pass, against: NormalizeOver) -> InFlight:
        with self._device:
            return self.scorer.dispatch([one], against)

    def _finish_pass(self, running: InFlight, began: float) -> None:
        (one,) = running.passes
        try:
            (found,) = self.scorer.collect(running)
        except Exception as error:
            self._fail_pass(one, error)
            return
        self._passes_work = True
        seconds, computed = (
            time.monotonic() - began,
            sum(part.stop - part.start + len(part.question_tokens) for part in one.chunks),
        )
        self._speed += 0.2 * (one.tokens / seconds - self._speed)
        self._metrics.pass_seconds.observe(seconds)
        self._metrics.pass_tokens.observe(computed)
        self._metrics.padding_tokens.inc(one.bucket.tokens - computed)
        self._metrics.pass_items.observe(sum(len(part.questions) for part in one.chunks))
        self._metrics.compilations.set(self.scorer.compilations())
        for part, log_probs in zip(one.chunks, found, strict=True):
            try:
                self._answer(part, log_probs)
            except Exception as error:
                _fail(part.owner.owner, error)

    def _answer(self, part: Chunk, log_probs: np.ndarray) -> None:
        job, request = part.owner, part.owner.owner
        if request.done() or not part.questions:
            return
        if not np.isfinite(log_probs).all():
            raise FloatingPointError("the model's scores are not finite")
        request.on_answers(
            part.questions.start,
            normalize_over_labels(log_probs) if job.normalize_over == "labels" else np.exp(log_probs),
        )
        if part.questions.stop == len(part.prompt.questions):
            _succeed(request, job.num_cached_tokens)

    def _probe(self) -> None:
        """After a pass that failed: whether one without requests does."""
        self.scorer.collect(self._start(Pass(min(self.scorer.buckets), []), "labels"))
        self._passes_work = True

    def _fail_pass(self, one: Pass, error: Exception) -> None:
        """A pass failed, and the pool of cached pages with it: its requests fail, and the others begin anew."""
        log.error("a pass failed", exc_info=error)
        self._passes_work = False
        for part in one.chunks:
            _fail(part.owner.owner, RuntimeError(f"the pass failed: {error}"))
        self._batcher.invalidate()
        self.scorer.reset_cache()

    def _lose_all(self, error: Exception) -> None:
        """Scoring failed outside of a pass: every request that is begun fails."""
        log.error("scoring failed", exc_info=error)
        self._passes_work = False
        for request in self._begun():
            _fail(request, RuntimeError(f"scoring failed: {error}"))
        self._running = None
        self._batcher.invalidate()
        self.scorer.reset_cache()

    def _take_new_params(self) -> None:
        with self._changed:
            new = self._inbox[0] if self._inbox else None
            if not isinstance(new, _Reload):
                return
            self._inbox.popleft()
        self.scorer.params = new.params
        self._batcher.invalidate()  # what is cached is the old model's
        _succeed(new.done, None)

    def _on_done(self, request: Future) -> None:
        assert isinstance(request, Request)
        with self._changed:
            self._waiting -= request.places
            self._metrics.waiting.set(self._waiting)


def _succeed(promise: Future, result: Any) -> None:
    with contextlib.suppress(InvalidStateError):  # cancelled at this very moment
        promise.set_result(result)


def _fail(promise: Future, error: Exception) -> None:
    with contextlib.suppress(InvalidStateError):
        promise.set_exception(error)
