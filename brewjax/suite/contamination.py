"""A model is not judged on what it was trained on: its folder says what that was, and an overlap is refused."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from brewjax.bundle.training import TrainedOn, Training
from brewjax.config import ConfigError
from brewjax.data.tables.dataset import Dataset, dataset_names
from brewjax.suite.suite import Suite, SurfaceTask


class ContaminationError(ConfigError):
    """A model was trained on what the suite asks."""


def check_training(suite: Suite, training: Training, dataset: Dataset, tasks: list[SurfaceTask]) -> None:
    """Refuses what a model must not have seen of a surface: by the task's tier the tables, the task itself, and always
    the test period.

    Raises:
      ContaminationError: names the task, and what was trained on.
    """
    known = dataset_names(dataset.path)
    for trained in training.data:
        if not any(trained.dataset == name or trained.tables == digest for name, digest in known):
            continue
        for surface_task in tasks:
            if problem := _overlap(suite, trained, dataset, surface_task):
                raise ContaminationError(
                    f"{surface_task.name}: the model was trained on {problem}; judge it by a suite without this task"
                )


def check_model(suite: Suite, training: Training | None, surfaces: Iterable[str]) -> None:
    """`check_training` of some surfaces. Nothing is known of a model without `training`: it is not refused.

    Raises:
      ContaminationError: as `check_training`.
    """
    for surface in surfaces if training else ():
        assert training is not None  # or there were no surfaces
        folder = Path(suite.surfaces[surface].dataset)
        names, digests = {each.dataset for each in training.data}, {each.tables for each in training.data}
        known = dataset_names(folder) if folder.exists() else []
        if any(name in names or digest in digests for name, digest in known):
            check_training(suite, training, *suite.load_surface(surface))


def _overlap(suite: Suite, trained: TrainedOn, dataset: Dataset, surface_task: SurfaceTask) -> str:
    tier, task = suite.tiers[surface_task.entry.tier], surface_task.task
    if tier.may_train_on == "nothing":
        return f"'{trained.dataset}', of which tier {surface_task.entry.tier} ({tier.title}) allows nothing"
    if tier.may_train_on == "tables" and task.name in trained.tasks:
        return f"the task '{task.name}', of which tier {surface_task.entry.tier} ({tier.title}) allows the tables alone"
    _, test = task.boundaries(dataset)
    if trained.until > test:
        until, begins = (dataset.describe_moment(moment) for moment in (trained.until, test))
        return f"'{trained.dataset}' until {until}, and the test period begins at {begins}"
    return ""
