"""Histories cut short: how good a ranker is for members of whom it knows little, without other members to compare."""

from __future__ import annotations

import dataclasses

import numpy as np

from brewjax.data.tables.dataset import Dataset


def cut_history(dataset: Dataset, members: np.ndarray, time: int, max_events: int) -> Dataset:
    """The dataset as if some members had just begun: of what they did before a time, the latest events are left.

    Members with few events differ from those with many, so a slice of them says little about cold start. Cut, the same
    members answer the same questions from less. Their history, and every fact of them, is computed from what is left;
    facts of items lose these events, too.

    A task that asks about the result needs a split of dates: shares of the events move where events go.

    Args:
      members: int [members], rows.
      time: microseconds since 1970; where the questions begin.
      max_events: how many events before `time` are left of each of them.
    """
    is_cut = np.zeros(len(dataset.members), bool)
    is_cut[members] = True
    earlier = np.flatnonzero(dataset.event_time < time)  # by member, then time
    member = dataset.event_member[earlier]
    later_ones = np.searchsorted(member, member, side="right") - np.arange(len(member)) - 1
    selected = np.ones(len(dataset.events), bool)
    selected[earlier] = ~is_cut[member] | (later_ones < max_events)
    return dataclasses.replace(dataset, events=dataset.events.filter(selected))
