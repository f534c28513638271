"""`Surface`: what a model's folder knows of a dataset that it was trained on, and of the tasks asked of it."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated

import numpy as np
import pydantic

from brewjax.config import Config, suggest
from brewjax.data.tables.card import CARD, Card
from brewjax.data.tables.dataset import Dataset
from brewjax.data.tables.statistics import Percentiles
from brewjax.data.tables.union import load_card
from brewjax.data.tasks.task import Task

# Of a model's folder, and of each surface's.
SURFACES, PERCENTILES, TASKS, TEMPERATURES = "surfaces", "percentiles.yaml", "tasks", "temperatures.yaml"


class PercentileScale(Config):
    """`Percentiles` of the dataset that a model was trained on, and the time before which they were fitted."""

    until: int
    """Microseconds since 1970; the percentiles were fitted to values from before this time."""
    tables: str = ""
    """SHA-256 of the dataset's tables; empty where they were not read from a folder."""
    quantiles: dict[str, list[float]]
    """Quantiles of each attribute that is shown as a percentile, in ascending order, by the attribute's name."""
    vocabularies: dict[str, list[str]] = {}
    """The ids that have numbers of their own, those with the most events first, by the attribute's name."""

    @classmethod
    def fit(cls, dataset: Dataset, until: int, tables: str = "") -> PercentileScale:
        """Fits the scales of a dataset, see `Percentiles.fit`.

        Args:
          dataset: whose numbers are in buckets.
          until: microseconds since 1970; only events before it count.
          tables: SHA-256 of the dataset's tables, if they are of a folder.

        Returns:
          The scales.
        """
        fitted = Percentiles.fit(dataset, until)
        return cls(until=until, tables=tables, quantiles=fitted.quantiles, vocabularies=fitted.vocabularies)

    @property
    def percentiles(self) -> Percentiles:
        """The scales themselves."""
        return Percentiles(self.quantiles, self.vocabularies)

    def fits(self, dataset: Dataset) -> bool:
        """Whether `dataset` has the same attributes and, before `until`, the same values; its name does not matter."""
        if Percentiles.keys(dataset) != self.percentiles.fitted_keys:
            return False
        refitted = Percentiles.fit(dataset, self.until)
        return refitted.vocabularies == self.vocabularies and all(
            len(refitted.quantiles[name]) == len(scale)
            and np.allclose(refitted.quantiles[name], scale, rtol=1e-9, atol=0)
            for name, scale in self.quantiles.items()
        )


class Temperatures(Config):
    """What the logits of a task's labels are divided by, so that the model's probabilities are right."""

    tasks: dict[str, Annotated[float, pydantic.Field(gt=0, allow_inf_nan=False)]]
    """By the name of the task."""


@dataclasses.dataclass(frozen=True)
class Surface:
    """A dataset and the tasks asked of it, as a model knows them: in words and numbers, without the tables.

    Attributes:
      name: among the surfaces of the model.
      card: the card of the dataset.
      scale: percentiles of the dataset in training.
      tasks: what the model was trained to answer about it.
      temperatures: what the logits of each task's labels are divided by, by its name; 1 where it is missing.
    """

    name: str
    card: Card
    scale: PercentileScale
    tasks: tuple[Task, ...]
    temperatures: Mapping[str, float] = dataclasses.field(default_factory=dict)

    @classmethod
    def fit(cls, name: str, dataset: Dataset, tasks: Sequence[Task]) -> Surface:
        """The surface of a dataset, with percentiles as of the end of the training period of the first task.

        Args:
          name: among the surfaces of the model.
          dataset: that the model is trained on.
          tasks: asked of it; at least one.

        Returns:
          The surface, without temperatures.

        Raises:
          ConfigError: the first task's split does not fit the dataset.
        """
        return cls(name, dataset.card, PercentileScale.fit(dataset, tasks[0].boundaries(dataset)[0]), tuple(tasks))

    def task(self, name: str) -> Task:
        """Looks up a task.

        Args:
          name: of the task.

        Returns:
          The task.

        Raises:
          ValueError: there is none of this name; the message says which there are.
        """
        for task in self.tasks:
            if task.name == name:
                return task
        raise ValueError(f"no task '{name}'; {suggest(name, [task.name for task in self.tasks], listing='tasks')}")

    def save(self, folder: Path) -> None:
        """Writes what `load` reads into `folder`, which is made if need be."""
        (folder / TASKS).mkdir(parents=True, exist_ok=True)
        self.card.save(folder / CARD)
        self.scale.save(folder / PERCENTILES)
        for task in self.tasks:
            task.save(folder / TASKS / f"{task.name}.yaml")
        if self.temperatures:
            Temperatures(tasks=dict(self.temperatures)).save(folder / TEMPERATURES)

    @classmethod
    def load(cls, folder: Path) -> Surface:
        """Reads what `save` wrote.

        Args:
          folder: whose name is the surface's.

        Returns:
          The surface.

        Raises:
          ConfigError: names the file that is missing or broken.
        """
        tasks = tuple(Task.load(path) for path in sorted((folder / TASKS).glob("*.yaml")))
        file = folder / TEMPERATURES
        temperatures = Temperatures.load(file).tasks if file.exists() else {}
        scale = PercentileScale.load(folder / PERCENTILES)
        return cls(folder.name, load_card(folder), scale, tasks, temperatures)
