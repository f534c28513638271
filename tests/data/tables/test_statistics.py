"""Facts against plain definitions over lists of events."""

from __future__ import annotations

import math

import hypothesis
import numpy as np
import pytest
from hypothesis import strategies as st

from brewjax.data.tables.dataset import Dataset
from brewjax.data.tables.facts import Fact
from brewjax.data.tables.point_in_time import PointInTimeIndex
from brewjax.data.tables.statistics import FactValues
from tests.data.conftest import DAY_ZERO, Event, moment

ITEMS, MEMBERS = 4, 3
EVENTS = st.lists(
    st.builds(
        Event,
        st.integers(0, MEMBERS - 1),
        st.integers(0, ITEMS - 1),
        st.sampled_from(["viewed", "applied"]),
        st.integers(0, 6),
        st.none() | st.floats(-1e6, 1e6, width=32),
    ),
    min_size=1,
    max_size=30,
)
properties = hypothesis.settings(max_examples=40, deadline=None)


def values(dataset: Dataset, group: str, fact: Fact, day: float) -> np.ndarray:
    """A fact of every member and item as of a day, [members, items]."""
    members, items = (grid.ravel() for grid in np.meshgrid(np.arange(MEMBERS), np.arange(ITEMS), indexing="ij"))
    times = np.full(len(items), moment(day))
    return FactValues(dataset).values(group, fact, members, items, times).reshape(MEMBERS, ITEMS)


def mean_before(events: list[Event], day: float) -> float:
    """The mean of the known seconds before a day; NaN if there are none."""
    known = [event.seconds for event in events if event.day < day and event.seconds is not None]
    return math.fsum(known) / len(known) if known else math.nan


@hypothesis.given(EVENTS, st.sets(st.sampled_from(["viewed", "applied"]), min_size=1), st.integers(0, 7))
@properties
def test_a_count_is_of_the_events_strictly_before(jobs_with, events, actions, day):
    dataset, fact = jobs_with(events, ITEMS), Fact(name="n", count=sorted(actions))
    recent = fact.model_copy(update={"days": 2})
    for group, key in (("members", lambda e: e.member), ("items", lambda e: e.item)):
        counts, recent_counts = values(dataset, group, fact, day), values(dataset, group, recent, day)
        for member in range(MEMBERS):
            for item in range(ITEMS):
                matching = [
                    e for e in events if key(e) == (member if group == "members" else item) and e.action in actions
                ]
                assert counts[member, item] == len([e for e in matching if e.day < day])
                assert recent_counts[member, item] == len([e for e in matching if day - 2 <= e.day < day])


@hypothesis.given(EVENTS, st.integers(0, 7), st.sampled_from([0, 3]))
@properties
def test_a_mean_is_over_the_known_values_strictly_before_drawn_to_that_of_all(jobs_with, events, day, shrink):
    actual = values(jobs_with(events, ITEMS), "items", Fact(name="m", mean="seconds", shrink=shrink), day)
    prior = mean_before(events, day)
    for item in range(ITEMS):
        item_events = [event for event in events if event.item == item]
        known = [event.seconds for event in item_events if event.day < day and event.seconds is not None]
        expected = mean_before(item_events, day)
        if shrink and not math.isnan(prior):
            expected = (math.fsum(known) + shrink * prior) / (len(known) + shrink)
        assert actual[0, item] == pytest.approx(expected, abs=1e-6, nan_ok=True)


@hypothesis.given(EVENTS, st.integers(0, 7))
@properties
def test_a_rate_is_of_the_actions_among_all_events(jobs_with, events, day):
    actual = values(jobs_with(events, ITEMS), "items", Fact(name="r", rate=["applied"], shrink=2), day)
    past = [event for event in events if event.day < day]
    for item in range(ITEMS):
        applied = [event.action == "applied" for event in past if event.item == item]
        prior = np.mean([event.action == "applied" for event in past]) if past else math.nan
        expected = (sum(applied) + 2 * prior) / (len(applied) + 2)
        assert actual[0, item] == pytest.approx(expected, nan_ok=True)


@hypothesis.given(EVENTS, st.integers(0, 7))
@properties
def test_generosity_is_what_a_member_gives_more_than_each_item_had_until_then(jobs_with, events, day):
    fact = Fact(name="generosity", mean="seconds", less="items", shrink=5)
    actual = values(jobs_with(events, ITEMS), "members", fact, day)
    for member in range(MEMBERS):
        excess = [
            event.seconds - mean_before([e for e in events if e.item == event.item], event.day)
            for event in events
            if event.member == member and event.day < day and event.seconds is not None
        ]
        known = [value for value in excess if not math.isnan(value)]
        assert actual[member, 0] == pytest.approx(math.fsum(known) / (len(known) + 5), abs=1e-6)


@hypothesis.given(EVENTS, st.integers(0, 7))
@properties
def test_a_share_is_of_the_events_with_items_that_share_a_value(jobs_with, events, day):
    dataset = jobs_with(events, ITEMS)
    companies = dataset.items["company"].to_pylist()
    actual = values(dataset, "pairs", Fact(name="s", share=["viewed", "applied"], by="company"), day)
    for member in range(MEMBERS):
        past = [event for event in events if event.member == member and event.day < day]
        for item in range(ITEMS):
            alike = [event for event in past if companies[event.item] == companies[item]]
            expected = len(alike) / len(past) if past else math.nan
            assert actual[member, item] == pytest.approx(expected, nan_ok=True)


@hypothesis.given(EVENTS, st.integers(0, 7))
@properties
def test_days_since_age_and_distance(jobs_with, events, day):
    dataset = jobs_with(events, ITEMS)
    days_since = values(dataset, "pairs", Fact(name="d", days_since=["viewed"]), day)
    distance = values(dataset, "pairs", Fact(name="x", distance="posted"), day)
    posted = [date.toordinal() for date in dataset.items["posted"].to_pylist()]
    age = values(dataset, "items", Fact(name="a", age="posted"), day)
    for member in range(MEMBERS):
        past = [event for event in events if event.member == member and event.day < day]
        for item in range(ITEMS):
            viewed = [event.day for event in past if event.item == item and event.action == "viewed"]
            assert days_since[member, item] == pytest.approx(day - max(viewed) if viewed else math.nan, nan_ok=True)
            mean = np.mean([posted[event.item] for event in past]) if past else math.nan
            assert age[member, item] == pytest.approx(DAY_ZERO.item().toordinal() + day - posted[item])
            assert distance[member, item] == pytest.approx(abs(posted[item] - mean), nan_ok=True)


@hypothesis.given(EVENTS, EVENTS, st.integers(1, 6))
@properties
def test_no_fact_knows_what_happens_at_its_moment_or_later(jobs_with, events, later_events, day):
    """A property of every kind of fact, similarities too: whatever follows changes nothing."""
    early = [event for event in events if event.day < day]
    hypothesis.assume(early)
    changed = early + [event for event in later_events if event.day >= day]
    dataset, changed_dataset = jobs_with(early, ITEMS), jobs_with(changed, ITEMS)
    for group, fact in (
        ("items", Fact(name="a", count=["viewed"])),
        ("members", Fact(name="b", mean="seconds", less="items")),
        ("pairs", Fact(name="c", mean="seconds", among="location", shrink=1)),
        ("pairs", Fact(name="d", share=["viewed"], by="skills")),
        ("pairs", Fact(name="e", days_since=["viewed"])),
    ):
        np.testing.assert_array_equal(values(dataset, group, fact, day), values(changed_dataset, group, fact, day))


def test_what_is_taken_together_comes_from_others_and_from_before(jobs_with):
    """Members 1 to 5 took items 0 and 1 long ago; member 0 has taken item 0 since."""
    together = [Event(member, item, "viewed", 0) for member in range(1, 6) for item in (0, 1)]
    alone = [Event(member, item, "viewed", 0) for member, item in ((1, 2), (2, 3))]
    dataset = jobs_with([*together, *alone, Event(0, 0, "viewed", 5)], ITEMS)
    fact = Fact(name="t", together=["viewed"])
    actual = values(dataset, "pairs", fact, 6)[0]
    assert actual[1] > actual[2] > 0, "five members in common, then one"
    assert actual[0] == 0, "an item is no neighbor of its own"
    assert (values(dataset, "pairs", fact, 5)[0] == 0).all(), "member 0 has taken nothing yet"


def test_neighbors_say_what_the_member_gave_to_similar_items(jobs_with):
    """Items 0 and 1 please and displease the same members; member 0 liked item 0."""
    rated = [
        Event(member, item, "viewed", day + member / 10, 100.0 * (member % 2))
        for day, item in enumerate((2, 0, 1))
        for member in range(1, 8)
    ]
    dataset = jobs_with([*rated, Event(0, 0, "viewed", 5, 100.0)], ITEMS)
    actual = values(dataset, "pairs", Fact(name="n", neighbors="seconds"), 6)[0]
    assert actual[1] > 0


def test_the_mean_of_a_key_does_not_depend_on_other_keys(jobs_with):
    """1e17 of another item would leave nothing of 1.5 in one running total."""
    events = [Event(0, 0, "viewed", 0, 1e17), Event(0, 1, "viewed", 1, 1.5), Event(1, 1, "viewed", 2, 1.5)]
    actual = values(jobs_with(events, ITEMS), "items", Fact(name="m", mean="seconds"), 3)
    assert actual[0, 1] == 1.5


@hypothesis.given(st.lists(st.tuples(st.integers(0, 3), st.integers(-5, 5)), min_size=1, max_size=30))
@properties
def test_whole_numbers_have_the_totals_that_they_have_beside_fractions(counts):
    """They are added up in a quicker way; 1,100 events of key 9 are a long run, and its fractions forbid that way."""
    keys, whole = np.array([*counts, *[(9, 0.0)] * 1100]).T
    whole[whole == 0] = -0.0
    fractions = np.where(keys == 9, 0.1, whole)
    index = PointInTimeIndex(keys.astype(np.int64), np.arange(len(keys)))
    expected = index.totals(fractions).inclusive[: len(counts)]
    assert index.totals(whole).inclusive[: len(counts)].tobytes() == expected.tobytes()
