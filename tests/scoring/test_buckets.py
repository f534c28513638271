import dataclasses
import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from brewjax.data.text.encode import EncodedPrompt
from brewjax.scoring.buckets import PACK_TO, STEP, choose_buckets, plan_passes
from brewjax.scoring.passes import LABELS_IN_PASS, Bucket

BUCKETS = (Bucket(128), Bucket(384))

prefixes = st.lists(st.integers(0, 60), min_size=1, max_size=3)
questions = st.lists(st.integers(1, 20), min_size=1, max_size=40) | st.just([1] * 150)
answers = st.none() | st.integers(0, 1)


@st.composite
def prompts(draw) -> list[EncodedPrompt]:
    """Prompts of which some are longer than the largest bucket; every question begins with a number of its own."""
    number, encoded_prompts = itertools.count(), []
    for _ in range(draw(st.integers(0, 12))):
        pieces = [[0] * length for length in draw(prefixes)]
        question_tokens = [[next(number), *[0] * (length - 1)] for length in draw(questions)]
        first_label = draw(st.integers(0, 60))
        encoded_prompts.append(
            EncodedPrompt(
                pieces,
                question_tokens,
                [first_label, first_label + 1],
                [draw(answers) for _ in question_tokens],
                "dense",
            )
        )
    return encoded_prompts


@settings(deadline=None, max_examples=50)
@given(prompts())
def test_a_plan_loses_and_mixes_nothing(prompts):
    passes = plan_passes(prompts, BUCKETS)
    for index, prompt in enumerate(prompts):
        parts = {part.owner[1]: part.prompt for pass_ in passes for part in pass_.chunks if part.owner[0] == index}
        joined: list[list[int]] = []
        for done, part in sorted(parts.items()):
            assert done == len(joined)
            joined += part.questions
            span = slice(done, done + len(part.questions))
            assert part == dataclasses.replace(prompt, questions=prompt.questions[span], answers=prompt.answers[span])
        assert joined == prompt.questions


@settings(deadline=None, max_examples=50)
@given(prompts())
def test_a_pass_takes_the_smallest_bucket_that_holds_it(prompts):
    for pass_ in plan_passes(prompts, BUCKETS):
        tokens = sum(len(part.prompt) for part in pass_.chunks)
        num_questions = sum(len(part.prompt.questions) for part in pass_.chunks)
        assert pass_.bucket == min(
            bucket for bucket in BUCKETS if tokens <= bucket.tokens and num_questions <= bucket.max_candidates
        )
        assert len({label for part in pass_.chunks for label in part.prompt.labels}) <= LABELS_IN_PASS


def test_a_question_that_does_not_fit_names_its_prompt():
    fits, long = (EncodedPrompt([[0] * prefix], [[0] * 5], [1, 2], [None], "dense") for prefix in (10, 380))
    with pytest.raises(
        ValueError, match="prompt 1: a prefix of 380 tokens and a question of 5 do not fit in a row of 384"
    ):
        plan_passes([fits, long], BUCKETS)


def tokens_run(lengths: list[int], buckets: tuple[int, ...]) -> int:
    """How many tokens are run when every prompt takes a pass of its own."""
    return sum(min(bucket for bucket in buckets if length <= bucket) for length in lengths)


@settings(deadline=None, max_examples=50)
@given(st.lists(st.integers(1, PACK_TO - STEP), min_size=1, max_size=9), st.integers(1, 4))
def test_chosen_buckets_are_the_best(lengths, limit):
    *chosen, largest = (bucket.tokens for bucket in choose_buckets(lengths, limit))
    assert largest == PACK_TO
    assert len(chosen) <= limit
    sizes = {-(-length // STEP) * STEP for length in lengths}
    alternatives = [(*rest, max(sizes)) for count in range(limit) for rest in itertools.combinations(sizes, count)]
    assert tokens_run(lengths, tuple(chosen)) == min(tokens_run(lengths, alternative) for alternative in alternatives)


def test_no_prompts_need_no_bucket_of_their_own():
    assert choose_buckets([]) == (Bucket(PACK_TO),)
    assert plan_passes([], BUCKETS) == []


def test_prompts_longer_than_shared_passes_have_buckets_too():
    assert max(choose_buckets(np.array([300, 9000]))) == Bucket(9088)
