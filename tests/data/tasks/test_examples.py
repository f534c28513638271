from __future__ import annotations

import dataclasses
import datetime
import itertools

import hypothesis
import numpy as np
import pyarrow as pa
import pytest
from hypothesis import strategies as st

from brewjax.config import ConfigError
from brewjax.data.tables.card import Available
from brewjax.data.tables.dataset import Dataset
from brewjax.data.tables.point_in_time import DAY
from brewjax.data.tasks.chunks import MIN_CANDIDATES_PER_EXAMPLE
from brewjax.data.tasks.examples import (
    RankingExample,
    build_examples,
    example_at,
    history_before,
    sample_examples,
)
from brewjax.data.tasks.task import Split, Task, TimeSplit
from tests.data.conftest import Event, moment
from tests.tables import with_column, write_dataset

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
    asks="window_days: 0.5, span_days: 99",
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
        [f"questions.{part.replace(': ', '=')}" for part in asks.split(", ")],
    )


def expected_questions(events: list[Event], member: int, start: float, end: float, window: float = 0.5) -> list[Event]:
    """The questions of a member in a period: of each item the first event, and again after each window; an event that
    applies within the window is the answer."""
    questions = []
    member_events = [event for event in in_order(events, member) if event.day < end]
    for item in range(ITEMS):
        opened = None
        for event in (event for event in member_events if event.item == item):
            if opened is None or event.day > opened.day + window:
                opened = event
                within = [e for e in member_events if e.item == item and event.day <= e.day <= event.day + window]
                answer = "applied" if any(e.action == "applied" for e in within) else "viewed"
                first = next(e for e in within if e.day >= event.day)
                questions.append(event._replace(action=answer, seconds=member_events.index(first)))
    return sorted((q for q in questions if q.day >= start), key=lambda q: (q.day, q.seconds))


def in_order(events: list[Event], member: int) -> list[Event]:
    return sorted((event for event in events if event.member == member), key=lambda event: event.day)


def days(dataset: Dataset, rows: np.ndarray) -> np.ndarray:
    return (dataset.event_time[rows] - moment(0)) / 86_400_000_000


def same(first: RankingExample, second: RankingExample) -> bool:
    return all(np.array_equal(getattr(first, name), getattr(second, name)) for name in vars(first))


@hypothesis.given(EVENTS, st.integers(1, 12))
@hypothesis.settings(max_examples=60, deadline=None)
def test_every_question_once_in_its_split_with_only_the_past_before_it(jobs_with, events, candidates_per_prompt):
    dataset = jobs_with(events, ITEMS)
    task = make_task(candidates_per_prompt=candidates_per_prompt)
    for split, (start, end) in SPLITS.items():
        examples = list(build_examples(dataset, task, split))
        for member, group in itertools.groupby(examples, key=lambda example: example.member):
            member_events = in_order(events, member)
            questions = expected_questions(events, member, start, end)
            for example in group:
                chunk, questions = questions[: len(example.candidates)], questions[len(example.candidates) :]
                assert example.candidates.tolist() == [event.item for event in chunk]
                assert [task.words[label] for label in example.labels] == [
                    "Yes" if event.action == "applied" else "No" for event in chunk
                ]
                max_candidates = min(candidates_per_prompt, max(example.num_past_events, MIN_CANDIDATES_PER_EXAMPLE))
                assert len(chunk) == max_candidates or not questions, "prompts are filled"
                assert example.cutoff_time == moment(min(event.day for event in chunk)), (
                    "no candidate is older than the cutoff"
                )
                past = [event for event in member_events if moment(event.day) < example.cutoff_time]
                assert dataset.event_item[example.history].tolist() == [event.item for event in past]
                assert [dataset.action_name(row) for row in example.history] == [event.action for event in past]
                assert set(dataset.event_member[example.history]) <= {member}
                assert (dataset.event_time[example.history] < example.cutoff_time).all()
                assert example.num_past_events == len(past)
            assert not questions, "no question is left out"
        in_split = [event for event in events if expected_questions(events, event.member, start, end)]
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
        history_events = [event for event in past if event.action == action and cutoff - event.day <= oldest]
        rows, count = history_before(dataset, task, member, moment(cutoff))
        assert (
            dataset.event_item[rows].tolist()
            == [event.item for event in history_events][max(0, len(history_events) - max_events) :]
        )
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
    for example, early_example in zip(whole, build_examples(dataset, task, "train"), strict=True):
        assert (example.member, example.cutoff_time, example.num_past_events) == (
            early_example.member,
            early_example.cutoff_time,
            early_example.num_past_events,
        )
        assert example.candidates.tolist() == early_example.candidates.tolist()
        assert len(example.history) == len(early_example.history)
        assert (days(dataset, early_example.history) < boundary).all()


@hypothesis.given(EVENTS, st.integers(1, 4), st.integers(1, 9), st.sampled_from([0, 0.5, 1]))
@hypothesis.settings(max_examples=60, deadline=None)
def test_sampled_negatives_exist_and_are_not_touched_by_the_end_of_the_split(
    jobs_with, events, per_event, candidates_per_prompt, power
):
    dataset = jobs_with(events, ITEMS)
    negatives = f'{{label: "No", per_event: {per_event}, popularity: {power}}}'
    task = make_task(candidates_per_prompt=candidates_per_prompt, negatives=negatives)
    for split, (_, end) in SPLITS.items():
        for example in build_examples(dataset, task, split):
            yes, no = (example.candidates[example.labels == label].tolist() for label in (0, 1))
            exists = {event.item for event in events if moment(event.day) < example.cutoff_time}
            touched = {event.item for event in events if event.member == example.member and event.day < end}
            assert set(yes) <= exists, "what no event spoke of before would be known by that"
            assert set(no) <= exists - touched
            assert len(set(no)) == len(no) == min(per_event * len(yes), len(exists - touched))
            assert len(example.candidates) <= max(candidates_per_prompt, 1 + per_event)


def test_negatives_share_a_value_with_the_item_they_are_sampled_for(jobs):
    task = make_task(negatives='{label: "No", per_event: 2, same: company}')
    companies = jobs.items["company"].to_pylist()
    examples = list(build_examples(jobs, task, "test"))
    assert any((example.labels == 1).any() for example in examples)
    for example in examples:
        for item, exposure in zip(example.candidates, example.exposures, strict=True):
            assert companies[item] == companies[jobs.event_item[exposure]]


def test_popular_items_are_drawn_more_often(jobs_with):
    """Item 0 has 27 events and item 1 one; at power 1 it is drawn about 27 times as often, at 0 as often."""
    past = [Event(1, 0, "viewed", day / 10) for day in range(27)] + [Event(1, 1, "viewed", 0)]
    asks = [Event(2, 2, "viewed", 0), *(Event(0, 2, "applied", 8 + step) for step in range(0, 200, 2))]
    shares = {}
    for power in (0, 1):
        task = make_task(
            negatives=f'{{label: "No", per_event: 1, popularity: {power}}}',
            candidates_per_prompt=2,
            asks="window_days: 0.5, span_days: 1, repeats: true",
        )
        examples = build_examples(jobs_with([*past, *asks], 3), task, "test")
        negatives = [item for e in examples for item in e.candidates[e.labels == 1].tolist()]
        shares[power] = negatives.count(0) / len(negatives)
    assert abs(shares[0] - 0.5) < 0.2
    assert shares[1] > 0.85


def test_the_seed_and_nothing_else_chooses_the_negatives(jobs):
    task = make_task(negatives='{label: "No", per_event: 3}')
    whole = {seed: list(build_examples(jobs, task, "test", seed)) for seed in (0, 1)}
    assert all(map(same, whole[0], build_examples(jobs, task, "test", seed=0)))
    assert not all(map(same, whole[0], whole[1]))
    for first, second in zip(whole[0], whole[1], strict=True):
        assert first.candidates[first.labels == 0].tolist() == second.candidates[second.labels == 0].tolist()


@hypothesis.given(EVENTS, st.none() | st.integers(0, 9))
@hypothesis.settings(max_examples=30, deadline=None)
def test_now_a_member_is_asked_about_every_item_not_touched_before(jobs_with, events, day):
    dataset = jobs_with(events, ITEMS)
    for member in range(4):
        past = [event for event in in_order(events, member) if day is None or event.day < day]
        later = {e.item for e in events} - {e.item for e in events if day is None or e.day < day}
        untouched = sorted(set(range(ITEMS)) - {event.item for event in past} - later)
        if not untouched:
            with pytest.raises(ValueError, match="there is no item to rank"):
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
        next(build_examples(jobs, task, "test"))
    assert str(error.value) == "applies.yaml:12: labels.2.match: an event can be both 'Yes' and 'Surely'"


def test_an_event_that_matches_no_label_is_not_a_question_but_is_told(jobs_with):
    task = make_task(negatives='{label: "No", per_event: 1}')
    events = [Event(0, 1, "viewed", 7), Event(0, 2, "applied", 8), Event(1, 2, "viewed", 0)]
    (example,) = build_examples(jobs_with(events), task, "test")
    assert example.candidates[example.labels == 0].tolist() == [2]
    assert example.history.tolist() == [0]


def test_a_split_without_questions_has_no_examples(jobs_with):
    assert list(build_examples(jobs_with([Event(0, 1, "viewed", 7)]), make_task(), "train")) == []


def test_an_item_without_a_name_is_called_by_its_id(jobs):
    titles = pa.array([None, "", " ", *jobs.items["title"].to_pylist()[3:]])
    dataset = dataclasses.replace(jobs, items=with_column("title", titles)(jobs.items))
    assert [dataset.item_name(row) for row in range(4)] == ["100", "101", "102", "Teacher (senior)"]


def outcome_task(window: float = 1) -> Task:
    return Task.parse(f"""
name: applies_after_a_view
instruction: Predict.
history: {{actions: [viewed, applied]}}
questions: {{question: Will they, actions: [viewed], outcomes: [applied], window_days: {window}, span_days: 99}}
labels: [{{word: "Yes", value: 1, match: {{action: applied}}}}, {{word: "No", value: 0}}]
split: {{validation: 2025-01-05, test: 2025-01-07}}
""")


@hypothesis.given(EVENTS, st.integers(1, 3))
@hypothesis.settings(max_examples=60, deadline=None)
def test_an_exposure_is_one_question_whose_answer_is_what_followed_within_the_window(jobs_with, events, window):
    dataset = jobs_with(events, ITEMS)
    last = max(event.day for event in events)
    for split, (start, end) in SPLITS.items():
        expected = []
        for member in range(3):
            for item in range(ITEMS):
                pair_events = [e for e in in_order(events, member) if e.item == item and e.day < end]
                opened = -99
                for view in (event for event in pair_events if event.action == "viewed"):
                    if view.day <= opened + window:
                        continue
                    opened = view.day
                    applied = [
                        e for e in pair_events if e.action == "applied" and view.day <= e.day <= view.day + window
                    ]
                    if start <= view.day and view.day + window <= min(last, end):
                        expected.append((member, item, view.day, not applied))
        actual = [
            (example.member, item, (dataset.event_time[exposure] - moment(0)) / DAY, bool(label))
            for example in build_examples(dataset, outcome_task(window), split)
            for item, exposure, label in zip(example.candidates, example.exposures, example.labels, strict=True)
        ]
        assert sorted(actual) == sorted(expected)


def test_a_view_and_the_application_that_follows_are_one_question(jobs_with):
    """The README's own task once asked about the same job twice, "No" and "Yes"."""
    dataset = jobs_with([Event(0, 1, "viewed", 7), Event(0, 1, "applied", 7.002), Event(0, 2, "viewed", 7.5)])
    (example,) = build_examples(dataset, make_task(asks="window_days: 1, span_days: 1"), "test")
    assert list(zip(example.candidates.tolist(), example.labels.tolist(), strict=True)) == [(1, 0), (2, 1)]


def test_the_questions_of_a_prompt_lie_within_its_span(jobs_with):
    dataset = jobs_with([Event(0, item, "viewed", 7 + 300 * item) for item in range(4)])
    for span, prompts in ((1, 4), (301, 2), (9_999, 1)):
        task = make_task(candidates_per_prompt=9, asks=f"window_days: 1, span_days: {span}")
        assert len(list(build_examples(dataset, task, "test"))) == prompts


def test_repeats_are_asked_or_not(jobs_with):
    dataset = jobs_with([Event(0, 1, "viewed", 0), Event(0, 1, "viewed", 8), Event(0, 2, "viewed", 8)])
    for repeats, items in (("true", [1, 2]), ("false", [2])):
        task = make_task(asks=f"window_days: 1, span_days: 1, repeats: {repeats}")
        (example,) = build_examples(dataset, task, "test")
        assert example.candidates.tolist() == items
        assert (1 in example_at(dataset, task, 0).candidates) == (repeats == "true")


def test_the_candidates_of_a_request_are_one_list(jobs_with):
    dataset = jobs_with([Event(0, item, "viewed", 7 + item % 2 / 100) for item in range(5)])
    requests = pa.array(["b" if event.as_py() % 2 else "a" for event in dataset.events["item_id"]])
    card = dataset.card.model_copy(update={"events": dataset.card.events.model_copy(update={"request": "list"})})
    dataset = dataclasses.replace(dataset, card=card, events=dataset.events.append_column("list", requests))
    examples = list(build_examples(dataset, make_task(asks="per_request: true, window_days: 1"), "test"))
    assert sorted(example.candidates.tolist() for example in examples) == [[0, 2, 4], [1, 3]]
    assert len({example.request for example in examples}) == 2


def test_who_is_asked_about_what(jobs_with):
    events = [Event(member, item, "viewed", 7 + item / 100) for member in range(3) for item in range(4)]
    dataset = jobs_with(events)
    task = make_task(candidates_per_prompt=9, asks="window_days: 1, span_days: 1")
    where = {"member.position": ["Nurse", "Accountant"], "item.salary": {"above": 30_000, "max": 60_000}}
    task = task.model_copy(update={"questions": task.questions.model_copy(update={"where": where})})
    salaries, positions = dataset.items["salary"].to_pylist(), dataset.members["position"].to_pylist()
    examples = list(build_examples(dataset, task, "test"))
    assert {positions[example.member] for example in examples} == {"Nurse", "Accountant"}
    for example in [*examples, example_at(dataset, task, 1)]:
        assert all(salaries[item] and 30_000 < salaries[item] <= 60_000 for item in example.candidates)


def test_nothing_is_asked_about_an_item_outside_its_life(jobs_with):
    """Jobs are posted from December 2024 on, a day apart; a card that says so is believed."""
    dataset = jobs_with([Event(0, item, "viewed", 7) for item in range(6)])
    posted = pa.array([date + datetime.timedelta(days=36) for date in dataset.items["posted"].to_pylist()])
    items = with_column("posted", posted)(dataset.items)
    available = Available.model_validate({"from": "posted"})
    card = dataset.card.model_copy(update={"items": dataset.card.items.model_copy(update={"available": available})})
    dataset = dataclasses.replace(dataset, card=card, items=items)
    task = make_task(candidates_per_prompt=9, asks="window_days: 1, span_days: 1")
    (example,) = build_examples(dataset, task, "test")
    assert example.candidates.tolist() == [0, 1, 2], "day 7 is January 8, and item 0 is of January 6"
    assert example_at(dataset, task, 1, moment(9)).candidates.tolist() == [0, 1, 2, 3, 4]


def test_events_without_times_split_members(jobs_with, tmp_path):
    """With neither time nor order each member is in one period, and the history is what else the member did."""
    folder = write_dataset(
        tmp_path / "jobs",
        card=lambda text: text.replace("events:\n", "events:\n  time: null\n"),
        events=lambda table: table.drop_columns(["time"]),
    )
    dataset = Dataset.load(folder)
    task = make_task().model_copy(update={"split": TimeSplit(validation="50%", test="75%")})
    members = {split: {e.member for e in build_examples(dataset, task, split)} for split in SPLITS}
    shared = [a & b for a, b in itertools.combinations(members.values(), 2)]
    assert sum(map(len, shared)) <= 2, "only a member at a boundary is in two"
    for example in build_examples(dataset, task, "test"):
        assert set(dataset.event_member[example.history]) <= {example.member}
        assert dataset.describe_moment(example.cutoff_time) == ""


def test_an_order_stands_for_times(tmp_path):
    folder = write_dataset(
        tmp_path / "jobs",
        card=lambda text: text.replace("events:\n", "events:\n  order: step\n"),
        events=lambda table: table.drop_columns(["time"]).append_column(
            "step", pa.array(np.argsort(np.argsort(table["time"].to_numpy())))
        ),
    )
    ordered, timed = Dataset.load(folder), Dataset.load(write_dataset(tmp_path / "timed"))
    assert ordered.events["item_id"].equals(timed.events["item_id"])
    last = len(timed.events) - 1
    assert ordered.describe_moment(ordered.last_event_time) == f"step {last:,}"
    assert timed.describe_moment(moment(1)) == "2025-01-02 00:00:00 UTC"


def test_the_same_negatives_whichever_other_members_there_are(jobs):
    """Draws depend on seed, task, member and time, and on nothing that another member's draws left."""
    task = make_task(negatives='{label: "No", per_event: 3}')
    examples = list(build_examples(jobs, task, "test"))
    few = sample_examples(jobs, task, "test", 3)
    assert len(few) == 3
    assert all(any(same(example, full) for full in examples) for example in few)
