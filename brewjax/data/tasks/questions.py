"""What a task asks about a dataset's events, with the answers: one question for a member, an item and an exposure.

An exposure is an event of `questions.actions`. What the member does with the same item within the task's window of it,
by the same actions or by `questions.outcomes`, belongs to the same question; the label with the highest value that any
of these events match is its answer.
"""

from __future__ import annotations

import dataclasses

import numpy as np

from brewjax.data.tables.dataset import FOREVER, Dataset
from brewjax.data.tables.point_in_time import DAY
from brewjax.data.tasks.conditions import ITEM, MEMBER, matches, row_matches
from brewjax.data.tasks.task import Split, Task


@dataclasses.dataclass(frozen=True)
class Questions:
    """Questions with known answers, in order of member, then time.

    Attributes:
      events: int64 [questions], rows of the exposures.
      labels: int64 [questions], indices into `Task.labels`.
      known: int64 [questions], the time (microseconds since 1970) from which on the answer is known.
    """

    events: np.ndarray
    labels: np.ndarray
    known: np.ndarray

    def select(self, rows: np.ndarray) -> Questions:
        """Some of the questions, by `rows`: int positions or a bool mask."""
        return Questions(self.events[rows], self.labels[rows], self.known[rows])


def find_questions(dataset: Dataset, task: Task, until: int = FOREVER) -> Questions:
    """Finds the questions that a task asks about some events, and their answers.

    Args:
      dataset: the tables.
      task: what is asked of them.
      until: microseconds since 1970; neither a question nor an answer depends on an event at or after it.

    Returns:
      The questions whose answer is known by then, and whose member and item may be asked about.

    Raises:
      ConfigError: an event matches two labels.
    """
    asks = task.questions
    rows = np.flatnonzero(dataset.has_action((*asks.actions, *asks.outcomes)) & (dataset.event_time < until))
    if not len(rows):
        return Questions(rows, rows, rows)
    label = match_labels(dataset, task, rows)
    opens = dataset.has_action(asks.actions)[rows]
    if asks.where:
        opens &= matches(dataset, asks.where, rows)
    time, pair = dataset.event_time[rows], _pairs(dataset, task, rows)
    # Of one time, what opens a question comes before what answers it; otherwise events keep the order of the file.
    order = np.lexsort((~opens, time, pair))
    exposure = _exposures(pair[order], time[order], opens[order], _window(dataset, task))
    belongs = exposure >= 0
    values = np.append(task.values, -np.inf)  # of no label
    best = np.full(len(rows), -np.inf)
    np.maximum.at(best, exposure[belongs], values[label[order]][belongs])
    heads = np.flatnonzero(exposure == np.arange(len(rows)))
    by_value = np.argsort(task.values)
    position = np.searchsorted(task.values[by_value], best[heads])
    has_label = np.isfinite(best[heads])
    labels = np.where(has_label, by_value[np.minimum(position, len(by_value) - 1)], task.default_label)
    if asks.outcomes:
        known = time[order][heads] + _window(dataset, task)
        answered = (labels >= 0) & (known <= min(until, _last_event_time(dataset, task)))
    else:
        reaches = belongs & (values[label[order]] >= best[np.maximum(exposure, 0)])  # the first such event answers
        first = np.full(len(rows), FOREVER)
        np.minimum.at(first, exposure[reaches], time[order][reaches])
        known, answered = first[heads], labels >= 0
    heads, labels, known = heads[answered], labels[answered], known[answered]
    events = rows[order[heads]]
    by_event = np.argsort(events)
    questions = Questions(events[by_event], labels[by_event], known[by_event])
    return questions.select(_may_be_asked(dataset, task, questions.events))


def split_questions(dataset: Dataset, task: Task, split: Split) -> Questions:
    """The questions whose exposure lies in a split; no answer depends on anything after the split."""
    start, end = split_period(dataset, task, split)
    questions = find_questions(dataset, task, end)
    return questions.select(dataset.event_time[questions.events] >= start)


def split_period(dataset: Dataset, task: Task, split: Split) -> tuple[int, int]:
    """Start and end of a split, in microseconds since 1970."""
    validation, test = task.boundaries(dataset)
    return {"train": (-FOREVER, validation), "validation": (validation, test), "test": (test, FOREVER)}[split]


def match_labels(dataset: Dataset, task: Task, events: np.ndarray) -> np.ndarray:
    """The label that each event matches by itself.

    Args:
      dataset: the tables.
      task: whose labels are meant.
      events: int [events], rows of the events table.

    Returns:
      int64 [events]: index into `Task.labels`; -1 if the event is of another action or matches no label.

    Raises:
      ConfigError: an event matches two labels.
    """
    labels = np.full(len(events), -1)
    in_question = dataset.has_action((*task.questions.actions, *task.questions.outcomes))[events]
    for index, label in enumerate(task.labels):
        if label.match is None:
            continue
        match = in_question & matches(dataset, label.match, events)
        if (labels[match] >= 0).any():
            word = task.words[labels[match & (labels >= 0)][0]]
            raise task.error(f"an event can be both '{word}' and '{label.word}'", "labels", index, "match")
        labels[match] = index
    return labels


def eligible_items(dataset: Dataset, task: Task) -> np.ndarray:
    """Selects the items that a task may ask about, whenever they exist.

    Args:
      dataset: the tables.
      task: what is asked of them.

    Returns:
      bool [items]: whether an item fulfils the conditions and, in a union, is of the dataset that is asked about.
    """
    return row_matches(dataset, task.questions.where, ITEM) & dataset.items_of(task.questions.actions[0])


def _last_event_time(dataset: Dataset, task: Task) -> int:
    """Until when it is known what members did; in a union each dataset ends at its own time."""
    card = task.side_of(dataset.card)
    if card is dataset.card:
        return dataset.last_event_time
    return int(dataset.event_time[dataset.has_action(card.events.actions)].max(initial=-FOREVER))


def _window(dataset: Dataset, task: Task) -> int:
    """Microseconds; events without times have no window: each is a question of its own."""
    return int(task.questions.window_days * DAY) if dataset.card.events.time else -1


def _pairs(dataset: Dataset, task: Task, rows: np.ndarray) -> np.ndarray:
    """int64 [rows]: a number for each member and item; also for each request, if the task asks by request."""
    pair = dataset.event_member[rows].astype(np.int64) * len(dataset.items) + dataset.event_item[rows]
    if not task.questions.per_request:
        return pair
    request = dataset.event_request[rows]
    return np.unique(np.stack([pair, request]), axis=1, return_inverse=True)[1].ravel()


def _exposures(pair: np.ndarray, time: np.ndarray, opens: np.ndarray, window: int) -> np.ndarray:
    """The exposure that each event belongs to, by position; -1 for none.

    Args:
      pair, time: int64 [events], sorted by pair, then time.
      opens: bool [events], whether an event can be an exposure.
      window: microseconds; below 0, an exposure is alone.
    """
    exposure = np.full(len(pair), -1)
    if window < 0:
        exposure[opens] = np.flatnonzero(opens)
        return exposure
    ranks = np.unique(time)
    code = pair * (len(ranks) + 1) + np.searchsorted(ranks, time)
    candidates = np.flatnonzero(opens)
    head = candidates[np.diff(pair[candidates], prepend=-1) != 0]  # the first exposure of each pair
    # Each round takes the next exposure of every pair: the first that can open behind the window of the one before.
    while len(head):
        rank = np.searchsorted(ranks, time[head] + window, side="right") - 1
        end = np.searchsorted(code, pair[head] * (len(ranks) + 1) + rank, side="right")
        sizes = end - head
        within = np.arange(sizes.sum()) - np.repeat(np.cumsum(sizes) - sizes, sizes)
        exposure[np.repeat(head, sizes) + within] = np.repeat(head, sizes)
        following = np.minimum(np.searchsorted(candidates, end), len(candidates) - 1)
        following_head = candidates[following]
        head = following_head[(following_head >= end) & (pair[following_head] == pair[head])]
    return exposure


def _may_be_asked(dataset: Dataset, task: Task, events: np.ndarray) -> np.ndarray:
    """bool [events]: whether member and item are within their lives, and the item is no repeat where none is asked."""
    time, member, item = dataset.event_time[events], dataset.event_member[events], dataset.event_item[events]
    begins, ends = dataset.member_life
    allowed = (begins[member] <= time) & (time < ends[member])
    if available := task.side_of(dataset.card).items.available:
        begins, ends = dataset.item_life
        # An event proves that its item exists, if the card does not state when it begins.
        allowed &= time < ends[item]
        if available.from_:
            allowed &= begins[item] <= time
    if task.questions.sampled_negatives:
        # An item that no event spoke of before would be known by that: sampled negatives never are such items.
        allowed &= dataset.item_life[0][item] <= time
    if not task.questions.asks_repeats:
        pair = dataset.event_member.astype(np.int64) * len(dataset.items) + dataset.event_item
        first = np.full(len(pair), False)
        first[np.unique(pair, return_index=True)[1]] = True
        allowed &= first[events]
    conditions = {column: value for column, value in task.questions.where.items() if column.startswith(MEMBER)}
    return allowed & row_matches(dataset, conditions, MEMBER)[member]
