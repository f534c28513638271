"""Soft labels of training records: the probabilities of another ranker at each target, in a file beside each shard."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from brewjax.data.text.encode import NO_TARGET, EncodedPrompt

NO_WORD = -1
SMALLEST = 1e-6  # probability of a label, whatever the ranker says: its logarithm stays finite


class SoftLabelTable(NamedTuple):
    """The soft labels of records, for each its targets in order.

    Attributes:
      offsets: int64 [records + 1]; record r has rows offsets[r] to offsets[r + 1].
      ids: int32 [targets, k], label words, the likeliest first; -1 for no word.
      log_probs: float32 [targets, k]; -inf for no word.
    """

    offsets: np.ndarray
    ids: np.ndarray
    log_probs: np.ndarray

    @classmethod
    def load(cls, paths: Iterable[Path]) -> SoftLabelTable:
        """Reads the tables of shards, as one.

        Args:
          paths: of the tables, in order of the shards.

        Returns:
          The soft labels of all records; k is the most labels that a target has.

        Raises:
          ValueError: a shard has none.
        """
        tables = []
        for path in paths:
            if not path.is_file():
                raise ValueError(f"{path.parent}: its records have no soft labels; run the recipe again")
            with np.load(path) as arrays:
                tables.append(cls(**arrays))
        k = max(table.ids.shape[1] for table in tables)
        sizes = np.concatenate([np.diff(table.offsets) for table in tables])
        return cls(
            np.concatenate([[0], np.cumsum(sizes)]),
            np.concatenate([_pad(table.ids, k, NO_WORD) for table in tables]),
            np.concatenate([_pad(table.log_probs, k, -np.inf) for table in tables]),
        )


class SoftLabelWriter:
    """Collects the soft labels of a shard's records. A target without any is as certain as its answer."""

    def __init__(self) -> None:
        self._rows: list[tuple[np.ndarray, np.ndarray]] = []
        self._any = False

    def add(self, record: Any) -> None:
        """Adds a `record`: an encoded prompt or text."""
        targets = record.arrays["targets"]
        positions = np.flatnonzero(targets != NO_TARGET)
        soft_labels = record.soft_labels if isinstance(record, EncodedPrompt) else []
        k = max(1, len(record.labels) if soft_labels else 1)
        ids = np.full((len(positions), k), NO_WORD, np.int32)
        log_probs = np.full((len(positions), k), -np.inf, np.float32)
        ids[:, 0], log_probs[:, 0] = targets[positions], 0
        for end, probabilities in zip(record.ends if soft_labels else (), soft_labels, strict=True):
            row = np.searchsorted(positions, end)
            if row < len(positions) and positions[row] == end:
                order = np.argsort(-probabilities, kind="stable")
                floored = np.maximum(probabilities[order], SMALLEST)
                ids[row], log_probs[row] = np.array(record.labels)[order], np.log(floored / floored.sum())
        self._any |= bool(soft_labels)
        self._rows.append((ids, log_probs))

    def write(self, path: Path) -> None:
        """Writes the table to `path`, an .npz file, if any record had soft labels, or there was no record."""
        if self._rows and not self._any:
            return
        k = max((ids.shape[1] for ids, _ in self._rows), default=1)
        none = np.empty((0, k))
        np.savez(
            path,
            offsets=np.cumsum([0, *(len(ids) for ids, _ in self._rows)]),
            ids=np.concatenate([none.astype(np.int32), *(_pad(ids, k, NO_WORD) for ids, _ in self._rows)]),
            log_probs=np.concatenate(
                [none.astype(np.float32), *(_pad(log_probs, k, -np.inf) for _, log_probs in self._rows)]
            ),
        )

    def counts(self) -> dict[str, int]:
        """Counts of its own.

        Returns:
          An empty dict: it has none.
        """
        return {}


def _pad(array: np.ndarray, k: int, value: float) -> np.ndarray:
    """[targets, k]: an array of fewer columns, filled up."""
    return np.pad(array, ((0, 0), (0, k - array.shape[1])), constant_values=value)
