"""Makes ranking examples from events: a cutoff time of a member, the history before it, and candidates from it on.

Every example is point-in-time correct: what happens at or after its cutoff time is invisible to it.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import NamedTuple

import numpy as np

from brewjax.data.tables.dataset import Dataset
from brewjax.data.tables.point_in_time import DAY
from brewjax.data.tasks.task import Split, Task

MIN_CANDIDATES_PER_EXAMPLE = 8  # a chunk of events may always be so large, however short the history


@dataclasses.dataclass(frozen=True)
class RankingExample:
    """One context (a member's history) and its candidates, as rows of the dataset's tables.

    Attributes:
      task: the task's name.
      member: row of the member.
      cutoff_time: microseconds since 1970; every event of `history` is strictly older, no candidate's event is.
      history: int64 [events], rows of the events in the history, oldest first.
      num_past_events: how many events the member had before the cutoff time, in the history or not.
      candidates: int32 [candidates], rows of the items to rank.
      labels: int32 [candidates], indices into `Task.labels`; -1 if the answer is unknown.
    """

    task: str
    member: int
    cutoff_time: int
    history: np.ndarray
    num_past_events: int
    candidates: np.ndarray
    labels: np.ndarray

    def select(self, indices: slice | np.ndarray) -> RankingExample:
        """The same context with some of its candidates, by index or mask."""
        return dataclasses.replace(self, candidates=self.candidates[indices], labels=self.labels[indices])


class Choice(NamedTuple):
    """A multiple-choice question, answered by an item's name.

    Attributes:
      items: int32 [items], rows of the items to choose from, in the order of the prompt.
      correct: index in `items` of the answer.
    """

    items: np.ndarray
    correct: int


def history_before(dataset: Dataset, task: Task, member: int, cutoff_time: int) -> tuple[np.ndarray, int]:
    """The history of a member as of a time.

    Args:
      member: row of the member.
      cutoff_time: microseconds since 1970.

    Returns:
      Rows of the events that the task's history holds, oldest first, and how many events precede the cutoff time.
    """
    start, end = dataset.member_offsets[member : member + 2]
    end = start + np.searchsorted(dataset.event_time[start:end], cutoff_time, side="left")
    rows = np.arange(start, end)
    history_mask = np.isin(dataset.event_action[rows], task.history.actions)
    if task.history.max_age_days is not None:
        history_mask &= dataset.event_time[rows] >= cutoff_time - task.history.max_age_days * DAY
    history_rows = rows[history_mask]
    return history_rows[max(0, len(history_rows) - task.history.max_events) :], len(rows)


def example_at(dataset: Dataset, task: Task, member: int, time: int | None = None) -> RankingExample:
    """An example of a member as of a time, with every item that the member had no event with before as a candidate.

    Args:
      member: row of the member.
      time: microseconds since 1970; by default just after the last event of the dataset.

    Raises:
      ValueError: the member had an event with every item.
    """
    cutoff_time = int(dataset.event_time.max()) + 1 if time is None else time
    history, num_past_events = history_before(dataset, task, member, cutoff_time)
    start = dataset.member_offsets[member]
    past_items = dataset.event_item[start : start + num_past_events]
    candidates = np.setdiff1d(np.arange(len(dataset.items)), past_items).astype(np.int32)
    if not len(candidates):
        raise ValueError("the member had an event with every item; there is none left to rank")
    labels = np.full(len(candidates), -1, np.int32)
    return RankingExample(task.name, member, cutoff_time, history, num_past_events, candidates, labels)


def build_examples(dataset: Dataset, task: Task, split: Split, seed: int = 0) -> Iterator[RankingExample]:
    """Yields every labelled event of a split as a candidate exactly once, with sampled negatives.

    A member's events are cut into consecutive chunks; each becomes one example whose cutoff time is that of its first
    event. A chunk has at most min(candidates_per_prompt, max(events before it, MIN_CANDIDATES_PER_EXAMPLE)) events:
    later candidates of a chunk see an older history, and this bounds how old, and keeps short histories as frequent as
    they are in serving.

    An event belongs to the split that its time falls in. History is strictly older than the cutoff time, which is the
    oldest candidate's, so no prompt holds an event of a later split, or a candidate's own event. Events that match no
    label are no candidates.

    Args:
      seed: of the sampled negatives.

    Raises:
      ConfigError: an event matches two labels.
    """
    start, end = _period(dataset, task, split)
    events, labels = labelled_events(dataset, task)
    split_mask = (dataset.event_time[events] >= start) & (dataset.event_time[events] < end)
    events, labels = events[split_mask], labels[split_mask]
    negatives = task.questions.sampled_negatives
    events_per_prompt = max(1, task.questions.candidates_per_prompt // (1 + negatives.per_event if negatives else 1))
    rng = np.random.default_rng([seed, ["train", "validation", "test"].index(split)])
    event_members = dataset.event_member[events]
    for member in np.unique(event_members):
        first, last = np.searchsorted(event_members, [member, member + 1])
        unseen_items = _unseen_items(dataset, member, end)
        chunk_start = first
        while chunk_start < last:
            cutoff_time = int(dataset.event_time[events[chunk_start]])  # a member's events are sorted by time
            history, num_past_events = history_before(dataset, task, member, cutoff_time)
            size = min(max(num_past_events, MIN_CANDIDATES_PER_EXAMPLE), events_per_prompt)
            chunk = slice(chunk_start, min(chunk_start + size, last))
            chunk_start = chunk.stop
            candidates, answers = dataset.event_item[events[chunk]], labels[chunk]
            if negatives:
                num_sampled = min(negatives.per_event * len(candidates), len(unseen_items))
                sampled = rng.choice(unseen_items, num_sampled, replace=False)
                candidates = np.concatenate([candidates, sampled])
                answers = np.concatenate([answers, np.full(len(sampled), task.words.index(negatives.label))])
            yield RankingExample(
                task.name,
                int(member),
                cutoff_time,
                history,
                num_past_events,
                candidates.astype(np.int32),
                answers.astype(np.int32),
            )


def sample_examples(
    dataset: Dataset, task: Task, split: Split, max_examples: int | None = None, seed: int = 0
) -> list[RankingExample]:
    """The examples of a split; if there are more than `max_examples`, a random choice of so many, in their order."""
    examples = list(build_examples(dataset, task, split, seed))
    if max_examples is None or len(examples) <= max_examples:
        return examples
    chosen = np.random.default_rng(seed).choice(len(examples), max_examples, replace=False)
    return [examples[index] for index in np.sort(chosen)]


def _period(dataset: Dataset, task: Task, split: Split) -> tuple[int, int]:
    """Start and end of a split, in microseconds since 1970."""
    validation, test = task.boundaries(dataset)
    infinity = np.iinfo(np.int64).max
    return {"train": (-infinity, validation), "validation": (validation, test), "test": (test, infinity)}[split]


def labelled_events(dataset: Dataset, task: Task) -> tuple[np.ndarray, np.ndarray]:
    """Rows of the events that match a label, and the index of the label of each."""
    labels = event_labels(dataset, task, np.arange(len(dataset.events)))
    events = np.flatnonzero(labels >= 0)
    return events, labels[events]


def event_labels(dataset: Dataset, task: Task, events: np.ndarray) -> np.ndarray:
    """The label of each event.

    Args:
      events: int [events], rows of the events table.

    Returns:
      int64 [events]: index into `Task.labels`; -1 if the event is of another action or matches no label.

    Raises:
      ConfigError: an event matches two labels.
    """
    labels = np.full(len(events), -1)
    question_mask = np.isin(dataset.event_action[events], task.questions.actions)
    for index, label in enumerate(task.labels):
        match = question_mask & label.matches(dataset, events)
        if (labels[match] >= 0).any():
            word = task.words[labels[match & (labels >= 0)][0]]
            raise task.error(f"an event can be both '{word}' and '{label.word}'", "labels", index, "match")
        labels[match] = index
    return labels


def _unseen_items(dataset: Dataset, member: int, until: int) -> np.ndarray:
    """Rows of the items that the member had no event with before `until`, the end of the split. Later events do not
    exclude an item: its absence from the negatives would give them away."""
    start, end = dataset.member_offsets[member : member + 2]
    end = start + np.searchsorted(dataset.event_time[start:end], until)
    return np.setdiff1d(np.arange(len(dataset.items)), dataset.event_item[start:end])
