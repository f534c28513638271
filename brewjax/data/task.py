"""A ranking task: a YAML file of a few lines, never a class to subclass."""

from __future__ import annotations

import datetime
from collections.abc import Iterable
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
import pydantic

from brewjax.config import Config
from brewjax.data.dataset import Card, Dataset
from brewjax.data.tokenizer import Tokenizer

MetricName = Literal["auc", "log_loss", "ndcg@10", "calibration_error"]
Split = Literal["train", "validation", "test"]
Moment = Annotated[str, pydantic.BeforeValidator(str)]


class History(Config):
    """Which past events are told: of these actions, the newest `max_events`, at most `max_age_days` old."""

    actions: tuple[str, ...]
    max_events: int = pydantic.Field(default=100, ge=0)
    max_age_days: float | None = pydantic.Field(default=None, gt=0)


def _quoted(word: Any) -> Any:
    if isinstance(word, bool):
        raise ValueError('put the word in quotes, for instance word: "Yes"; bare, YAML takes it for true or false')
    return word


class Label(Config):
    """One possible answer.

    Attributes:
      word: what the model says; one token.
      value: what the answer is worth in a ranking (the gain of NDCG; AUC orders by it).
      when: event columns (or `action`) and their values for which this is the answer.
    """

    word: Annotated[str, pydantic.BeforeValidator(_quoted)]
    value: float
    when: dict[str, Any] | None = None

    def matches(self, dataset: Dataset, events: np.ndarray) -> np.ndarray:
        """bool [len(events)]: whether this is the answer to each event."""
        match = np.ones(len(events), bool) if self.when is not None else np.zeros(len(events), bool)
        for column, wanted in (self.when or {}).items():
            wanted = wanted if isinstance(wanted, list) else [wanted]
            match &= np.isin(dataset.event_column(column)[events], wanted)
        return match


class Negatives(Config):
    """Items that the member never touched, drawn at random as questions with the answer `label`."""

    label: str
    per_event: int = pydantic.Field(gt=0)


class Questions(Config):
    """Which events are asked about, how, and how many behind one history.

    Attributes:
      choose: how it is asked which one of several items has the best answer; to be answered by name.
    """

    ask: str
    choose: str = ""
    actions: tuple[str, ...]
    per_prompt: int = pydantic.Field(default=16, gt=0)
    sampled_negatives: Negatives | None = None


class TimeSplit(Config):
    """Where validation and test begin: a date, or a share of all events in order of time ("80%")."""

    validation: Moment
    test: Moment


class Task(Config):
    """A question to ask of a member and an item. See `configs/tasks/` for examples.

    Attributes:
      labels: the possible answers; the first is the one a ranking by a single probability would use.
      note: a developer's wish, said after the instruction ("focus on location").
    """

    name: str = pydantic.Field(pattern=r"^[a-z0-9_-]+$")
    instruction: str
    note: str = ""
    history: History
    questions: Questions
    labels: tuple[Label, ...] = pydantic.Field(min_length=2)
    split: TimeSplit = TimeSplit(validation="80%", test="90%")
    metrics: tuple[MetricName, ...] = ("auc", "log_loss", "ndcg@10", "calibration_error")

    @property
    def words(self) -> tuple[str, ...]:
        return tuple(label.word for label in self.labels)

    @property
    def values(self) -> np.ndarray:
        """float64 [labels]."""
        return np.array([label.value for label in self.labels])

    def boundaries(self, dataset: Dataset) -> tuple[int, int]:
        """Microseconds since 1970 at which validation and test begin; ConfigError where they make no sense."""
        try:
            validation, test = (_moment(text, dataset.event_time) for text in (self.split.validation, self.split.test))
            if validation >= test:
                raise ValueError(f"validation ({self.split.validation}) must begin before test ({self.split.test})")
        except ValueError as error:
            raise self.error(str(error), "split") from None
        return validation, test

    def check(self, card: Card, event_columns: list[str]) -> None:
        """Raises ConfigError (file, line, key) for anything the dataset does not have."""
        for part in ("history", "questions"):
            for index, action in enumerate(getattr(self, part).actions):
                if action not in card.events.actions:
                    known = ", ".join(card.events.actions)
                    raise self.error(f"the dataset has no action '{action}'; it has: {known}", part, "actions", index)
        for index, label in enumerate(self.labels):
            for column in label.when or {}:
                if column != "action" and column not in event_columns:
                    known = ", ".join(dict.fromkeys(["action", *event_columns]))
                    raise self.error(f"events have no column '{column}'; they have: {known}", "labels", index, "when")
        if len(set(self.words)) < len(self.words):
            raise self.error("two labels have the same word", "labels")
        negatives = self.questions.sampled_negatives
        if negatives and negatives.label not in self.words:
            raise self.error(
                f"'{negatives.label}' is not a label; labels: {', '.join(self.words)}",
                "questions", "sampled_negatives", "label",
            )  # fmt: skip

    def check_words(self, tokenizer: Tokenizer) -> None:
        """Raises ConfigError (file, line) for a label word that is not one token."""
        for index, word in enumerate(self.words):
            try:
                tokenizer.word(word)
            except ValueError as error:
                raise self.error(str(error), "labels", index, "word") from None


def load_tasks(paths: Iterable[str | Path], dataset: Dataset) -> list[Task]:
    """Task files, each checked against the dataset; ConfigError names file and line."""
    tasks = [Task.load(path) for path in paths]
    columns = [name for name in dataset.events.column_names if name != dataset.card.events.action]
    for task in tasks:
        task.check(dataset.card, columns)
        task.boundaries(dataset)
        _refuse_idle_labels(task, dataset)
    names = [task.name for task in tasks]
    for task in tasks:
        if names.count(task.name) > 1:
            raise task.error(f"two tasks are named '{task.name}'", "name")
    return tasks


def _refuse_idle_labels(task: Task, dataset: Dataset) -> None:
    """A label that no event has is most often a value of the wrong type, "4" for 4."""
    asked = np.flatnonzero(np.isin(dataset.event_action, task.questions.actions))
    for index, label in enumerate(task.labels):
        if label.when is not None and not label.matches(dataset, asked).any():
            types = ", ".join(f"{name} is {dataset.event_column(name).dtype}" for name in label.when)
            raise task.error(f"no event in question matches {label.when} ({types})", "labels", index, "when")


def _moment(text: str, times: np.ndarray) -> int:
    if text.endswith("%"):
        try:
            share = float(text[:-1]) / 100
        except ValueError:
            share = float("nan")
        if not 0 < share < 1:
            raise ValueError(f"'{text}': a share of the events is a number between 0% and 100%")
        return int(np.quantile(times, share))
    try:
        date = datetime.datetime.fromisoformat(text)
    except ValueError:
        raise ValueError(f"'{text}': expected a date such as 1998-03-07, or a share such as 80%") from None
    return int(date.replace(tzinfo=date.tzinfo or datetime.UTC).timestamp() * 1_000_000)
