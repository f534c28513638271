"""Soft labels of training records: the probabilities of another ranker at each target, in a file beside the shards."""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from brewjax.data.text.encode import NO_TARGET, EncodedPrompt

SOFT_LABELS = "soft_labels.npz"  # of a folder of shards
NO_WORD = -1
SMALLEST = 1e-6  # probability of a label, whatever the ranker says: its logarithm stays finite


class SoftLabelTable(NamedTuple):
    """The soft labels of a folder of shards, for each record its targets in order.

    Attributes:
      offsets: int64 [records + 1]; record r has rows offsets[r] to offsets[r + 1].
      ids: int32 [targets, k], label words, the likeliest first; -1 for no word.
      log_probs: float32 [targets, k]; -inf for no word.
    """

    offsets: np.ndarray
    ids: np.ndarray
    log_probs: np.ndarray

    @classmethod
    def load(cls, folder: Path) -> SoftLabelTable:
        """Reads the table of a folder.

        Raises:
          ValueError: the folder has none.
        """
        if not (folder / SOFT_LABELS).is_file():
            raise ValueError(f"{folder}: its records have no soft labels; run the recipe again")
        with np.load(folder / SOFT_LABELS) as arrays:
            return cls(**arrays)


class SoftLabelWriter:
    """Collects the soft labels of records as they are written. A target without any is as certain as its answer."""

    def __init__(self) -> None:
        self._rows: list[tuple[np.ndarray, np.ndarray]] = []
        self._any = False

    def add(self, encoded: Any, targets: np.ndarray) -> None:
        """Adds a record: an encoded prompt or text, with its targets (int32 [T])."""
        positions = np.flatnonzero(targets != NO_TARGET)
        soft_labels = encoded.soft_labels if isinstance(encoded, EncodedPrompt) else []
        k = max(1, len(encoded.labels) if soft_labels else 1)
        ids = np.full((len(positions), k), NO_WORD, np.int32)
        log_probs = np.full((len(positions), k), -np.inf, np.float32)
        ids[:, 0], log_probs[:, 0] = targets[positions], 0
        for end, probabilities in zip(encoded.ends if soft_labels else (), soft_labels, strict=True):
            row = np.searchsorted(positions, end)
            if row < len(positions) and positions[row] == end:
                order = np.argsort(-probabilities, kind="stable")
                floored = np.maximum(probabilities[order], SMALLEST)
                ids[row], log_probs[row] = np.array(encoded.labels)[order], np.log(floored / floored.sum())
        self._any |= bool(soft_labels)
        self._rows.append((ids, log_probs))

    def write(self, folder: Path) -> None:
        """Writes the table, if any record had soft labels."""
        if not self._any:
            return
        k = max(ids.shape[1] for ids, _ in self._rows)
        pad = lambda array, value: np.pad(array, ((0, 0), (0, k - array.shape[1])), constant_values=value)  # noqa: E731
        np.savez(
            folder / SOFT_LABELS,
            offsets=np.cumsum([0, *(len(ids) for ids, _ in self._rows)]),
            ids=np.concatenate([pad(ids, NO_WORD) for ids, _ in self._rows]),
            log_probs=np.concatenate([pad(log_probs, -np.inf) for _, log_probs in self._rows]),
        )
