"""Cuts the questions of a split into chunks, each of which becomes one example."""

from __future__ import annotations

import numpy as np

from brewjax.data.tables.dataset import FOREVER, Dataset
from brewjax.data.tables.point_in_time import DAY
from brewjax.data.tasks.questions import Questions
from brewjax.data.tasks.task import Task

MIN_CANDIDATES_PER_EXAMPLE = 8  # a chunk of events may always be so large, however short the history


def cut_chunks(dataset: Dataset, task: Task, questions: Questions) -> tuple[Questions, np.ndarray, np.ndarray]:
    """The questions, by request if the task asks so, and where each chunk of them starts and stops, int64 [chunks]."""
    asks, events = task.questions, questions.events
    member, time = dataset.event_member[events].astype(np.int64), dataset.event_time[events]
    negatives = asks.sampled_negatives
    max_events = max(1, asks.candidates_per_prompt // (1 + negatives.per_event if negatives else 1))
    if asks.per_request:
        request = dataset.event_request[events]
        order = np.lexsort((time, request, member))
        questions = questions.select(order)
        group = np.cumsum(np.diff(request[order], prepend=-2).astype(bool) | np.diff(member, prepend=-1).astype(bool))
        first = np.flatnonzero(np.diff(group, prepend=0))
        sizes = np.diff(first, append=len(group))
        parts = -(-sizes // max_events)
        starts = np.repeat(first, parts) + max_events * (
            np.arange(parts.sum()) - np.repeat(np.cumsum(parts) - parts, parts)
        )
        return questions, starts, np.minimum(starts + max_events, np.repeat(first + sizes, parts))
    past = _num_past_events(dataset, events)
    span = int(asks.span_days * DAY) if dataset.card.events.time else FOREVER
    ends_of_member = np.searchsorted(member, member, side="right")
    within_span = _first_beyond(member, time, span)
    reach = np.minimum(ends_of_member, within_span)
    reach = np.minimum(
        reach, np.arange(len(events)) + np.minimum(max_events, np.maximum(past, MIN_CANDIDATES_PER_EXAMPLE))
    )
    starts, position, reaches = [], 0, reach.tolist()
    while position < len(reaches):
        starts.append(position)
        position = reaches[position]
    chunk_starts = np.array(starts, np.int64)
    return questions, chunk_starts, reach[chunk_starts]


def _num_past_events(dataset: Dataset, events: np.ndarray) -> np.ndarray:
    """int64 [events]: how many events of the member are strictly older than each event."""
    same_time = np.diff(dataset.event_time, prepend=0) == 0
    same_time &= np.diff(dataset.event_member, prepend=-1) == 0
    rows = np.arange(len(same_time))
    first_of_time = np.maximum.accumulate(np.where(same_time, 0, rows))
    return first_of_time[events] - dataset.member_offsets[dataset.event_member[events]]


def _first_beyond(member: np.ndarray, time: np.ndarray, span: int) -> np.ndarray:
    """The first position of the same member, or a later one, whose time is at least `span` after each position's."""
    if span >= FOREVER or not len(time):
        return np.full(len(time), len(time))
    ranks = np.unique(time)
    code = member * (len(ranks) + 1) + np.searchsorted(ranks, time)
    return np.searchsorted(code, member * (len(ranks) + 1) + np.searchsorted(ranks, time + span))
