from __future__ import annotations

import hypothesis
import numpy as np
import pytest
from hypothesis import strategies as st

from brewjax.data.tables.point_in_time import PointInTimeIndex
from brewjax.data.tasks.examples import RankingExample, build_examples
from brewjax.evaluate.features import build_features
from tests.data.conftest import Event, moment

DAYS = 10
EVENTS = st.lists(
    st.builds(
        Event,
        member=st.integers(0, 3),
        item=st.integers(0, 11),
        action=st.sampled_from(["viewed", "applied"]),
        day=st.integers(0, DAYS),
        seconds=st.one_of(st.none(), st.integers(0, 100).map(float)),
    ),
    min_size=1,
    max_size=40,
)


def ask(member: int, items: list[int], day: float) -> RankingExample:
    nothing = np.zeros(0, np.int64)
    labels, exposures = np.zeros(len(items), int), np.full(len(items), -1)
    return RankingExample("apply", member, moment(day), nothing, 0, np.array(items), labels, exposures)


def rows(dataset, task, *examples: RankingExample) -> list[dict[str, float]]:
    features = build_features(dataset, task, examples)
    return [dict(zip(features.names, row.tolist(), strict=True)) for row in features.values]


def test_features_by_hand(jobs_with, task):
    dataset = jobs_with([
        Event(0, 0, "viewed", 1, 10.0), Event(0, 1, "applied", 2, 30.0), Event(0, 4, "applied", 6, 500.0),
        Event(1, 1, "viewed", 3, 50.0), Event(4, 1, "applied", 4, None), Event(1, 1, "viewed", 5, 70.0),
    ])  # fmt: skip
    [row] = rows(dataset, task, ask(member=0, items=[1], day=5))  # what happens on day 5 is not known yet
    expected = {
        "member viewed events": 1,
        "member applied events": 1,
        "member mean Seconds": 20,
        "member spread of Seconds": 10,
        "member mean answer Yes": 0.5,
        "member days since first event": 4,
        "member days since last event": 3,
        "item viewed events": 1,
        "item applied events": 2,
        "item mean Seconds": 40,
        "item mean answer Yes": 2 / 3,
        # Against what the item had until then: 50 - 30; the answers No after Yes, then Yes after one of each.
        "item mean Seconds above average": 20,
        "item mean answer Yes above average": (-1 + 0.5) / 2,
        "item days since last event": 1,
        "item days since Posted": 35,
        "item Salary": 41_000,
        # Jobs 0 and 1 share the company Acme; 1 is in Lisbon, 0 in Berlin.
        "member's share of Company": 1,
        "member's mean Seconds by Company": 20,
        "member's share of Location": 0.5,
        "member's mean Seconds by Location": 30,
        # Members 0 and 4 work for Acme.
        "item's share among the same Company": 2 / 3,
        "item's mean answer Yes among the same Company": 1,
    }
    assert {name: row[name] for name in expected} == pytest.approx(expected, rel=1e-6)


def test_nothing_known_is_nan_and_never_an_error(jobs, task):
    [row] = rows(jobs, task, ask(member=2, items=[5], day=-1000))
    assert row["member viewed events"] == row["item applied events"] == 0
    for name in ("member mean Seconds", "member days since last event", "member's share of Skills", "item Salary"):
        assert np.isnan(row[name])
    assert np.isnan(row["member Company"])  # null in the table


def test_features_of_a_list_are_columns(jobs, task):
    features = build_features(jobs, task, [ask(0, list(range(40)), 100)])
    skills = {
        name: column for name, column in zip(features.names, features.values.T, strict=True) if "Skills: " in name
    }
    for skill, column in skills.items():
        assert column.tolist() == [skill.removeprefix("item Skills: ") in s for s in jobs.items["skills"].to_pylist()]
    assert set(features.categorical) == {"member Company", "member Location", "item Company", "item Location"}


@hypothesis.given(EVENTS, EVENTS, st.integers(0, DAYS), st.booleans())
@hypothesis.settings(max_examples=50, deadline=None)
def test_nothing_at_or_after_the_cutoff_changes_a_feature(
    jobs_with, task, sampled_task, events, later_events, cutoff, sampled
):
    """All events at or after the cutoff are replaced by other events of the same and of other members and items."""
    future = [event._replace(day=event.day + cutoff) for event in later_events]
    known = [event for event in events if event.day < cutoff]
    chosen = sampled_task if sampled else task
    examples = [ask(member, [0, 5, 11], cutoff) for member in range(4)]
    before = build_features(jobs_with(events), chosen, examples)
    after = build_features(jobs_with(known + future), chosen, examples)
    assert before.names == after.names
    np.testing.assert_allclose(before.values, after.values, rtol=1e-6, atol=1e-6)


def test_an_example_has_the_same_features_alone_and_among_others(jobs, task):
    examples = list(build_examples(jobs, task, "train"))
    together = build_features(jobs, task, examples).values
    alone = np.concatenate([build_features(jobs, task, [example]).values for example in examples])
    np.testing.assert_array_equal(together, alone)


@hypothesis.given(st.lists(st.tuples(st.integers(0, 3), st.integers(0, 9), st.integers(-5, 5)), min_size=1), st.data())
def test_a_point_in_time_index_is_a_filter(events, data):
    keys, times, values = (np.array(column) for column in zip(*events, strict=True))
    key, time, days = data.draw(st.tuples(st.integers(0, 3), st.integers(-1, 11), st.sampled_from([None, 3])))
    day = 86_400_000_000
    index = PointInTimeIndex(keys, times * day)
    window = index.window(np.array([key]), np.array([time * day]), days)
    inside = (keys == key) & (times < time) & (times >= time - (days or np.inf))
    assert index.sum(values, window) == values[inside].sum()
    first, last = index.since(window, np.array([time * day]))
    if inside.any():
        assert (first, last) == (time - times[inside].min(), time - times[inside].max())
    else:
        assert np.isnan([first, last]).all()
