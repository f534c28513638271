"""Item-item similarity as of a moment: the items most similar to each, fitted on what is before a sealed period.

The time axis is cut into `PERIODS` of equally many events. A question in a period sees the similarities of what came
before the period, so that no similarity knows the answer of the question that reads it.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import scipy.sparse

from brewjax.data.tables.dataset import Dataset

PERIODS = 20
NEIGHBORS = 50  # that are kept of each item
MAX_EVENTS_PER_MEMBER = 200  # the newest ones count: a member of a million events would relate everything
MIN_WEIGHT = 10  # members in common that count half of a similarity
BLOCK_ITEMS = 4096  # whose similarities are in memory at a time
BLOCK_ROWS = 1 << 17  # questions answered at a time


class NeighborTable(NamedTuple):
    """The most similar items of each item.

    Attributes:
      items: int32 [items, NEIGHBORS], rows of the items table.
      weights: float32 [items, NEIGHBORS], similarities above 0, descending; 0 where there is no further neighbor.
    """

    items: np.ndarray
    weights: np.ndarray


class Neighbors:
    """Similar items a member took, or rated, before a time.

    Args:
      dataset: the tables.
      events: int64 [events], rows of the events that count.
      values: float64 [events], what is taken of each: 1, or a rating less the item's mean; NaN is left out.
    """

    def __init__(self, dataset: Dataset, events: np.ndarray, values: np.ndarray):
        known = ~np.isnan(values)
        events, values = events[known], values[known]
        self._num_items = len(dataset.items)
        self._member, self._item = dataset.event_member[events].astype(np.int64), dataset.event_item[events]
        self._time, self._values = dataset.event_time[events], values
        codes = self._member * self._num_items + self._item
        self._codes, first = np.unique(codes, return_index=True)  # the first event of each pair
        self._pair_time, self._pair_value = self._time[first], values[first]
        self._starts = np.quantile(self._time, np.arange(PERIODS) / PERIODS).astype(np.int64) if len(events) else []
        self._tables: dict[int, NeighborTable] = {}

    def table(self, period: int) -> NeighborTable:
        """The table that questions of a period read; computed once."""
        if period not in self._tables:
            self._tables[period] = self._fit(int(self._starts[period]))
        return self._tables[period]

    def sums(self, members: np.ndarray, items: np.ndarray, times: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Over the similar items of each item that its member had before its time: the sum of the similarities, and of
        the similarities times the values; each float64 [rows]."""
        weights, weighted = np.zeros(len(items)), np.zeros(len(items))
        if not len(self._starts):
            return weights, weighted
        periods = np.maximum(np.searchsorted(self._starts, times, side="right") - 1, 0)
        for period in np.unique(periods):
            rows = np.flatnonzero(periods == period)
            for block in np.array_split(rows, -(-len(rows) // BLOCK_ROWS)):
                table = self.table(int(period))
                neighbor, weight = table.items[items[block]], table.weights[items[block]].astype(np.float64)
                codes = members[block].astype(np.int64)[:, None] * self._num_items + neighbor
                position = np.minimum(np.searchsorted(self._codes, codes), len(self._codes) - 1)
                had = (self._codes[position] == codes) & (self._pair_time[position] < times[block][:, None])
                weight = np.where(had, weight, 0)
                weights[block] = weight.sum(axis=1)
                weighted[block] = (weight * self._pair_value[position]).sum(axis=1)
        return weights, weighted

    def _fit(self, until: int) -> NeighborTable:
        rows = np.flatnonzero(self._time < until)
        newest = np.flatnonzero(np.diff(self._member[rows], append=-1))  # the last event of each member
        last = np.repeat(newest, np.diff(newest, prepend=-1))
        rows = rows[last - np.arange(len(rows)) < MAX_EVENTS_PER_MEMBER]
        shape = (int(self._member.max(initial=0)) + 1, self._num_items)
        entries = (self._member[rows], self._item[rows])
        presence = scipy.sparse.csr_array((np.ones(len(rows)), entries), shape=shape)
        presence.data[:] = 1  # repeats were added
        binary = bool((self._values == 1).all())
        matrix = presence if binary else scipy.sparse.csr_array((self._values[rows], entries), shape=shape)
        norms = np.sqrt(matrix.multiply(matrix).sum(axis=0))
        items = np.zeros((self._num_items, NEIGHBORS), np.int32)
        weights = np.zeros((self._num_items, NEIGHBORS), np.float32)
        for start in range(0, self._num_items, BLOCK_ITEMS):
            block = slice(start, start + BLOCK_ITEMS)
            product = (matrix[:, block].T @ matrix).tocsr().sorted_indices()
            common = product if binary else (presence[:, block].T @ presence).tocsr().sorted_indices()
            item = start + np.repeat(np.arange(product.shape[0]), np.diff(product.indptr))
            other_item, scale = product.indices, norms[item] * norms[product.indices]
            similarity = np.divide(product.data, scale, out=np.zeros(len(scale)), where=scale > 0)
            members = common.data[np.searchsorted(_codes(common), _codes(product))]  # where ratings cancel, no product
            similarity *= members / (members + MIN_WEIGHT)
            similar = np.flatnonzero((similarity > 0) & (item != other_item))  # an item is no neighbor of its own
            similar = similar[np.lexsort((-similarity[similar], item[similar]))]
            rank = np.arange(len(similar)) - np.searchsorted(item[similar], item[similar])
            best, rank = similar[rank < NEIGHBORS], rank[rank < NEIGHBORS]
            items[item[best], rank], weights[item[best], rank] = other_item[best], similarity[best]
        return NeighborTable(items, weights)


def _codes(matrix: scipy.sparse.csr_array) -> np.ndarray:
    """int64 [entries]: row and column of each entry of a sorted matrix as one ascending number."""
    row = np.repeat(np.arange(matrix.shape[0], dtype=np.int64), np.diff(matrix.indptr))
    return row * matrix.shape[1] + matrix.indices
