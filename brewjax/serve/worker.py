"""The thread that scores: takes jobs from a bounded queue, runs passes on the device, answers futures."""

from __future__ import annotations

import contextlib
import gc
import logging
import math
import threading
import time
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future, InvalidStateError

import numpy as np

from brewjax.data.tokens import EncodedPrompt
from brewjax.model.params import Params
from brewjax.scoring.batcher import Batcher, Job
from brewjax.scoring.passes import Pass
from brewjax.scoring.scorer import Against, Running, Scorer, among_labels
from brewjax.serve.metrics import Metrics

log = logging.getLogger(__name__)

Answers = Callable[[int, np.ndarray], None]  # hears the number of the first question, and probabilities [Q, labels]


class QueueFullError(RuntimeError):
    """Nothing was queued.

    Attributes:
      retry_after: seconds until there may be room.
    """

    def __init__(self, retry_after: float):
        super().__init__(f"the queue is full; try again in {retry_after:.1f} s")
        self.retry_after = retry_after


class Request(Future):
    """A job in the queue, and the promise that it is done; its result is how many tokens of its prefix were cached.

    `cancel` takes it out of the queue. Fails with TimeoutError where its deadline passes first.
    """

    def __init__(self, prompt: EncodedPrompt, against: Against, deadline: float, on_answers: Answers):
        super().__init__()
        self.job, self.deadline, self.on_answers = Job(prompt, against, self), deadline, on_answers
        self.places = self.job.left()
        self.arrived = time.monotonic()
        self.began = 0.0


class Worker:
    """Scores for as long as it runs.

    Args:
      most_waiting: places of rows (tokens, nearly) that may wait; more is refused by QueueFullError.
      max_wait: seconds that an idle device waits for a pass to fill up.
    """

    def __init__(self, scorer: Scorer, batcher: Batcher, metrics: Metrics, most_waiting: int, max_wait: float = 0.002):
        self.scorer, self._batcher, self._metrics = scorer, batcher, metrics
        self._most_waiting, self._max_wait = most_waiting, max_wait
        self._full = max(bucket.tokens for bucket in scorer.buckets)
        self._changed = threading.Condition()  # a reentrant lock: `cancel` calls back from within
        self._inbox: deque[Request] = deque()
        self._waiting = 0  # places, of all requests that are not done
        self._speed = 1e4  # places a second, lately
        self._new_params: tuple[Params, Future] | None = None
        self._stopping = False
        self.healthy = True  # the last pass did not fail
        self._thread = threading.Thread(target=self._run, name="scoring", daemon=True)

    def start(self) -> None:
        """Begins to work. What lives by now is never looked at by the garbage collector again."""
        gc.collect()
        gc.freeze()
        gc.disable()  # it runs when the device is busy or nothing is to be done (see _run)
        self._thread.start()

    def submit(
        self,
        prompt: EncodedPrompt,
        against: Against = "labels",
        deadline: float = math.inf,
        on_answers: Answers = lambda first, probabilities: None,
    ) -> Request:
        """Queues a prompt; `on_answers` is called from the worker's thread, and everything before the request is done.

        Raises QueueFullError, and ValueError for what no pass can hold.
        """
        self._batcher.check(prompt)
        request = Request(prompt, against, deadline, on_answers)
        with self._changed:
            if self._stopping:
                raise QueueFullError(1.0)
            if self._waiting and self._waiting + request.places > self._most_waiting:
                raise QueueFullError(max(0.05, self._waiting / self._speed / 2))
            self._waiting += request.places
            self._metrics.waiting.set(self._waiting)
            request.add_done_callback(self._left)
            self._inbox.append(request)
            self._changed.notify()
        return request

    def reload(self, params: Params) -> Future:
        """Other weights for whatever is begun from now on; done when they are in use."""
        done: Future = Future()
        with self._changed:
            self._new_params = params, done
            self._changed.notify()
        return done

    def stop(self, timeout: float) -> bool:
        """Takes no more, finishes what is queued; False where that took longer."""
        with self._changed:
            self._stopping = True
            self._changed.notify()
        self._thread.join(timeout)
        return not self._thread.is_alive()

    def _run(self) -> None:
        running: tuple[Running, float] | None = None
        while True:
            with self._changed:
                while not (running or self._inbox or self._batcher or self._stopping or self._new_params):
                    gc.collect()
                    self._changed.wait()
                if running is None:
                    self._fill_up()
                arrived, stopping = list(self._inbox), self._stopping
                self._inbox.clear()
            for request in arrived:
                self._batcher.add(request.job)
            self._drop()
            if stopping and running is None and not self._batcher:
                return
            # While a pass runs, the next one is put behind it only when it is full: later ones may share it.
            following = None
            if running is None or self._batcher.tokens >= self._full:
                following = self._begin_pass()
            if running:
                self._finish_pass(*running)
            running = following
            if running is None and not self._batcher.begun:
                self._take_new_params()

    def _fill_up(self) -> None:
        """Waits a little for requests to share a pass with the first one."""
        until = min((request.arrived for request in self._inbox), default=0.0) + self._max_wait
        while not self._stopping and sum(request.places for request in self._inbox) < self._full:
            if (seconds := until - time.monotonic()) <= 0:
                return
            self._changed.wait(seconds)

    def _drop(self) -> None:
        """Takes out jobs that nobody waits for."""
        now = time.monotonic()
        for job in list(self._batcher):
            request = job.owner
            if request.deadline <= now:
                _fail(request, TimeoutError("the deadline passed while the request was queued"))
            if request.done():
                self._batcher.remove(job)

    def _begin_pass(self) -> tuple[Running, float] | None:
        one = self._batcher.next_pass(begin=self._new_params is None)
        if one is None:
            return None
        now = time.monotonic()
        for part in one.parts:
            if not part.owner.owner.began:
                part.owner.owner.began = now
                self._metrics.queue_seconds.observe(now - part.owner.owner.arrived)
                self._metrics.prefix_tokens.labels("cached").inc(part.owner.hits)
                self._metrics.prefix_tokens.labels("computed").inc(part.prompt.prefix_length - part.owner.hits)
        against: Against = "labels"
        if any(part.owner.against == "vocabulary" for part in one.parts):
            against = "vocabulary"
        try:
            running = self.scorer.start([one], against)
        except Exception as error:
            self._lose(one, error)
            return None
        gc.collect(1)  # the device is busy now
        return running, now

    def _finish_pass(self, running: Running, began: float) -> None:
        (one,) = running.passes
        try:
            (found,) = self.scorer.finish(running)
        except Exception as error:
            self._lose(one, error)
            return
        self.healthy = True
        seconds, computed = (
            time.monotonic() - began,
            sum(part.stop - part.start + len(part.asked) for part in one.parts),
        )
        self._speed += 0.2 * (one.tokens / seconds - self._speed)
        self._metrics.pass_seconds.observe(seconds)
        self._metrics.pass_tokens.observe(computed)
        self._metrics.padding_tokens.inc(one.bucket.tokens - computed)
        self._metrics.pass_items.observe(sum(len(part.questions) for part in one.parts))
        self._metrics.compilations.set(self.scorer.compilations())
        for part, log_probs in zip(one.parts, found, strict=True):
            request = part.owner.owner
            if request.done():
                continue
            if not np.isfinite(log_probs).all():
                _fail(request, FloatingPointError("the model's scores are not finite"))
                continue
            in_labels = part.owner.against == "labels"
            request.on_answers(part.questions.start, among_labels(log_probs) if in_labels else np.exp(log_probs))
            if part.questions.stop == len(part.prompt.questions):
                _succeed(request, part.owner.hits)

    def _lose(self, one: Pass, error: Exception) -> None:
        """A pass failed, and the pool of cached pages with it: so do the jobs that had pages there."""
        log.exception("a pass failed", exc_info=error)
        self.healthy = False
        for job in [*(part.owner for part in one.parts), *self._batcher.lose()]:
            _fail(job.owner, RuntimeError(f"the pass failed: {error}"))
        self.scorer.forget()

    def _take_new_params(self) -> None:
        with self._changed:
            new, self._new_params = self._new_params, None
        if new:
            self.scorer.params = new[0]
            self._batcher.lose()  # what is cached is the old model's
            new[1].set_result(None)

    def _left(self, request: Future) -> None:
        assert isinstance(request, Request)
        with self._changed:
            self._waiting -= request.places
            self._metrics.waiting.set(self._waiting)


def _succeed(request: Request, hits: int) -> None:
    with contextlib.suppress(InvalidStateError):  # cancelled at this very moment
        request.set_result(hits)


def _fail(request: Request, error: Exception) -> None:
    with contextlib.suppress(InvalidStateError):
        request.set_exception(error)
