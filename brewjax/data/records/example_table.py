"""Numbers of training examples that a model gives before training, in files: what is there is not computed again."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

import numpy as np

from brewjax.config import ConfigError
from brewjax.console import track
from brewjax.data.tasks.examples import RankingExample
from brewjax.paths import atomic_file

PART = 4096  # examples that are computed at a time, into a file


def write_example_table(
    folder: Path,
    examples: Iterable[RankingExample],
    compute: Callable[[Sequence[RankingExample]], list[np.ndarray]],
    title: str,
) -> None:
    """Writes an array for each example, for `ExampleTable` to read.

    Args:
      folder: where a file for every `PART` examples goes; those that are there are not made again.
      examples: told apart by their seeds.
      compute: the array of each of some examples, all of one dtype.
      title: of the progress.
    """
    folder.mkdir(parents=True, exist_ok=True)
    examples = iter(examples)
    parts = iter(lambda: list(itertools.islice(examples, PART)), [])
    for number, part in enumerate(track(parts, title)):
        if not (path := folder / f"part-{number:06d}.npz").exists():
            arrays = compute(part)
            with atomic_file(path) as temporary_path, open(temporary_path, "wb") as file:
                seeds = np.array([example.seed for example in part], np.uint64)
                np.savez(file, seeds=seeds, counts=[len(array) for array in arrays], values=np.concatenate(arrays))


class ExampleTable:
    """The arrays that `write_example_table` left.

    Args:
      folder: where.

    Raises:
      ConfigError: there are none.
    """

    def __init__(self, folder: Path):
        parts = [dict(np.load(path)) for path in sorted(folder.glob("part-*.npz"))]
        if not parts:
            raise ConfigError(f"{folder}: no tables of examples there")
        seeds, counts, self._values = (np.concatenate([part[name] for part in parts]) for name in parts[0])
        ends, order = np.cumsum(counts), np.argsort(seeds, kind="stable")
        self._seeds, self._starts, self._ends = seeds[order], (ends - counts)[order], ends[order]

    def look_up(self, example: RankingExample) -> np.ndarray:
        """Looks up the array of an example.

        Args:
          example: one of those that the table was written for.

        Returns:
          int32 or float32 [n], as it was written.
        """
        at = int(np.searchsorted(self._seeds, np.uint64(example.seed)))
        return self._values[self._starts[at] : self._ends[at]]
