"""The file of a suite: surfaces, their tasks with tier and version, and how many questions are drawn."""

from __future__ import annotations

from pathlib import Path
from typing import ClassVar, Literal, NamedTuple, Self

import pydantic

from brewjax.config import Config, Seed, Words, misplaced, suggest
from brewjax.data.tables.dataset import Dataset
from brewjax.data.tasks.task import Task

Size = Literal["quick", "full"]
SIZES: tuple[Size, ...] = ("quick", "full")


class Tier(Config):
    """Tasks of one distance from training."""

    title: Words
    """What the leaderboard calls it."""
    may_train_on: Literal["tasks", "tables", "nothing"] = "nothing"
    """What a model may have seen of it, before the test period: the tasks themselves, the tables alone, or nothing."""


class Draw(Config):
    """How many questions of a task are drawn: whole lists at random, until both numbers are reached."""

    questions: int = pydantic.Field(gt=0)
    """At least so many questions."""
    lists: int = pydantic.Field(gt=0)
    """At least so many lists with different answers: others cannot be ranked, and say nothing."""


class SuiteTask(Config):
    """A task of a surface."""

    ALIASES: ClassVar = {"task": "file", "path": "file"}

    file: Words
    """The task file."""
    tier: Words
    """One of the suite's `tiers`."""
    version: int = pydantic.Field(default=1, ge=1)
    """To be raised when the task file, the tables or the draw change: its questions are drawn and frozen anew."""
    past_events: tuple[int, ...] = ()
    """Cold starts: the same questions are asked again with only so many of the member's latest events, such as [0, 5].
    They are slices of the leaderboard and count in no mean."""


class SimulatedNetwork(Config):
    """A simulated network (docs/network.md), whose folders `brewjax suite fetch` writes."""

    members: int = pydantic.Field(default=10_000, gt=0)
    """How many members there are."""
    seed: Seed = 0
    """Another seed is another network: other members, jobs, posts."""
    months: int = pydantic.Field(default=8, gt=0)
    """How long it goes on."""


class SuiteSurface(Config):
    """A dataset and the tasks asked of it."""

    dataset: Words
    """The dataset folder."""
    public: Words | None = None
    """The name by which `brewjax data fetch` knows the dataset, for `brewjax suite fetch`; null: it is your own."""
    simulated: SimulatedNetwork | None = None
    """The network that the dataset is a part of, in the folder above it, for `brewjax suite fetch`."""
    domain: Words
    """What it is about. Surfaces of one domain are averaged before domains are."""
    tasks: tuple[SuiteTask, ...] = pydantic.Field(min_length=1)
    """The tasks."""


class Suite(Config):
    """A suite: what any model is judged by. See `configs/suites/`."""

    ALIASES: ClassVar = {"domains": "surfaces", "datasets": "surfaces"}

    name: Words
    """The suite's name; its results lie in runs/suites/NAME."""
    seed: Seed = 0
    """Of the questions that are drawn, and of the bootstrap."""
    bootstrap: int = pydantic.Field(default=400, ge=20)
    """Resamples of members for each interval."""
    list_size: int = pydantic.Field(default=8, ge=2)
    """The most questions of a member's list; the lists of requests are asked whole."""
    draws: dict[Size, Draw]
    """How much is drawn for each size, `quick` and `full`."""
    tiers: dict[str, Tier] = pydantic.Field(min_length=1)
    """The tiers by name."""
    surfaces: dict[str, SuiteSurface] = pydantic.Field(min_length=1)
    """The surfaces by name."""

    @pydantic.model_validator(mode="after")
    def _names_fit(self) -> Self:
        for size in SIZES:
            if size not in self.draws:
                raise misplaced(f"'{size}' is missing; give the draws of {' and '.join(SIZES)}", "draws")
        for name, surface in self.surfaces.items():
            for index, task in enumerate(surface.tasks):
                if task.tier not in self.tiers:
                    hint = suggest(task.tier, self.tiers)
                    raise misplaced(f"no tier '{task.tier}'; {hint}", "surfaces", name, "tasks", index, "tier")
        return self

    @property
    def folder(self) -> Path:
        """Where questions, predictions and the leaderboard lie."""
        return Path("runs") / "suites" / self.name

    def tasks_of(self, surface: str) -> list[SurfaceTask]:
        """Reads the tasks of a surface; whether they fit its dataset is not checked.

        Args:
          surface: its name in the suite.

        Returns:
          The tasks, in the suite's order.

        Raises:
          ConfigError: a task file is wrong, or two tasks have one name.
        """
        entries = self.surfaces[surface].tasks
        tasks = [SurfaceTask(surface, entry, Task.load(entry.file)) for entry in entries]
        names = [each.task.name for each in tasks]
        for index, name in enumerate(names):
            if name in names[:index]:
                message = f"a task '{name}' is there already; give one of them another name"
                raise self.error(message, "surfaces", surface, "tasks", index, "file")
        return tasks

    def load_surface(self, surface: str) -> tuple[Dataset, list[SurfaceTask]]:
        """Reads the dataset and the tasks of a surface.

        Args:
          surface: its name in the suite.

        Returns:
          The dataset, and its tasks, checked against it.

        Raises:
          ConfigError: the folder is missing or wrong, or a task does not fit it.
          DatasetError: the tables do not fit their card.
        """
        folder = Path(self.surfaces[surface].dataset)
        if not folder.exists() and (self.surfaces[surface].public or self.surfaces[surface].simulated):
            raise self.error(f"{folder} is not there; run `brewjax suite fetch`", "surfaces", surface, "dataset")
        dataset, tasks = Dataset.load(folder), self.tasks_of(surface)
        for each in tasks:
            each.task.boundaries(dataset)
            each.task.check(dataset)
        return dataset, tasks


class SurfaceTask(NamedTuple):
    """A task of a surface, with what the suite says of it."""

    surface: str
    entry: SuiteTask
    task: Task

    @property
    def name(self) -> str:
        """Unique within the suite: "films/liked"."""
        return f"{self.surface}/{self.task.name}"
