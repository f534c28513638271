from __future__ import annotations

import dataclasses
import itertools

import hypothesis
import numpy as np
import pyarrow as pa
import pytest
from hypothesis import strategies as st

from brewjax.config import ConfigError
from brewjax.data.tables.dataset import Dataset
from brewjax.data.tasks.examples import (
    MIN_CANDIDATES_PER_EXAMPLE,
    RankingExample,
    build_examples,
    example_at,
    history_before,
)
from brewjax.data.tasks.task import Split, Task
from tests.data.conftest import Event, moment
from tests.tables import with_column

SPLITS: dict[Split, tuple[int, int]] = {"train": (0, 4), "validation": (4, 6), "test": (6, 99)}  # days
ITEMS = 6

# Few days, members and items: most events share their time with others of the same member, and their item too.
EVENTS = st.lists(
    st.builds(
        Event, st.integers(0, 2), st.integers(0, ITEMS - 1), st.sampled_from(["viewed", "applied"]), st.integers(0, 8)
    ),
    min_size=1,
    max_size=40,
)


def make_task(
    max_events=100,
    max_age_days="null",
    actions="[viewed, applied]",
    candidates_per_prompt=3,
    negatives="null",
    third_label="",
) -> Task:
    """Will a member apply; jobs that were only viewed say no, or, with `negatives`, jobs that were not even that."""
    no = "match: {action: viewed}" if negatives == "null" else "match: null"
    return Task.parse(
        f"""\
name: applies
instruction: Predict.
history: {{actions: {actions}, max_events: {max_events}, max_age_days: {max_age_days}}}
questions:
  question: Will the member apply
  actions: [viewed, applied]
  candidates_per_prompt: {candidates_per_prompt}
  sampled_negatives: {negatives}
labels:
  - {{word: "Yes", value: 1, match: {{action: applied}}}}
  - {{word: "No", value: 0, {no}}}
{third_label}
split: {{validation: 2025-01-05, test: 2025-01-07}}
""",
        "applies.yaml",
    )


def in_order(events: list[Event], member: int) -> list[Event]:
    return sorted((event for event in events if event.member == member), key=lambda event: event.day)


def days(dataset: Dataset, rows: np.ndarray) -> np.ndarray:
    return (dataset.event_time[rows] - moment(0)) / 86_400_000_000


def same(one: RankingExample, other: RankingExample) -> bool:
    return all(np.array_equal(getattr(one, name), getattr(other, name)) for name in vars(one))


@hypothesis.given(EVENTS, st.integers(1, 12))
@hypothesis.settings(max_examples=60, deadline=None)
def test_every_question_once_in_its_split_with_only_the_past_before_it(jobs_with, events, candidates_per_prompt):
    dataset = jobs_with(events, ITEMS)
    task = make_task(candidates_per_prompt=candidates_per_prompt)
    for split, (start, end) in SPLITS.items():
        examples = list(build_examples(dataset, task, split))
        for member, group in itertools.groupby(examples, key=lambda example: example.member):
            own = in_order(events, member)
            questions = iter([event for event in own if start <= event.day < end])
            for example in group:
                asked = list(itertools.islice(questions, len(example.candidates)))
                assert example.candidates.tolist() == [event.item for event in asked]
                assert [task.words[label] for label in example.labels] == [
                    "Yes" if event.action == "applied" else "No" for event in asked
                ]
                together = min(candidates_per_prompt, max(example.num_past_events, MIN_CANDIDATES_PER_EXAMPLE))
                assert len(asked) == together or next(questions, None) is None, "prompts are filled"
                assert example.cutoff_time == moment(min(event.day for event in asked)), (
                    "no candidate is older than the cutoff"
                )
                past = [event for event in own if moment(event.day) < example.cutoff_time]
                assert dataset.event_item[example.history].tolist() == [event.item for event in past]
                assert dataset.event_action[example.history].tolist() == [event.action for event in past]
                assert set(dataset.event_member[example.history]) <= {member}
                assert (dataset.event_time[example.history] < example.cutoff_time).all()
                assert example.num_past_events == len(past)
            assert next(questions, None) is None, "no question is left out"
        in_split = [event for event in events if start <= event.day < end]
        assert {example.member for example in examples} == {event.member for event in in_split}


@hypothesis.given(
    EVENTS, st.integers(0, 5), st.sampled_from(["null", 0.5, 1, 2.5]), st.sampled_from(["viewed", "applied"])
)
@hypothesis.settings(max_examples=60, deadline=None)
def test_history_is_the_newest_of_the_wanted_actions_and_ages(jobs_with, events, max_events, max_age, action):
    dataset = jobs_with(events, ITEMS)
    task = make_task(max_events, max_age, f"[{action}]")
    oldest = 99 if max_age == "null" else max_age
    for member, cutoff in itertools.product(range(4), (0, 3, 9)):
        past = [event for event in in_order(events, member) if event.day < cutoff]
        told = [event for event in past if event.action == action and cutoff - event.day <= oldest]
        rows, count = history_before(dataset, task, member, moment(cutoff))
        assert dataset.event_item[rows].tolist() == [event.item for event in told][max(0, len(told) - max_events) :]
        assert (np.diff(dataset.event_time[rows]) >= 0).all()
        assert count == len(past)


@hypothesis.given(EVENTS)
@hypothesis.settings(max_examples=40, deadline=None)
def test_training_ends_where_validation_begins(jobs_with, events):
    """What happens from the boundary on changes no example of training: neither what is told nor what is asked."""
    task = make_task()
    boundary = SPLITS["train"][1]
    whole = list(build_examples(jobs_with(events, ITEMS), task, "train"))
    early = [event for event in events if event.day < boundary]
    if not early:
        assert not whole
        return
    dataset = jobs_with(early, ITEMS)
    for example, other in zip(whole, build_examples(dataset, task, "train"), strict=True):
        assert (example.member, example.cutoff_time, example.num_past_events) == (
            other.member,
            other.cutoff_time,
            other.num_past_events,
        )
        assert example.candidates.tolist() == other.candidates.tolist()
        assert len(example.history) == len(other.history)
        assert (days(dataset, other.history) < boundary).all()


@hypothesis.given(EVENTS, st.integers(1, 4), st.integers(1, 9))
@hypothesis.settings(max_examples=60, deadline=None)
def test_sampled_negatives_are_items_the_member_had_not_touched_by_the_end_of_the_split(
    jobs_with, events, per_event, candidates_per_prompt
):
    dataset = jobs_with(events, ITEMS)
    task = make_task(candidates_per_prompt=candidates_per_prompt, negatives=f'{{label: "No", per_event: {per_event}}}')
    for split, (start, end) in SPLITS.items():
        positives = {member: [] for member in range(3)}
        for example in build_examples(dataset, task, split):
            yes, no = (example.candidates[example.labels == label].tolist() for label in (0, 1))
            touched = {event.item for event in events if event.member == example.member and event.day < end}
            untouched = set(range(ITEMS)) - touched
            assert set(no) <= untouched
            assert len(set(no)) == len(no) == min(per_event * len(yes), len(untouched))
            assert len(example.candidates) <= max(candidates_per_prompt, 1 + per_event)
            positives[example.member] += yes
        for member, found in positives.items():
            applied = [e for e in in_order(events, member) if start <= e.day < end and e.action == "applied"]
            assert found == [event.item for event in applied]


def test_the_seed_and_nothing_else_chooses_the_negatives(jobs):
    task = make_task(negatives='{label: "No", per_event: 3}')
    whole = {seed: list(build_examples(jobs, task, "test", seed)) for seed in (0, 1)}
    assert all(map(same, whole[0], build_examples(jobs, task, "test", seed=0)))
    assert not all(map(same, whole[0], whole[1]))
    for one, other in zip(whole[0], whole[1], strict=True):
        assert one.candidates[one.labels == 0].tolist() == other.candidates[other.labels == 0].tolist()


@hypothesis.given(EVENTS, st.none() | st.integers(0, 9))
@hypothesis.settings(max_examples=30, deadline=None)
def test_now_a_member_is_asked_about_every_item_not_touched_before(jobs_with, events, day):
    dataset = jobs_with(events, ITEMS)
    for member in range(4):
        past = [event for event in in_order(events, member) if day is None or event.day < day]
        untouched = sorted(set(range(ITEMS)) - {event.item for event in past})
        if not untouched:
            with pytest.raises(ValueError, match="none left to rank"):
                example_at(dataset, make_task(), member, None if day is None else moment(day))
            continue
        example = example_at(dataset, make_task(), member, None if day is None else moment(day))
        assert example.candidates.tolist() == untouched
        assert example.labels.tolist() == [-1] * len(untouched)
        assert dataset.event_item[example.history].tolist() == [event.item for event in past]
        assert example.num_past_events == len(past)
        assert example.select(slice(2)).candidates.tolist() == untouched[:2]


def test_an_event_that_matches_two_labels_is_refused(jobs):
    task = make_task(third_label='  - {word: "Surely", value: 2, match: {action: [applied]}}')
    with pytest.raises(ConfigError) as error:
        next(build_examples(jobs, task, "train"))
    assert str(error.value) == "applies.yaml:12: labels.2.match: an event can be both 'Yes' and 'Surely'"


def test_an_event_that_matches_no_label_is_not_a_question_but_is_told(jobs_with):
    task = make_task(negatives='{label: "No", per_event: 1}')
    (example,) = build_examples(jobs_with([Event(0, 1, "viewed", 7), Event(0, 2, "applied", 8)]), task, "test")
    assert example.candidates[example.labels == 0].tolist() == [2]
    assert example.history.tolist() == [0]


def test_a_split_without_questions_has_no_examples(jobs_with):
    assert list(build_examples(jobs_with([Event(0, 1, "viewed", 7)]), make_task(), "train")) == []


def test_an_item_without_a_name_is_called_by_its_id(jobs):
    titles = pa.array([None, "", " ", *jobs.items["title"].to_pylist()[3:]])
    dataset = dataclasses.replace(jobs, items=with_column("title", titles)(jobs.items))
    assert [dataset.item_name(row) for row in range(4)] == ["100", "101", "102", "Teacher (senior)"]
