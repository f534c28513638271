"""From events to examples: a cut in a member's time, the history before it, the questions from it on."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import NamedTuple

import numpy as np

from brewjax.data.tables.dataset import Dataset
from brewjax.data.tables.point_in_time import DAY
from brewjax.data.tasks.task import Split, Task

MIN_CANDIDATES_PER_EXAMPLE = 8


@dataclasses.dataclass(frozen=True)
class RankingExample:
    """One history and the questions asked behind it, as rows of the dataset's tables.

    Attributes:
      task: the task's name.
      member: row of the member.
      cut: microseconds since 1970; every event of `history` is strictly older, no question's event is.
      history: int64 [events], rows of the events told, oldest first.
      past: how many events the member had before the cut, told or not.
      items: int32 [questions], rows of the items asked about.
      labels: int32 [questions], indices into `Task.labels`; -1 where the answer is not known.
    """

    task: str
    member: int
    cutoff_time: int
    history: np.ndarray
    num_past_events: int
    candidates: np.ndarray
    labels: np.ndarray

    def select(self, some: slice | np.ndarray) -> RankingExample:
        """The same with some of its questions."""
        return dataclasses.replace(self, candidates=self.candidates[some], labels=self.labels[some])


class Choice(NamedTuple):
    """A question of which item it is, to be answered by name.

    Attributes:
      items: int32 [candidates], rows of the items to choose from, in the order they are said.
      right: which of them is the answer.
    """

    items: np.ndarray
    correct: int


def history_before(dataset: Dataset, task: Task, member: int, cutoff_time: int) -> tuple[np.ndarray, int]:
    """Rows of the events that `task` tells of a member at `cut`, oldest first, and how many events precede the cut."""
    start, end = dataset.member_offsets[member : member + 2]
    end = start + np.searchsorted(dataset.event_time[start:end], cutoff_time, side="left")
    rows = np.arange(start, end)
    told = np.isin(dataset.event_action[rows], task.history.actions)
    if task.history.max_age_days is not None:
        told &= dataset.event_time[rows] >= cutoff_time - task.history.max_age_days * DAY
    return rows[told][len(rows[told]) - min(told.sum(), task.history.max_events) :], len(rows)


def example_at(dataset: Dataset, task: Task, member: int, time: int | None = None) -> RankingExample:
    """A member at `moment` (microseconds; after the last event of all by default), asked about every item that the
    member had no event with by then. ValueError where there is none."""
    cut = int(dataset.event_time.max()) + 1 if time is None else time
    history, past = history_before(dataset, task, member, cut)
    start = dataset.member_offsets[member]
    items = np.setdiff1d(np.arange(len(dataset.items)), dataset.event_item[start : start + past]).astype(np.int32)
    if not len(items):
        raise ValueError("the member had an event with every item; there is none left to rank")
    return RankingExample(task.name, member, cut, history, past, items, np.full(len(items), -1, np.int32))


def build_examples(dataset: Dataset, task: Task, split: Split, seed: int = 0) -> Iterator[RankingExample]:
    """Every question of the split exactly once, in chunks of a member's time; negatives drawn from `seed`.

    A chunk asks about at most as many events as the member had before it (but `FEWEST_TOGETHER` are fine), so that
    the history is never far behind the last question and short histories are met as often as they are in life.
    A question belongs to the split that its event's time falls in. Since history is strictly older than the cut,
    and the cut is the oldest question's time, no prompt holds an event of a later split, or a question's own.
    Events that match no label are not questions. Raises ConfigError where an event matches two.
    """
    start, end = _period(dataset, task, split)
    asked, labels = labelled_events(dataset, task)
    within = (dataset.event_time[asked] >= start) & (dataset.event_time[asked] < end)
    asked, labels = asked[within], labels[within]
    negatives = task.questions.sampled_negatives
    events_per_prompt = max(1, task.questions.candidates_per_prompt // (1 + negatives.per_event if negatives else 1))
    rng = np.random.default_rng([seed, ["train", "validation", "test"].index(split)])
    member_of = dataset.event_member[asked]
    for member in np.unique(member_of):
        first, last = np.searchsorted(member_of, [member, member + 1])
        unseen = _unseen(dataset, member, end)
        begin = first
        while begin < last:
            cut = int(dataset.event_time[asked[begin]])  # a member's events are in order of time
            history, past = history_before(dataset, task, member, cut)
            size = min(max(past, MIN_CANDIDATES_PER_EXAMPLE), events_per_prompt)
            chunk = slice(begin, min(begin + size, last))
            begin = chunk.stop
            items, answers = dataset.event_item[asked[chunk]], labels[chunk]
            if negatives:
                drawn = rng.choice(unseen, min(negatives.per_event * len(items), len(unseen)), replace=False)
                items = np.concatenate([items, drawn])
                answers = np.concatenate([answers, np.full(len(drawn), task.words.index(negatives.label))])
            yield RankingExample(
                task.name, int(member), cut, history, past, items.astype(np.int32), answers.astype(np.int32)
            )


def sample_examples(
    dataset: Dataset, task: Task, split: Split, max_examples: int | None = None, seed: int = 0
) -> list[RankingExample]:
    """The examples of a split, or a random `at_most` of them in their order."""
    examples = list(build_examples(dataset, task, split, seed))
    if max_examples is None or len(examples) <= max_examples:
        return examples
    chosen = np.random.default_rng(seed).choice(len(examples), max_examples, replace=False)
    return [examples[index] for index in np.sort(chosen)]


def _period(dataset: Dataset, task: Task, split: Split) -> tuple[int, int]:
    validation, test = task.boundaries(dataset)
    infinity = np.iinfo(np.int64).max
    return {"train": (-infinity, validation), "validation": (validation, test), "test": (test, infinity)}[split]


def labelled_events(dataset: Dataset, task: Task) -> tuple[np.ndarray, np.ndarray]:
    """Rows of the events that can be asked about, and the index of each one's label."""
    labels = event_labels(dataset, task, np.arange(len(dataset.events)))
    events = np.flatnonzero(labels >= 0)
    return events, labels[events]


def event_labels(dataset: Dataset, task: Task, events: np.ndarray) -> np.ndarray:
    """int64 [events]: the index of the label that each of these events (rows) has, asked about; -1 where none."""
    labels = np.full(len(events), -1)
    asked = np.isin(dataset.event_action[events], task.questions.actions)
    for index, label in enumerate(task.labels):
        match = asked & label.matches(dataset, events)
        if (labels[match] >= 0).any():
            other = task.words[labels[match & (labels >= 0)][0]]
            raise task.error(f"an event can be both '{other}' and '{label.word}'", "labels", index, "match")
        labels[match] = index
    return labels


def _unseen(dataset: Dataset, member: int, until: int) -> np.ndarray:
    """Rows of the items that the member had no event with before `until`, the end of the split: what comes after it
    must not be told by what is missing."""
    start, end = dataset.member_offsets[member : member + 2]
    end = start + np.searchsorted(dataset.event_time[start:end], until)
    return np.setdiff1d(np.arange(len(dataset.items)), dataset.event_item[start:end])
