"""`Surface`: what a model's folder knows of a dataset that it was trained on, and of the tasks asked of it."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated

import pydantic

from brewjax.config import Config, suggest
from brewjax.data.tables.card import CARD, Card
from brewjax.data.tables.dataset import Dataset
from brewjax.data.tables.scales import Scales
from brewjax.data.tables.union import load_card
from brewjax.data.tasks.task import Task

# Of a model's folder, and of each surface's.
SURFACES, SCALES, TASKS, TEMPERATURES = "surfaces", "scales.yaml", "tasks", "temperatures.yaml"


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
      scales: of its numbers and ids in training.
      tasks: what the model was trained to answer about it.
      temperatures: what the logits of each task's labels are divided by, by its name; 1 where it is missing.
    """

    name: str
    card: Card
    scales: Scales
    tasks: tuple[Task, ...]
    temperatures: Mapping[str, float] = dataclasses.field(default_factory=dict)

    @classmethod
    def fit(cls, name: str, dataset: Dataset, tasks: Sequence[Task]) -> Surface:
        """The surface of a dataset, with scales as of the end of the training period of the first task.

        Args:
          name: among the surfaces of the model.
          dataset: that the model is trained on.
          tasks: asked of it; at least one.

        Returns:
          The surface, without temperatures.

        Raises:
          ConfigError: the first task's split does not fit the dataset.
        """
        return cls(name, dataset.card, Scales.fit(dataset, tasks[0].boundaries(dataset)[0]), tuple(tasks))

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
        self.scales.save(folder / SCALES)
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
        scales = Scales.load(folder / SCALES)
        return cls(folder.name, load_card(folder), scales, tasks, temperatures)
