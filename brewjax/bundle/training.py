"""What a model was trained on: a file in its folder, by which a suite refuses to judge it on what it has seen."""

from __future__ import annotations

from pathlib import Path

from brewjax.config import Config

TRAINING = "training.yaml"


class TrainedOn(Config):
    """A dataset that a model was trained on."""

    dataset: str
    """Its name, by the card."""
    tables: str
    """SHA-256 of its folder."""
    until: int
    """Microseconds since 1970; nothing from this time on was trained on."""
    tasks: tuple[str, ...]
    """The names of the tasks that were trained."""


class Training(Config):
    """`training.yaml` of a model folder."""

    data: tuple[TrainedOn, ...] = ()
    """Every dataset of this training, and of the trainings before it that the model started from."""

    @classmethod
    def of_model(cls, folder: Path) -> Training | None:
        """What the model of a folder was trained on; None where the folder does not say."""
        return cls.load(folder / TRAINING) if (folder / TRAINING).is_file() else None
