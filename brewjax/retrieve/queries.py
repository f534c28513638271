"""The queries that retrieval is judged on: members of the test period, and the items that they went on to."""

from __future__ import annotations

import dataclasses

import numpy as np
import scipy.sparse

from brewjax.data.tables.dataset import Dataset
from brewjax.data.tasks.examples import RankingExample, labelled_events, sample_examples
from brewjax.data.tasks.task import Task


@dataclasses.dataclass(frozen=True)
class Queries:
    """Queries, each a member as of a time, with all that is known and all that is to be retrieved.

    Attributes:
      examples: the member, cutoff time and history of each query.
      time: microseconds since 1970, at which the catalogue is described: the start of the test period.
      positives: per query, rows of the items of the best label that the member went on to, and had no event with.
      seen: per query, rows of the items that the member had an event with before; they are not retrieved.
      past: float32 [members, items], 1 at a positive before `time`.
      history: float32 [queries, items], 1 at a positive of the member before the query's cutoff time.
    """

    examples: list[RankingExample]
    time: int
    positives: list[np.ndarray]
    seen: list[np.ndarray]
    past: scipy.sparse.csr_matrix
    history: scipy.sparse.csr_matrix

    def __len__(self) -> int:
        return len(self.examples)

    @property
    def num_past_events(self) -> np.ndarray:
        """int64 [queries]: events of the member before the query's cutoff time."""
        return np.array([example.num_past_events for example in self.examples])


def select_queries(dataset: Dataset, task: Task, max_examples: int | None = None) -> Queries:
    """The queries of a task's test period: its examples that have an item to retrieve.

    Raises:
      ValueError: there is none.
    """
    best = int(np.argmax(task.values))
    examples, positives, seen = [], [], []
    for example in sample_examples(dataset, task, "test", max_examples):
        start = dataset.member_offsets[example.member]
        known = np.unique(dataset.event_item[start : start + example.num_past_events])
        new_items = np.setdiff1d(example.candidates[example.labels == best], known)
        if len(new_items):
            examples.append(example)
            positives.append(new_items)
            seen.append(known)
    if not examples:
        raise ValueError(f"task '{task.name}': its test period has no item of its best label that is new to a member")
    events, labels = labelled_events(dataset, task)
    events = events[labels == best]
    time = task.boundaries(dataset)[1]
    num_items = len(dataset.items)
    before = events[dataset.event_time[events] < time]
    past = _indicator(dataset.event_member[before], dataset.event_item[before], (len(dataset.members), num_items))
    rows, items = [], []
    for row, example in enumerate(examples):
        first = dataset.member_offsets[example.member]
        start, end = np.searchsorted(events, [first, first + example.num_past_events])
        items.append(dataset.event_item[events[start:end]])
        rows.append(np.full(end - start, row))
    history = _indicator(np.concatenate(rows), np.concatenate(items), (len(examples), num_items))
    return Queries(examples, time, positives, seen, past, history)


def _indicator(rows: np.ndarray, items: np.ndarray, shape: tuple[int, int]) -> scipy.sparse.csr_matrix:
    """float32 ones at (row, item); a pair that occurs twice is still 1."""
    pairs = np.unique(np.stack([rows, items], 1), axis=0)
    return scipy.sparse.csr_matrix((np.ones(len(pairs), np.float32), (pairs[:, 0], pairs[:, 1])), shape)
