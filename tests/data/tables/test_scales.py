"""The buckets of numbers are those of the training data, and of nothing later."""

import hypothesis
import numpy as np
import pytest
from hypothesis import strategies as st

from brewjax.data.tables.scales import Scales
from tests.data.conftest import Event, moment
from tests.data.tables.test_statistics import EVENTS, ITEMS, properties


@hypothesis.given(EVENTS, EVENTS, st.integers(1, 6))
@properties
def test_percentiles_know_nothing_of_the_time_they_are_not_fitted_on(jobs_with, events, later_events, until):
    early = [event for event in events if event.day < until]
    changed = early + [event for event in later_events if event.day >= until]
    hypothesis.assume(changed)
    scales, changed_scales = (Scales.fit(jobs_with(e, ITEMS), moment(until)) for e in (events, changed))
    assert scales == changed_scales
    assert set(scales.quantiles) == {"items.salary", "items.popularity"}


@hypothesis.given(st.lists(st.floats(allow_nan=False, allow_infinity=False), max_size=30), st.data())
def test_percentiles_rise_with_the_value_from_1_to_100(values, data):
    quantiles = np.quantile(values, np.arange(1, 100) / 100).tolist() if values else []
    scales = Scales(until=0, quantiles={"items.salary": quantiles})
    low, high = sorted(data.draw(st.tuples(st.floats(allow_nan=False), st.floats(allow_nan=False))))
    assert 1 <= scales.bucket("items.salary", low) <= scales.bucket("items.salary", high) <= 100


def test_percentiles_are_the_hundredths_of_the_training_data(jobs_with):
    """Item i has i events before the boundary, so a salary and a popularity in the middle are about percentile 50."""
    events = [Event(0, item, "applied", 1 + n / 100) for item in range(40) for n in range(item + 1)]
    dataset = jobs_with(events)
    scales = Scales.fit(dataset, moment(3))
    salaries = sorted(salary for salary in dataset.items["salary"].to_pylist() if salary is not None)
    buckets = [scales.bucket("items.salary", salary) for salary in salaries]
    assert np.abs(np.array(buckets) - np.linspace(1, 100, len(salaries))).max() <= 2
    assert [scales.bucket("items.salary", value) for value in (0, 1e9)] == [1, 100]
    counts = [n for item in range(40) for n in range(item + 1)]  # as of each event: those before it
    assert scales.bucket("items.popularity", np.median(counts)) == pytest.approx(50, abs=5)


def test_only_members_and_items_of_the_training_time_are_fitted_on(jobs_with):
    """Salaries of items 0 and 1 are 30,000 and 41,000; the other 38 items come later."""
    events = [
        Event(0, 0, "viewed", 0),
        Event(0, 1, "viewed", 1),
        *(Event(1, item, "viewed", 5) for item in range(2, 40)),
    ]
    scales = Scales.fit(jobs_with(events), moment(5))
    assert min(scales.quantiles["items.salary"]) >= 30_000
    assert max(scales.quantiles["items.salary"]) <= 41_000
