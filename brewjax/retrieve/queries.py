"""The queries that retrieval is judged on: members of the test period, and the items that they went on to."""

from __future__ import annotations

import dataclasses

import numpy as np
import scipy.sparse

from brewjax.data.tables.dataset import Dataset
from brewjax.data.tasks.examples import RankingExample, example_at, sample_examples
from brewjax.data.tasks.questions import find_questions
from brewjax.data.tasks.task import Task


@dataclasses.dataclass(frozen=True)
class Queries:
    """Queries, each a member as of a time, with all that is known and all that is to be retrieved.

    Attributes:
      examples: the member, cutoff time and history of each query.
      time: microseconds since 1970, at which the catalogue is described: the start of the test period.
      positives: per query, rows of the items of the best label that the member went on to.
      excluded: per query, rows of the items that the task would not ask about then: outside of their lives, or known to
        the member unless the task asks repeats. No method retrieves them.
      past: float32 [members, items], 1 at a positive before `time`.
      history: float32 [queries, items], 1 at a positive of the member that was known at the query's cutoff time.
    """

    examples: list[RankingExample]
    time: int
    positives: list[np.ndarray]
    excluded: list[np.ndarray]
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

    Args:
      dataset: the tables.
      task: whose best label makes an item one to retrieve.
      max_examples: the most examples that are looked at; None for all.

    Returns:
      The queries, in the order of the examples.

    Raises:
      ValueError: there is none.
    """
    best, num_items = int(np.argmax(task.values)), len(dataset.items)
    examples, positives, excluded = [], [], []
    for example in sample_examples(dataset, task, "test", max_examples):
        try:
            eligible = example_at(dataset, task, example.member, example.cutoff_time).candidates
        except ValueError:  # no item is left
            continue
        new_items = np.intersect1d(example.candidates[example.labels == best], eligible)
        if len(new_items):
            examples.append(example)
            positives.append(new_items)
            excluded.append(np.setdiff1d(np.arange(num_items), eligible))
    if not examples:
        raise ValueError(f"task '{task.name}': its test period has no item of its best label that is new to a member")
    time = task.boundaries(dataset)[1]
    before = find_questions(dataset, task, time)
    events = before.events[before.labels == best]
    past = _indicator(dataset.event_member[events], dataset.event_item[events], (len(dataset.members), num_items))
    questions = find_questions(dataset, task)
    questions = questions.select(questions.labels == best)
    member = dataset.event_member[questions.events]
    rows, items = [], []
    for row, example in enumerate(examples):
        first, last = np.searchsorted(member, [example.member, example.member + 1])
        chosen = questions.events[first:last][questions.known[first:last] < example.cutoff_time]
        items.append(dataset.event_item[chosen])
        rows.append(np.full(len(chosen), row))
    history = _indicator(np.concatenate(rows), np.concatenate(items), (len(examples), num_items))
    return Queries(examples, time, positives, excluded, past, history)


def _indicator(rows: np.ndarray, items: np.ndarray, shape: tuple[int, int]) -> scipy.sparse.csr_matrix:
    """float32 ones at (row, item); a pair that occurs twice is still 1."""
    pairs = np.unique(np.stack([rows, items], 1), axis=0)
    return scipy.sparse.csr_matrix((np.ones(len(pairs), np.float32), (pairs[:, 0], pairs[:, 1])), shape)
