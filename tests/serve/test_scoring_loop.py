"""The thread that scores, when passes fail, callers leave and weights change."""

import gc
import itertools
import threading
from collections.abc import Iterator
from unittest import mock

import numpy as np
import pytest

from brewjax.data.text.tokenizer import Tokenizer
from brewjax.scoring.passes import Bucket
from brewjax.scoring.prefix_cache import PrefixCache
from brewjax.scoring.scheduler import Scheduler
from brewjax.scoring.scorer import Scorer
from brewjax.serve.scoring_loop import ClosedError, QueueFullError, Request, ScoringLoop
from brewjax.serve.telemetry import Metrics
from tests.serve.serving import Gate, eventually, held, pages_held, waiting
from tests.tiny import MODEL, params, prompt

COSTS = {Bucket(128, past): 128 + past for past in (0, 4)}
PAGES = 12


@pytest.fixture(scope="module")
def scorer() -> Scorer:
    scorer = Scorer(MODEL, params(), Tokenizer.byte_level(), "dense", list(COSTS), cache_pages=PAGES)
    scorer.warm_up()
    return scorer


@pytest.fixture(scope="module")
def alone() -> Scorer:
    return Scorer(MODEL, params(), Tokenizer.byte_level(), "dense", [Bucket(1024)])


@pytest.fixture
def scoring_loop(scorer) -> Iterator[ScoringLoop]:
    scorer.params = params()
    scorer.reset_cache()
    scoring_loop = ScoringLoop(scorer, Scheduler(COSTS, PrefixCache(PAGES)), Metrics(), max_queued_tokens=2_000)
    scoring_loop.start()
    yield scoring_loop
    scoring_loop.stop(60)


def question(seed: int, prefix: int = 70, items: int = 3):
    return prompt(np.random.default_rng(seed), prefix, [], [5] * items)


class Submission:
    """A prompt submitted to a scoring loop, and its scores as they come."""

    def __init__(self, scoring_loop: ScoringLoop, prompt, **how):
        self.prompt, self.scores = prompt, np.full((len(prompt.questions), 2), np.nan, np.float32)
        self.request = scoring_loop.submit(prompt, on_scores=self._hear, **how)

    def _hear(self, first: int, scores: np.ndarray) -> None:
        assert len(scores)  # nobody is told nothing
        self.scores[first : first + len(scores)] = scores

    def is_right(self, alone: Scorer) -> bool:
        self.request.result(60)
        return np.allclose(self.scores, alone.score_encoded([self.prompt])[0], atol=1e-5)


def is_idle(scoring_loop: ScoringLoop) -> bool:
    return waiting(scoring_loop) == 0 and pages_held(scoring_loop) == 0 and not scoring_loop._scheduler


# --- a pass that fails


@pytest.mark.parametrize("step", ["dispatch", "collect"])
def test_a_pass_that_fails_takes_only_its_own_requests_with_it(scoring_loop, scorer, alone, step):
    """The long one has begun when the pass of the bad one fails: it begins anew, and what it was told stays right."""
    real = getattr(scorer, step)
    bad = question(6)

    def fails(work, *args):
        passes = work if step == "dispatch" else work.passes
        if any(part.prompt is bad for pass_ in passes for part in pass_.chunks):
            scorer._pool[0].delete()  # as a pass that failed on the device would leave it
            raise RuntimeError("the device is gone")
        return real(work, *args)

    with mock.patch.object(scorer, step, fails), held(scoring_loop) as gate:
        long = Submission(scoring_loop, question(1, prefix=200, items=100))
        gate.let(2)  # it stored its prefix, and asks its first questions
        eventually(lambda: len(gate.passes) == 3)
        poisoned = Submission(scoring_loop, bad)
        good = [Submission(scoring_loop, question(seed)) for seed in (2, 3)]
        gate.open()
        with pytest.raises(RuntimeError, match="the pass failed: the device is gone"):
            poisoned.request.result(60)
        in_the_same_pass = [submission for submission in good if submission.request.exception(60)]
        assert long.is_right(alone)
    assert all(submission.is_right(alone) for submission in good if submission not in in_the_same_pass)
    eventually(lambda: scoring_loop.healthy and is_idle(scoring_loop))
    assert Submission(scoring_loop, question(2)).is_right(alone)


def test_a_device_that_is_gone_is_unhealthy_until_it_is_back(scoring_loop, scorer, alone):
    with mock.patch.object(scorer, "dispatch", side_effect=RuntimeError("no device")):
        with pytest.raises(RuntimeError, match="no device"):
            Submission(scoring_loop, question(1)).request.result(60)
        assert not scoring_loop.healthy
    eventually(lambda: scoring_loop.healthy)  # nobody asks for it: those who would are sent elsewhere
    assert Submission(scoring_loop, question(1)).is_right(alone)


def test_a_mistake_outside_of_passes_fails_who_is_there_and_the_loop_goes_on(scoring_loop, alone):
    with held(scoring_loop) as gate:
        under_way = [Submission(scoring_loop, question(seed)) for seed in range(3)]
        eventually(lambda: gate.passes)
        with mock.patch.object(scoring_loop._scheduler, "next_pass", side_effect=KeyError("a bug")):
            under_way += [Submission(scoring_loop, question(seed)) for seed in range(3, 6)]
            gate.open()
            failed = [submission for submission in under_way if submission.request.exception(60)]
    assert failed
    assert all(submission.is_right(alone) for submission in under_way if submission not in failed)
    eventually(lambda: scoring_loop.healthy and is_idle(scoring_loop))
    assert Submission(scoring_loop, question(7)).is_right(alone)


def test_a_caller_that_cannot_be_told_fails_alone(scoring_loop, alone):
    with held(scoring_loop) as gate:
        deaf = scoring_loop.submit(question(1), on_scores=mock.Mock(side_effect=RuntimeError("the loop is closed")))
        good = Submission(scoring_loop, question(2))
        gate.open()
        with pytest.raises(RuntimeError, match="the loop is closed"):
            deaf.result(60)
        assert good.is_right(alone)
    assert scoring_loop.healthy


def test_scores_that_are_not_finite_are_never_answers(scoring_loop, scorer, alone):
    collect = scorer.collect

    def spoilt(work):
        results = collect(work)
        return [
            [np.full_like(scores, np.nan) if at == 0 else scores for at, scores in enumerate(row)] for row in results
        ]

    with mock.patch.object(scorer, "collect", spoilt), held(scoring_loop) as gate:
        bad, good = Submission(scoring_loop, question(1)), Submission(scoring_loop, question(2))
        gate.open()
        with pytest.raises(FloatingPointError):
            bad.request.result(60)
    assert Submission(scoring_loop, question(1)).is_right(alone)
    assert good.request.done()


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_a_scoring_loop_that_dies_is_noticed_and_nobody_waits_for_it(scoring_loop, scorer):
    with mock.patch.object(scorer, "collect", side_effect=SystemExit), held(scoring_loop) as gate:
        submissions = [Submission(scoring_loop, question(seed)) for seed in range(3)]
        gate.open()
        for submission in submissions:
            with pytest.raises(ClosedError):
                submission.request.result(60)
    eventually(lambda: not scoring_loop.healthy)
    for call in (lambda: scoring_loop.submit(question(1)), lambda: scoring_loop.reload(params())):
        with pytest.raises(ClosedError, match="stops, or cannot score any more"):
            call()


# --- callers that leave


def test_what_nobody_waits_for_never_runs_and_leaves_no_trace(scoring_loop, alone):
    with held(scoring_loop) as gate:
        first = Submission(scoring_loop, question(1))
        eventually(lambda: gate.passes)
        cancelled, late = Submission(scoring_loop, question(2)), Submission(scoring_loop, question(3), deadline=0.0)
        assert waiting(scoring_loop) == sum(submission.request.num_tokens for submission in (first, cancelled, late))
        assert cancelled.request.cancel()
        assert waiting(scoring_loop) == first.request.num_tokens + late.request.num_tokens
        gate.open()
        with pytest.raises(TimeoutError, match="the deadline passed while the request was queued"):
            late.request.result(60)
        assert first.is_right(alone)
    assert all(part.prompt is first.prompt for pass_ in gate.passes for part in pass_.chunks)
    eventually(lambda: is_idle(scoring_loop))


def test_who_leaves_in_the_middle_gives_its_pages_back(scoring_loop, alone):
    with held(scoring_loop) as gate:
        long = Submission(scoring_loop, question(1, prefix=250, items=200))
        gate.let(3)
        eventually(lambda: len(gate.passes) == 4)
        assert pages_held(scoring_loop) == 4
        long.request.cancel()
        after = Submission(scoring_loop, question(2))
        gate.open()
        assert after.is_right(alone)
    eventually(lambda: is_idle(scoring_loop))
    assert len(gate.passes) <= 6  # of the 12 that the long one would have taken


def test_a_full_queue_says_when_to_come_back_and_has_room_again(scoring_loop, alone):
    with held(scoring_loop) as gate:
        submissions = [Submission(scoring_loop, question(seed, items=100)) for seed in range(3)]
        eventually(lambda: gate.passes)
        with pytest.raises(QueueFullError, match=r"the queue is full; try again in [\d.]+ s") as refused:
            scoring_loop.submit(question(9, items=100))
        assert refused.value.retry_after > 0
        submissions[2].request.cancel()
        submissions.append(Submission(scoring_loop, question(9, items=100)))
        gate.open()
        assert all(submission.is_right(alone) for submission in submissions if not submission.request.cancelled())
    longest = question(3, prefix=100, items=500)  # more tokens than the queue takes, but it is alone
    assert Submission(scoring_loop, longest).is_right(alone)


def test_a_long_prefix_gets_its_pages_though_short_ones_keep_coming(scoring_loop):
    """Eleven pages: two short ones hold four at any time, so that eight are never free by chance."""
    scheduler = Scheduler({Bucket(128, past): 1.0 for past in (0, 4, 8)}, PrefixCache(PAGES))
    jobs = [Request(question(seed, prefix=120, items=60), "labels", 1e9).job for seed in range(40)]
    long = Request(question(99, prefix=500, items=1), "labels", 1e9).job
    for job in (*jobs[:3], long):
        scheduler.add(job)
    for later in jobs[3:]:
        scheduler.next_pass()
        scheduler.add(later)
    assert long.finished


# --- other weights


def test_each_request_is_scored_by_the_weights_of_when_it_came(scoring_loop, scorer, alone):
    new = params(seed=1)
    of_new = Scorer(MODEL, new, Tokenizer.byte_level(), "dense", [Bucket(1024)])
    with held(scoring_loop) as gate:
        before = [Submission(scoring_loop, question(seed, items=20)) for seed in range(4)]
        eventually(lambda: gate.passes)
        reloaded = scoring_loop.reload(new)
        after = [
            Submission(scoring_loop, question(seed, items=20)) for seed in range(4)
        ]  # whose prefixes the old model cached
        gate.open()
        reloaded.result(60)
        assert all(submission.is_right(alone) for submission in before)
        assert all(submission.is_right(of_new) for submission in after)
        assert not any(np.allclose(a.scores, b.scores, atol=1e-3) for a, b in zip(before, after, strict=True))


def test_a_reload_that_nobody_waits_for_any_more_is_taken_up(scoring_loop, scorer):
    new = params(seed=2)
    with held(scoring_loop) as gate:
        under_way = Submission(scoring_loop, question(1))
        eventually(lambda: gate.passes)
        scoring_loop.reload(new).cancel()
        gate.open()
        under_way.request.result(60)
    eventually(lambda: scorer.params["embedding"] is new["embedding"])
    assert scoring_loop.healthy


# --- its start and its end


def test_a_scoring_loop_that_stops_finishes_what_it_has_and_takes_no_more(scoring_loop, alone):
    with held(scoring_loop) as gate:
        submissions = [Submission(scoring_loop, question(seed)) for seed in range(5)]
        eventually(lambda: gate.passes)
        assert not scoring_loop.stop(0.01)
        with pytest.raises(ClosedError):
            scoring_loop.submit(question(9))
        gate.open()
        assert scoring_loop.stop(60)
    assert all(submission.is_right(alone) for submission in submissions)


def test_the_garbage_collector_rests_while_a_scoring_loop_works(scorer):
    frozen = gc.get_freeze_count()
    scoring_loop = ScoringLoop(scorer, Scheduler(COSTS, PrefixCache(PAGES)), Metrics(), max_queued_tokens=2_000)
    assert gc.isenabled()
    scoring_loop.start()
    assert not gc.isenabled()
    assert gc.get_freeze_count() > frozen
    assert scoring_loop.stop(60)
    assert gc.isenabled()
    assert gc.get_freeze_count() == 0


def test_many_come_and_go_at_once(scoring_loop, alone):
    """Threads that submit and cancel as they like: whoever stays is answered rightly."""
    answered: list[Submission] = []

    def come_and_go(seed: int) -> None:
        random = np.random.default_rng(seed)
        for number in itertools.count():
            if number == 30:
                return
            try:
                submission = Submission(
                    scoring_loop, question(int(random.integers(6)), int(random.integers(1, 200)), 1 + number % 9)
                )
            except QueueFullError:
                continue
            if random.random() < 0.3:
                submission.request.cancel()
            else:
                answered.append(submission)

    threads = [threading.Thread(target=come_and_go, args=(seed,)) for seed in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert answered
    assert all(submission.is_right(alone) for submission in answered)
    eventually(lambda: is_idle(scoring_loop))


def test_a_gate_lets_through_as_many_as_it_is_told():
    gate = Gate()
    gate.let(2)
    for _ in range(2):
        gate.go_through([])
    gate.open()
    for _ in range(3):
        gate.go_through([])
