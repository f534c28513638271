"""Sampled negatives: items that a member could have been asked about and did not act on."""

from __future__ import annotations

import numpy as np

from brewjax.data.tables.dataset import Dataset
from brewjax.data.tables.point_in_time import PointInTimeIndex
from brewjax.data.tables.ragged import Ragged
from brewjax.data.tasks.questions import eligible_items
from brewjax.data.tasks.task import Task

ROUNDS = 8  # of drawing, before all items are looked at


class NegativeSampler:
    """Draws negatives for the questions of one task.

    They are within their lives at the moment, and fulfil the task's conditions. Sampling does not pass over all items:
    what does not fit is sampled again.
    """

    def __init__(self, dataset: Dataset, task: Task):
        negatives = task.questions.sampled_negatives
        assert negatives is not None
        self._dataset, self._negatives = dataset, negatives
        begins, self._ends = dataset.item_life
        eligible = np.flatnonzero(eligible_items(dataset, task))
        self._items = eligible[np.argsort(begins[eligible], kind="stable")]  # by the beginning of their lives
        self._begins = begins
        if negatives.popularity:
            self._eligible = np.zeros(len(dataset.items), bool)
            self._eligible[eligible] = True
            is_alike = dataset.items_of(task.questions.actions[0])[dataset.event_item]
            self._events = dataset.time_order[is_alike[dataset.time_order]]
            self._event_times = dataset.event_time[self._events]
            self._index = PointInTimeIndex(dataset.event_item.astype(np.int64), dataset.event_time)
        if negatives.same:
            self._values = Ragged.read(dataset.items.take(self._items), negatives.same)
            self._rows, self._starts = self._values.rows_by_code()
            self._place = np.full(len(dataset.items), -1)
            self._place[self._items] = np.arange(len(self._items))

    def draw(
        self, rng: np.random.Generator, positives: np.ndarray, excluded: np.ndarray, time: int
    ) -> tuple[np.ndarray, np.ndarray]:
        """Draws `per_event` items for each positive, or as many as there are; none twice.

        Args:
          positives: int [positives], rows of items.
          excluded: int [items], rows of items that must not be sampled.
          time: microseconds since 1970 at which the items must exist.

        Returns:
          The items, int64 [negatives], and the index of the positive that each was sampled for.
        """
        if self._negatives.same:
            unavailable, sampled = set(excluded.tolist()), []
            for index, item in enumerate(positives.tolist()):
                pool = self._sharing(item)
                items = self._draw(rng, self._negatives.per_event, unavailable, time, pool, len(pool))
                unavailable.update(items)
                sampled.append((items, index))
            return (
                np.array([item for items, _ in sampled for item in items], np.int64),
                np.repeat([index for _, index in sampled], [len(items) for items, _ in sampled]).astype(np.int64),
            )
        count = self._negatives.per_event * len(positives)
        alive = int(np.searchsorted(self._begins[self._items], time, side="right"))
        evenly = np.array(self._draw(rng, count, set(excluded.tolist()), time, self._items, alive), np.int64)
        return evenly, np.arange(len(evenly)) % max(1, len(positives))

    def _sharing(self, item: int) -> np.ndarray:
        """Eligible items that share a value with an item."""
        place = self._place[item]
        if place < 0:
            return self._items[:0]
        codes = self._values.codes[self._values.offsets[place] : self._values.offsets[place + 1]]
        rows = [self._rows[self._starts[code] : self._starts[code + 1]] for code in codes]
        return self._items[np.unique(np.concatenate(rows))] if rows else self._items[:0]

    def _draw(
        self, rng: np.random.Generator, count: int, unavailable: set[int], time: int, pool: np.ndarray, alive: int
    ) -> list[int]:
        """Up to `count` items of pool[:alive] that are none of `unavailable`."""
        sampled: dict[int, None] = {}
        if alive:
            for _ in range(ROUNDS):
                for item in self._propose(rng, 2 * count, time, pool, alive).tolist():
                    if (
                        len(sampled) < count
                        and item not in unavailable
                        and item not in sampled
                        and self._lives(item, time)
                    ):
                        sampled[item] = None
                if len(sampled) == count:
                    return list(sampled)
        remaining = [item for item in pool[:alive].tolist() if item not in unavailable and item not in sampled]
        remaining = [item for item in remaining if self._lives(item, time)]
        more: list[int] = rng.permutation(remaining)[: count - len(sampled)].tolist() if remaining else []
        return [*sampled, *map(int, more)]

    def _lives(self, item: int, time: int) -> bool:
        return bool(self._begins[item] <= time < self._ends[item])

    def _propose(self, rng: np.random.Generator, count: int, time: int, pool: np.ndarray, alive: int) -> np.ndarray:
        """Items sampled with replacement, evenly or by popularity. The item of a random earlier event is sampled in
        proportion to its number n of events; kept with probability n^(power - 1), in proportion to n^power."""
        if not self._negatives.popularity:
            return pool[rng.integers(0, alive, count)]
        past = int(np.searchsorted(self._event_times, time))
        if not past:
            return pool[:0]
        items = self._dataset.event_item[self._events[rng.integers(0, past, count)]].astype(np.int64)
        start, end = self._index.window(items, np.full(count, time))
        keep = rng.random(count) < (end - start) ** (self._negatives.popularity - 1.0)
        return items[keep & self._eligible[items]]
