"""`Partition`: the unit in which data is prepared, on one core, on many, on many hosts and on Beam."""

from __future__ import annotations

import dataclasses

import numpy as np


@dataclasses.dataclass(frozen=True)
class Partition:
    """One of `count` ranges of the hashes of ids.

    Ranges, not remainders: what is ordered by hash and written partition after partition is the same sequence for any
    `count`.

    Attributes:
      index: 0 to count - 1.
      count: number of partitions, below 2^32.
    """

    index: int
    count: int

    def select(self, hashes: np.ndarray) -> slice:
        """Where the partition lies among `hashes`, uint64 in ascending order."""
        start, stop = (self._first(index, hashes) for index in (self.index, self.index + 1))
        return slice(start, stop)

    def _first(self, index: int, hashes: np.ndarray) -> int:
        """The position of the first hash at or above the lower bound of partition `index`."""
        if index == self.count:
            return len(hashes)
        bound = -(-(index << 32) // self.count) << 32
        return int(np.searchsorted(hashes, np.uint64(bound)))

    def split(self, length: int) -> slice:
        """The partition's part, in order, of a sequence of `length` entries that have no hashes."""
        return slice(length * self.index // self.count, length * (self.index + 1) // self.count)

    @property
    def name(self) -> str:
        """Of its files, without their endings."""
        return f"part-{self.index:05d}-of-{self.count:05d}"


WHOLE = Partition(0, 1)
