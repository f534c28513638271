"""A ranking task: a YAML file of a few lines, never a class to subclass."""

from __future__ import annotations

import datetime
import math
import re
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal, Self

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pydantic

from brewjax.config import Config, Words, misplaced, refuse_twice, suggest
from brewjax.data.tables.card import Card
from brewjax.data.tables.dataset import Dataset
from brewjax.data.tables.reading import show

if TYPE_CHECKING:
    from brewjax.data.text.tokenizer import Tokenizer

MetricName = Literal["auc", "log_loss", "ndcg@10", "calibration_error"]
Split = Literal["train", "validation", "test"]
SHOWN = 5  # values of a column, where a label matches none
MOST_VALUE = 1000  # of a label: 2^1024 is no number


class HistoryConfig(Config):
    """Which past events are told: of these actions, the newest `max_events`, at most `max_age_days` old."""

    actions: tuple[str, ...]
    max_events: int = pydantic.Field(default=100, ge=0)
    max_age_days: float | None = pydantic.Field(default=None, gt=0)

    @pydantic.model_validator(mode="after")
    def _actions_differ(self) -> Self:
        refuse_twice(self.actions, "action", "actions")
        return self


def _one_word(word: Any) -> Any:
    if isinstance(word, (bool, int, float)):
        shown = str(word).lower() if isinstance(word, bool) else word
        raise ValueError(f'put the word in quotes, for instance word: "Yes"; bare, YAML takes it for {shown}')
    if isinstance(word, str) and len(word.split()) != 1:
        raise ValueError(f"'{word}' is {len(word.split())} words; a label's word is one, and one token of the model")
    return word


class Label(Config):
    """One possible answer.

    Attributes:
      when: event columns (or `action`) and their values for which this is the answer: one value or several, of the
        column's own type.
    """

    ALIASES: ClassVar = {
        "label": "word",
        "answer": "word",
        "name": "word",
        "gain": "value",
        "if": "match",
        "when": "match",
    }

    word: Annotated[str, pydantic.BeforeValidator(_one_word)]
    """What the model says; one token."""
    value: float
    """What the answer is worth in a ranking: AUC orders by it, and NDCG, whose gain is 2^value - 1, takes none
    below 0. No two labels have the same."""
    match: dict[str, Any] | None = pydantic.Field(default=None, min_length=1)

    def matches(self, dataset: Dataset, events: np.ndarray) -> np.ndarray:
        """bool [len(events)]: whether this is the answer to each event. ValueError for a value that no column of that
        type can have."""
        match = np.ones(len(events), bool) if self.match is not None else np.zeros(len(events), bool)
        for column in self.match or {}:
            values = dataset.event_column(column)
            wanted = pa.array([_as_type(value, values.type) for value in self.wanted(column)], values.type)
            match &= pc.is_in(values.take(events), value_set=wanted).to_numpy()
        return match

    def wanted(self, column: str) -> list[Any]:
        """The values of the column for which this is the answer."""
        value = (self.match or {})[column]
        return value if isinstance(value, list) else [value]


class NegativesConfig(Config):
    """Items that the member never touched, drawn at random as questions with the answer `label`."""

    label: str
    per_event: int = pydantic.Field(gt=0)


OverlongPolicy = Literal["cut", "skip", "error"]


class QuestionConfig(Config):
    """Which events are asked about, how, and how many behind one history.

    Attributes:
      choose: how it is asked which one of several items has the best answer; to be answered by name.
    """

    ALIASES: ClassVar = {"ask": "question", "text": "question", "negatives": "sampled_negatives"}

    question: Words
    choice_question: str = ""
    actions: tuple[str, ...] = pydantic.Field(min_length=1)
    candidates_per_prompt: int = pydantic.Field(default=16, gt=0)
    sampled_negatives: NegativesConfig | None = None
    overlong: OverlongPolicy = "cut"
    """What to do about an item whose question does not fit into the budget beside the profile: `cut` its texts,
    `skip` the question in training and evaluation, or stop with an `error`. A profile that leaves no room for
    questions is cut too, unless it is to be an error."""

    @pydantic.model_validator(mode="after")
    def _actions_differ(self) -> Self:
        refuse_twice(self.actions, "action", "actions")
        return self


def _moment_text(value: Any) -> Any:
    """Numbers are read as the text that they are written as, to be refused by what is wrong with it."""
    return str(value) if isinstance(value, (int, float)) and not isinstance(value, bool) else value


TimeText = Annotated[str, pydantic.BeforeValidator(_moment_text)]


class TimeSplit(Config):
    """Where validation and test begin: a date, or a share of all events in order of time ("80%")."""

    validation: TimeText
    test: TimeText


class Task(Config):
    """A question to ask of a member and an item. See `configs/tasks/` for examples.

    Attributes:
      note: a developer's wish, said after the instruction ("focus on location").
    """

    ALIASES: ClassVar = {"question": "questions", "prompt": "instruction", "answers": "labels", "id": "name"}

    name: str
    instruction: Words
    steering_note: str = ""
    history: HistoryConfig
    questions: QuestionConfig
    labels: tuple[Label, ...] = pydantic.Field(min_length=2)
    """The possible answers; the first is the one a ranking by a single probability would use."""
    split: TimeSplit = TimeSplit(validation="80%", test="90%")
    metrics: tuple[MetricName, ...] = pydantic.Field(("auc", "log_loss", "ndcg@10", "calibration_error"), min_length=1)

    @pydantic.field_validator("name")
    @classmethod
    def _plain_name(cls, name: str) -> str:
        if not re.fullmatch(r"[a-z0-9_-]+", name):
            plain = re.sub(r"[^a-z0-9_-]+", "_", name.lower()).strip("_")
            hint = f", for instance {plain}" if plain else ""
            raise ValueError(f"'{name}': expected small letters, digits, - and _ alone{hint}")
        return name

    @pydantic.model_validator(mode="after")
    def _labels_differ(self) -> Self:
        refuse_twice(self.words, "word", "labels")
        refuse_twice(self.metrics, "metric", "metrics")
        for index, label in enumerate(self.labels):
            if label.value in self.values[:index]:
                other = self.labels[self.values.tolist().index(label.value)].word
                message = f"{label.value:g} is the value of '{other}' too; a ranking needs one that is higher or lower"
                raise misplaced(message, "labels", index, "value")
            if "ndcg@10" in self.metrics and not 0 <= label.value <= MOST_VALUE:
                message = (
                    f"{label.value:g}: NDCG's gain is 2^value - 1, so values are 0 to {MOST_VALUE}; give others in the "
                    "same order, or leave ndcg@10 out of 'metrics'"
                )
                raise misplaced(message, "labels", index, "value")
        return self

    @pydantic.model_validator(mode="after")
    def _labels_have_events(self) -> Self:
        negatives = self.questions.sampled_negatives
        if negatives and negatives.label not in self.words:
            message = f"'{negatives.label}' is not a label; {suggest(negatives.label, self.words, others='labels')}"
            raise misplaced(message, "questions", "sampled_negatives", "label")
        for index, label in enumerate(self.labels):
            if label.match is None and not (negatives and negatives.label == label.word):
                message = (
                    f"no event is ever '{label.word}': say 'when' it is the answer, or make it the label of "
                    "questions.sampled_negatives"
                )
                raise misplaced(message, "labels", index)
        return self

    @property
    def words(self) -> tuple[str, ...]:
        return tuple(label.word for label in self.labels)

    @property
    def values(self) -> np.ndarray:
        """float64 [labels]."""
        return np.array([label.value for label in self.labels])

    def boundaries(self, dataset: Dataset) -> tuple[int, int]:
        """Microseconds since 1970 at which validation and test begin; ConfigError where they make no sense."""
        moments = {}
        for name in ("validation", "test"):
            try:
                moments[name] = _moment(getattr(self.split, name), dataset.event_time)
            except ValueError as error:
                raise self.error(str(error), "split", name) from None
        validation, test = moments["validation"], moments["test"]
        if validation >= test:
            begins = f"validation ({self.split.validation}) must begin before test ({self.split.test})"
            same = f"; both are {np.datetime64(test, 'us')}" if validation == test else ""
            raise self.error(f"{begins}{same}", "split")
        return validation, test

    def check(self, card: Card, event_columns: list[str]) -> None:
        """Raises ConfigError (file, line, key) for anything the dataset does not have."""
        for part in ("history", "questions"):
            for index, action in enumerate(getattr(self, part).actions):
                if action not in card.events.actions:
                    hint = suggest(action, card.events.actions, others="it has")
                    raise self.error(f"the dataset has no action '{action}'; {hint}", part, "actions", index)
        known = list(dict.fromkeys(["action", *event_columns]))
        for index, label in enumerate(self.labels):
            for column in label.match or {}:
                if column not in known:
                    hint = suggest(column, known, others="they have")
                    raise self.error(f"events have no column '{column}'; {hint}", "labels", index, "match", column)

    def check_values(self, dataset: Dataset) -> None:
        """Raises ConfigError (file, line, key) for a label's value that is not of its column's type, or that no event
        in question has."""
        events = np.flatnonzero(np.isin(dataset.event_action, self.questions.actions))
        for index, label in enumerate(self.labels):
            for column in label.match or {}:
                try:
                    for value in label.wanted(column):
                        _check_type(value, dataset.event_column(column).type)
                except ValueError as error:
                    raise self.error(f"{error}", "labels", index, "match", column) from None
            if label.match is not None and not label.matches(dataset, events).any():
                matches = " and ".join(_matches(dataset, label, column, events) for column in label.match)
                raise self.error(f"no event in question is {matches}", "labels", index, "match")

    def check_words(self, tokenizer: Tokenizer) -> None:
        """Raises ConfigError (file, line) for a label word that is not one token."""
        for index, word in enumerate(self.words):
            try:
                tokenizer.label_token_id(word)
            except ValueError as error:
                raise self.error(str(error), "labels", index, "word") from None


def load_tasks(paths: Iterable[str | Path], dataset: Dataset) -> list[Task]:
    """Task files, each checked against the dataset; ConfigError names file and line."""
    tasks = [Task.load(path) for path in paths]
    columns = [name for name in dataset.events.column_names if name != dataset.card.events.action]
    for task in tasks:
        task.check(dataset.card, columns)
        task.boundaries(dataset)
        task.check_values(dataset)
    names = [task.name for task in tasks]
    for task in tasks:
        if names.count(task.name) > 1:
            raise task.error(f"two tasks are named '{task.name}'", "name")
    return tasks


def _matches(dataset: Dataset, label: Label, column: str, events: np.ndarray) -> str:
    """What a label wants of a column, and a few values that the events in question have."""
    values = dataset.event_column(column).take(events).unique().drop_null()
    shown = ", ".join(show(value) for value in values[:SHOWN]) + (", .." if len(values) > SHOWN else "")
    return f"{column}: {label.match[column]!r} (there is: {shown or 'nothing'})"  # type: ignore[index]


def _check_type(value: Any, type_: pa.DataType) -> None:
    """Raises ValueError, with what would be right, where a column of this type cannot have the value."""
    if pa.types.is_nested(type_):
        raise ValueError(f"this column holds {type_}; a label goes by columns of single values")
    if value is None:
        raise ValueError("an unknown value matches nothing; leave null out")
    if isinstance(value, (list, dict)):
        raise ValueError(f"found {value!r}; give one value, or a list of values")
    text, number = isinstance(value, str), isinstance(value, (int, float)) and not isinstance(value, bool)
    if pa.types.is_boolean(type_) and not isinstance(value, bool):
        raise ValueError(f"this column holds true and false, found {value!r}")
    if pa.types.is_string(type_) and not text:
        shown = str(value).lower() if isinstance(value, bool) else value
        raise ValueError(f'this column holds texts, found {shown}; put it in quotes: "{shown}"')
    if (pa.types.is_integer(type_) or pa.types.is_floating(type_)) and not number:
        bare = f"; write it without quotes: {value}" if text and _is_number(value) else ""
        raise ValueError(f"this column holds numbers, found {value!r}{bare}")
    _as_type(value, type_)


def _as_type(value: Any, type_: pa.DataType) -> Any:
    """A value of a task file as a column of this type has it. ValueError where it can have no such value.

    A category of numbers is text in a server's request, so a number is read as text where text is wanted.
    """
    if pa.types.is_string(type_):
        return str(value)
    if pa.types.is_integer(type_) and isinstance(value, float):
        if not value.is_integer():
            raise ValueError(f"this column holds whole numbers, found {value!r}")
        return int(value)
    if pa.types.is_date(type_) or pa.types.is_timestamp(type_):
        try:
            moment = datetime.datetime.fromisoformat(str(value))
        except ValueError:
            raise ValueError(f"this column holds dates, found {value!r}; expected one such as 1998-03-07") from None
        if pa.types.is_date(type_):
            return moment.date()
        moment = moment.replace(tzinfo=moment.tzinfo or datetime.UTC)
        return moment if type_.tz else moment.astimezone(datetime.UTC).replace(tzinfo=None)
    if not (pa.types.is_integer(type_) or pa.types.is_floating(type_) or pa.types.is_boolean(type_)):
        raise ValueError(f"this column holds {type_}; a label goes by texts, numbers, dates, or true and false")
    return value


def _is_number(text: str) -> bool:
    try:
        return math.isfinite(float(text))
    except ValueError:
        return False


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
        meant = f"{float(text) * (100 if float(text) < 1 else 1):g}%" if _is_number(text) else "80%"
        raise ValueError(f"'{text}': expected a date, 1998-03-07, or a share, {meant}") from None
    return int(date.replace(tzinfo=date.tzinfo or datetime.UTC).timestamp() * 1_000_000)
