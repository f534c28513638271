from __future__ import annotations

import math

import hypothesis
import numpy as np
import pytest
from hypothesis import strategies as st

from brewjax.data.tables.card import Statistic
from brewjax.data.tables.statistics import ItemStatistic, Percentiles
from tests.data.conftest import Event, moment

ITEMS = 4
EVENTS = st.lists(
    st.builds(
        Event,
        st.integers(0, 2),
        st.integers(0, ITEMS - 1),
        st.sampled_from(["viewed", "applied"]),
        st.integers(0, 6),
        st.none() | st.floats(-1e6, 1e6, width=32),
    ),
    min_size=1,
    max_size=30,
)


@hypothesis.given(EVENTS, st.sets(st.sampled_from(["viewed", "applied"]), min_size=1), st.integers(0, 7))
@hypothesis.settings(max_examples=60, deadline=None)
def test_a_count_is_of_the_events_strictly_before(jobs_with, events, actions, day):
    statistic = ItemStatistic(jobs_with(events, ITEMS), Statistic(count=sorted(actions)))
    for item in range(ITEMS):
        before = [event for event in events if event.item == item and event.day < day and event.action in actions]
        assert statistic.at(np.array([item]), np.array([moment(day)]))[0] == len(before)


@hypothesis.given(EVENTS, st.integers(0, 7))
@hypothesis.settings(max_examples=60, deadline=None)
def test_a_mean_is_over_the_known_values_strictly_before(jobs_with, events, day):
    statistic = ItemStatistic(jobs_with(events, ITEMS), Statistic(mean="seconds"))
    for item in range(ITEMS):
        before = [event for event in events if event.item == item and event.day < day]
        known = [event.seconds for event in before if event.seconds is not None]
        found = statistic.at(np.array([item]), np.array([moment(day)]))[0]
        if known:
            assert found == pytest.approx(np.mean(known), abs=1e-6)
        else:
            assert math.isnan(found)


@hypothesis.given(EVENTS, EVENTS, st.integers(1, 6))
@hypothesis.settings(max_examples=40, deadline=None)
def test_percentiles_know_nothing_of_the_time_they_are_not_fitted_on(jobs_with, events, others, until):
    early = [event for event in events if event.day < until]
    changed = early + [event for event in others if event.day >= until]
    hypothesis.assume(changed)
    one, other = (Percentiles.fit(jobs_with(e, ITEMS), moment(until)) for e in (events, changed))
    assert one == other
    assert set(one.quantiles) == {"items.salary", "items.popularity"}


@hypothesis.given(st.lists(st.floats(allow_nan=False, allow_infinity=False), max_size=30), st.data())
def test_percentiles_rise_with_the_value_from_1_to_100(values, data):
    scale = Percentiles({"items.salary": np.quantile(values, np.arange(1, 100) / 100).tolist() if values else []})
    low, high = sorted(data.draw(st.tuples(st.floats(allow_nan=False), st.floats(allow_nan=False))))
    assert 1 <= scale.percentile("items", "salary", low) <= scale.percentile("items", "salary", high) <= 100


def test_percentiles_are_the_hundredths_of_the_training_data(jobs_with):
    """Item i has i events before the boundary, so a salary and a popularity in the middle are about percentile 50."""
    events = [Event(0, item, "applied", 1 + n / 100) for item in range(40) for n in range(item + 1)]
    dataset = jobs_with(events)
    scale = Percentiles.fit(dataset, moment(3))
    salaries = sorted(salary for salary in dataset.items["salary"].to_pylist() if salary is not None)
    said = [scale.percentile("items", "salary", salary) for salary in salaries]
    assert np.abs(np.array(said) - np.linspace(1, 100, len(salaries))).max() <= 2
    assert [scale.percentile("items", "salary", value) for value in (0, 1e9)] == [1, 100]
    counts = [n for item in range(40) for n in range(item + 1)]  # as of each event: those before it
    assert scale.percentile("items", "popularity", np.median(counts)) == pytest.approx(50, abs=5)


def test_only_members_and_items_of_the_training_time_are_fitted_on(jobs_with):
    """Salaries of items 0 and 1 are 30,000 and 41,000; the other 38 items come later."""
    events = [
        Event(0, 0, "viewed", 0),
        Event(0, 1, "viewed", 1),
        *(Event(1, item, "viewed", 5) for item in range(2, 40)),
    ]
    scale = Percentiles.fit(jobs_with(events), moment(5))
    assert min(scale.quantiles["items.salary"]) >= 30_000
    assert max(scale.quantiles["items.salary"]) <= 41_000
