"""TODO."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path

import pydantic

from brewjax.config import Config
from brewjax.data.records.shards import read_counts


class MixConfig(Config):
    """How sources of training data (tasks, texts) share a run's tokens: p_i ~ weight_i n_i^(1 / temperature)."""

    temperature: float = pydantic.Field(default=1.0, gt=0)
    """1 leaves each source its share, n_i tokens of all; a higher one evens them out (T5, arXiv 1910.10683, section
    3.5.2, where n_i are examples)."""
    weights: dict[str, pydantic.NonNegativeFloat] = {}
    """By a source's name; 1 for one that is not named, 0 leaves it out."""

    def check_names(self, names: Iterable[str]) -> None:
        """ConfigError for a weight of a source that is not among `names`, and where all of these have weight 0."""
        for name in self.weights:
            if name not in names:
                raise self.error(f"no source '{name}'; sources: {', '.join(names)}", "weights", name)
        if not any(self.weights.get(name, 1.0) for name in names):
            raise self.error("every source has weight 0", "weights")

    def shares(self, folders: Mapping[str, Path]) -> dict[Path, float]:
        """The share of each named folder of shards, 1 in all. ConfigError for a weight of a name that is not there."""
        self.check_names(folders)
        sizes = {folder: read_counts(folder)["tokens"] ** (1 / self.temperature) for folder in folders.values()}
        weighed = {folder: self.weights.get(name, 1.0) * sizes[folder] for name, folder in folders.items()}
        return {folder: weight / sum(weighed.values()) for folder, weight in weighed.items() if weight}
