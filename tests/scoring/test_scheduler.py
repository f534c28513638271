"""Whatever is asked together, in whatever order, cold or hot: the scores are those of a pass alone."""

import dataclasses
import itertools
import os
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from brewjax.data.text.encode import EncodedPrompt
from brewjax.data.text.tokenizer import Tokenizer
from brewjax.model.params import abstract_params
from brewjax.model.sharding import MeshConfig
from brewjax.scoring.passes import PAGE, Bucket, Pass
from brewjax.scoring.prefix_cache import PrefixCache
from brewjax.scoring.scheduler import Job, Scheduler
from brewjax.scoring.scorer import Scorer, normalize_over_labels
from tests.tiny import MODEL, params, prompt

LENGTHS, PASTS = (128, 256), (0, 4, 8)
COSTS = {Bucket(tokens, past): tokens + past for tokens in LENGTHS for past in PASTS}
CACHE = 24


@pytest.fixture(scope="module")
def scorer() -> Scorer:
    return Scorer(MODEL, params(), Tokenizer.byte_level(), "dense", list(COSTS), cache_pages=CACHE)


@pytest.fixture(scope="module")
def alone() -> Scorer:
    return Scorer(MODEL, params(), Tokenizer.byte_level(), "dense", [Bucket(1024), Bucket(4096)])


@st.composite
def prompts(draw) -> list[EncodedPrompt]:
    """Prompts of several members, some of whom come again with other items, or with a longer history."""
    encoded_prompts = []
    for seed in draw(st.lists(st.integers(0, 3), min_size=1, max_size=6)):
        events = np.random.default_rng(seed).integers(1, 150, 4)[: draw(st.integers(1, 4))]
        layout = ("dense", "star")[seed % 2]
        encoded = prompt(np.random.default_rng(seed), draw(st.integers(1, 70)) if seed > 2 else 40, events, [1], layout)
        candidates = prompt(np.random.default_rng(draw(st.integers(0, 99))), 1, [], draw(items))
        encoded_prompts.append(dataclasses.replace(encoded, questions=candidates.questions, answers=candidates.answers))
    return encoded_prompts


items = st.lists(st.integers(1, 20), min_size=1, max_size=30) | st.just([1] * 100) | st.just([120])


def run(scorer: Scorer, scheduler: Scheduler, jobs: list[Job]) -> list[np.ndarray]:
    """Probabilities of each job's labels. One pass is planned while the one before it is computed, as in serving."""
    results = [np.full((len(job.prompt.questions), 2), np.nan, np.float32) for job in jobs]
    for job, result in zip(jobs, results, strict=True):
        job.owner = result
        scheduler.add(job)
    running = None
    while running or len(scheduler):
        following = scheduler.next_pass()
        started = scorer.dispatch([following]) if following else None
        if running:
            for part, log_probs in zip(running.passes[0].chunks, scorer.collect(running)[0], strict=True):
                part.owner.owner[part.questions.start : part.questions.stop] = normalize_over_labels(log_probs)
        running = started
    return results


@settings(deadline=None, max_examples=30)
@given(st.lists(prompts(), min_size=1, max_size=3))
def test_scores_are_those_of_each_prompt_alone_cold_or_hot(scorer, alone, rounds):
    scheduler = Scheduler(COSTS, PrefixCache(CACHE))
    for encoded_prompts in rounds:
        for actual, expected in zip(
            run(scorer, scheduler, [Job(encoded) for encoded in encoded_prompts]),
            alone.score_encoded(encoded_prompts),
            strict=True,
        ):
            np.testing.assert_allclose(actual, expected, atol=2e-5)


@settings(deadline=None, max_examples=60)
@given(prompts(), st.data())
def test_passes_keep_to_their_shape_and_lose_nothing(encoded_prompts, data):
    cache = PrefixCache(CACHE)
    scheduler = Scheduler(COSTS, cache)
    jobs = [Job(encoded) for encoded in encoded_prompts]
    for job in jobs:
        scheduler.add(job)
    done = {job: 0 for job in jobs}
    while pass_ := scheduler.next_pass():
        check_shape(pass_)
        for part in pass_.chunks:
            assert part.questions.start == done[part.owner]
            done[part.owner] = part.questions.stop
        if data.draw(st.integers(0, 9)) == 0 and len(scheduler):  # somebody goes away
            gone = data.draw(st.sampled_from(list(scheduler)))
            scheduler.remove(gone)
            del done[gone]
    assert all(done[job] == len(job.prompt.questions) for job in done)
    held = cache.acquire([bytes([page]) for page in range(CACHE - 1)])
    assert held is not None and held[1] == 0  # no page stays held  # noqa: PT018


def check_shape(pass_: Pass) -> None:
    assert pass_.bucket in COSTS
    assert pass_.chunks
    assert pass_.tokens <= pass_.bucket.tokens
    assert sum(len(part.questions) for part in pass_.chunks) <= pass_.bucket.max_candidates
    assert sum(len(part.cached_pages) for part in pass_.chunks) <= pass_.bucket.cached_pages
    written = list(itertools.chain(*(part.new_pages for part in pass_.chunks)))
    assert len(set(written)) == len(written)
    assert not set(written) & set(itertools.chain(*(part.cached_pages for part in pass_.chunks)))


def prompts_for_the_mesh() -> list[EncodedPrompt]:
    """The second of which finds most of its prefix cached."""
    encoded = prompt(np.random.default_rng(0), 100, [100], [3, 9, 5] * 20)
    return [encoded, dataclasses.replace(encoded, prefix_pieces=[*encoded.prefix_pieces, [5] * 30])]


def test_scores_are_the_same_on_a_mesh(alone, tmp_path):
    environment = os.environ | {"JAX_NUM_CPU_DEVICES": "4"}
    command = [sys.executable, "-m", "tests.scoring.test_scheduler", tmp_path / "scores.npy"]
    subprocess.run(command, cwd=Path(__file__).parents[2], env=environment, check=True)
    expected = np.concatenate(alone.score_encoded(prompts_for_the_mesh()))
    np.testing.assert_allclose(np.load(tmp_path / "scores.npy"), expected, atol=1e-5)


def main(out: str) -> None:
    """Scores them on four devices, the heads split over two, the tokens over two."""
    mesh = MeshConfig(context=2, tensor=2).build()
    shardings = jax.tree.map(lambda leaf: leaf.sharding, abstract_params(MODEL, mesh))
    sharded = jax.device_put(params(), shardings)
    scorer = Scorer(MODEL, sharded, Tokenizer.byte_level(), "dense", list(COSTS), mesh, CACHE)
    scheduler = Scheduler(COSTS, PrefixCache(CACHE))
    np.save(out, np.concatenate([run(scorer, scheduler, [Job(encoded)])[0] for encoded in prompts_for_the_mesh()]))


def test_a_second_request_pays_only_for_its_items(scorer):
    scheduler = Scheduler(COSTS, PrefixCache(CACHE))
    encoded = prompt(np.random.default_rng(0), 100, [100], [3, 3])
    cold, hot = Job(encoded), Job(encoded)
    for job in (cold, hot):
        run(scorer, scheduler, [job])
    assert (cold.num_cached_tokens, hot.num_cached_tokens) == (0, 200)
    longer = dataclasses.replace(encoded, prefix_pieces=[*encoded.prefix_pieces, [5] * 30])
    run(scorer, scheduler, [grown := Job(longer)])
    assert grown.num_cached_tokens == 200 // PAGE * PAGE


def test_two_that_begin_alike_compute_it_once():
    scheduler = Scheduler(COSTS, PrefixCache(CACHE))
    encoded = prompt(np.random.default_rng(0), 64, [], [3, 3])
    for job in (Job(encoded), Job(encoded)):
        scheduler.add(job)
    first, second = scheduler.next_pass(), scheduler.next_pass()
    assert [(len(part.new_pages), len(part.cached_pages)) for part in first.chunks + second.chunks] == [(1, 0), (0, 1)]


def test_a_short_request_does_not_wait_for_a_long_one():
    scheduler = Scheduler(COSTS, PrefixCache(CACHE))
    long, short = (
        Job(prompt(np.random.default_rng(0), length, [], [9] * count)) for length, count in ((9, 500), (5, 3))
    )
    scheduler.add(long)
    scheduler.next_pass()
    scheduler.add(short)
    passes = [scheduler.next_pass() for _ in range(2)]
    assert short in [part.owner for pass_ in passes for part in pass_.chunks]
    assert not long.finished


def test_higher_priorities_come_first_and_lower_ones_fill_what_is_left():
    scheduler = Scheduler(COSTS, PrefixCache(CACHE))
    low, high, last = (
        Job(prompt(np.random.default_rng(seed), 9, [], [9] * count), priority=priority)
        for seed, count, priority in ((0, 100, 0), (1, 10, 1), (2, 100, 0))
    )
    for job in (low, last, high):
        scheduler.add(job)
    assert list(scheduler) == [high, low, last]
    first = scheduler.next_pass()
    assert [part.owner for part in first.chunks] == [high, low]
    while not low.finished:  # whose passes count: the two take turns
        scheduler.next_pass()
    assert last.num_scored


def test_the_cheapest_shapes_are_chosen_by_cost():
    encoded = prompt(np.random.default_rng(0), 60, [], [8] * 20)  # 64 + 160 places
    for large, chosen in ((200, [256]), (300, [128, 128])):
        costs = {bucket: large if bucket.tokens == 256 else 110 for bucket in COSTS}
        scheduler = Scheduler(costs, PrefixCache(CACHE))
        scheduler.add(Job(encoded))
        passes = iter(scheduler.next_pass, None)
        assert [pass_.bucket.tokens for pass_ in passes] == chosen


@pytest.mark.parametrize(
    ("sizes", "message"),
    [
        ((600, [], [3]), r"the prefix has 600 tokens, over the limit of 512 \(max_prefix_tokens\)"),
        ((6, [], [3, 300]), r"an item has 300 tokens, over the longest row of 256 \(token_buckets\)"),
    ],
)
def test_what_no_pass_can_hold_is_refused(sizes, message):
    with pytest.raises(ValueError, match=message):
        Scheduler(COSTS, PrefixCache(CACHE)).check(prompt(np.random.default_rng(0), *sizes))


if __name__ == "__main__":
    main(sys.argv[1])
