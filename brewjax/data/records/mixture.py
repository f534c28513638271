"""How several sources of training data share the tokens of a run."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path

import pydantic

from brewjax.config import Config
from brewjax.data.records.shards import read_counts


class MixConfig(Config):
    """How sources of training data (tasks, texts) share a run's tokens.

    Source i gets a share proportional to weight_i * n_i^(1 / temperature) of all tokens, where n_i is its number of
    tokens.
    """

    temperature: float = pydantic.Field(default=1.0, gt=0)
    """At 1 a source's share is proportional to its size; a higher temperature evens the shares out (T5, arXiv
    1910.10683, section 3.5.2, which counts examples instead of tokens)."""
    weights: dict[str, pydantic.NonNegativeFloat] = {}
    """Weights by the name of a source; 1 for a source that is not named, 0 leaves a source out."""

    def check_names(self, names: Iterable[str]) -> None:
        """Checks the weights against the names of the sources.

        Args:
          names: of all sources.

        Raises:
          ConfigError: a weight is of no source, or every source has weight 0.
        """
        for name in self.weights:
            if name not in names:
                raise self.error(f"no source '{name}'; sources: {', '.join(names)}", "weights", name)
        if not any(self.weights.get(name, 1.0) for name in names):
            raise self.error("every source has weight 0", "weights")

    def shares(self, folders: Mapping[str, Path], weights: Mapping[str, float] | None = None) -> dict[Path, float]:
        """How much of what is trained on comes from each folder of shards.

        Args:
          folders: of shards, by the name of the source.
          weights: of each source, by which its weight here is multiplied: that of its surface.

        Returns:
          The share of all tokens of each folder; the shares sum to 1, and a source of weight 0 is left out.

        Raises:
          ConfigError: as `check_names`.
          ValueError: a folder is incomplete.
        """
        self.check_names(folders)
        sizes = {folder: read_counts(folder)["tokens"] ** (1 / self.temperature) for folder in folders.values()}
        weighted = {
            folder: self.weights.get(name, 1.0) * (weights or {}).get(name, 1.0) * sizes[folder]
            for name, folder in folders.items()
        }
        return {folder: weight / sum(weighted.values()) for folder, weight in weighted.items() if weight}
