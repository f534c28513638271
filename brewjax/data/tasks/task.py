"""A ranking task, declared in a YAML file of a few lines: a question about a member and an item, and its answers."""

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
SHOWN = 5  # values of a column that an error lists if a label matches none
MAX_VALUE = 1000  # of a label: NDCG's 2^1024 would overflow


class HistoryConfig(Config):
    """Which past events the history of a prompt holds."""

    actions: tuple[str, ...]
    """Events of these actions are in the history."""
    max_events: int = pydantic.Field(default=100, ge=0)
    """Only the newest events are, at most so many."""
    max_age_days: float | None = pydantic.Field(default=None, gt=0)
    """Only events of at most this age are, in days before the cutoff time; by default events of any age."""

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
    """One possible answer."""

    ALIASES: ClassVar = {
        "label": "word",
        "answer": "word",
        "name": "word",
        "gain": "value",
        "if": "match",
        "when": "match",
    }

    word: Annotated[str, pydantic.BeforeValidator(_one_word)]
    """The label word, with which the model answers; one token."""
    value: float
    """The answer's worth in a ranking: AUC orders by it, and NDCG, whose gain is 2^value - 1, needs values from 0. No
    two labels have the same."""
    match: dict[str, Any] | None = pydantic.Field(default=None, min_length=1)
    """Event columns (or `action`), each with the value, or list of values, for which this is the answer; all must
    match. Only the label of `sampled_negatives` may leave it out."""

    def matches(self, dataset: Dataset, events: np.ndarray) -> np.ndarray:
        """Whether this is the answer to each event.

        Args:
          events: int [events], rows of the events table.

        Returns:
          bool [events].

        Raises:
          ValueError: a value is not of its column's type.
        """
        match = np.ones(len(events), bool) if self.match is not None else np.zeros(len(events), bool)
        for column in self.match or {}:
            values = dataset.event_column(column)
            answers = pa.array([_as_type(value, values.type) for value in self.match_values(column)], values.type)
            match &= pc.is_in(values.take(events), value_set=answers).to_numpy()
        return match

    def match_values(self, column: str) -> list[Any]:
        """The values of an event column for which this is the answer."""
        value = (self.match or {})[column]
        return value if isinstance(value, list) else [value]


class NegativesConfig(Config):
    """Sampled negatives: items without any event of the member, drawn at random as candidates."""

    label: str
    """The label word that is the answer for sampled items."""
    per_event: int = pydantic.Field(gt=0)
    """How many items are sampled for each event."""


OverlongPolicy = Literal["truncate", "skip", "error"]


class QuestionConfig(Config):
    """Which events are asked about, in which words, and how many candidates share one history."""

    ALIASES: ClassVar = {
        "ask": "question",
        "text": "question",
        "choose": "choice_question",
        "per_prompt": "candidates_per_prompt",
        "negatives": "sampled_negatives",
    }

    question: Words
    """The question about one candidate, for instance "Will the member apply to the following job"."""
    choice_question: str = ""
    """The multiple-choice form, "To which of the following jobs will the member apply", answered by an item's name;
    needed where training draws choices (`choice_fraction`)."""
    actions: tuple[str, ...] = pydantic.Field(min_length=1)
    """Events of these actions are asked about."""
    candidates_per_prompt: int = pydantic.Field(default=16, gt=0)
    """The most candidates that share one history, sampled negatives included."""
    sampled_negatives: NegativesConfig | None = None
    """Adds randomly sampled items as negatives; by default only events are candidates."""
    overlong: OverlongPolicy = "truncate"
    """The policy for an item whose question does not fit into the token budget together with the profile: `truncate`
    its texts, `skip` the question in training and evaluation, or stop with an `error`. A profile that leaves no room
    for questions is truncated too, unless the policy is `error`."""

    @pydantic.model_validator(mode="after")
    def _actions_differ(self) -> Self:
        refuse_twice(self.actions, "action", "actions")
        return self


def _time_text(value: Any) -> Any:
    """Turns a number into text, so that the later check can name what is wrong with it."""
    return str(value) if isinstance(value, (int, float)) and not isinstance(value, bool) else value


TimeText = Annotated[str, pydantic.BeforeValidator(_time_text)]


class TimeSplit(Config):
    """The temporal split: training ends where validation begins, and validation where the test period begins."""

    validation: TimeText
    """Start of the validation period: a date (2025-01-05, with or without a time), or a share of all events in order of
    time ("80%")."""
    test: TimeText
    """Start of the test period, later than `validation`: a date, or a share of all events."""


class Task(Config):
    """A ranking task: one question about a member and an item, whose answers rank items. See `configs/tasks/`."""

    ALIASES: ClassVar = {
        "question": "questions",
        "prompt": "instruction",
        "answers": "labels",
        "id": "name",
        "note": "steering_note",
    }

    name: str
    """The task's name, unique within a run: small letters, digits, - and _."""
    instruction: Words
    """The instruction at the start of every prompt."""
    steering_note: str = ""
    """A developer's wish, rendered after the instruction, for instance "focus on location"."""
    history: HistoryConfig
    """Which past events a prompt holds."""
    questions: QuestionConfig
    """Which events are asked about, and how."""
    labels: tuple[Label, ...] = pydantic.Field(min_length=2)
    """The possible answers; reliability plots and binary calibration are of the first."""
    split: TimeSplit = TimeSplit(validation="80%", test="90%")
    """The times at which validation and test begin."""
    metrics: tuple[MetricName, ...] = pydantic.Field(("auc", "log_loss", "ndcg@10", "calibration_error"), min_length=1)
    """The metrics of an evaluation; the first is the headline of reports."""

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
                word = self.labels[self.values.tolist().index(label.value)].word
                message = f"{label.value:g} is the value of '{word}' too; a ranking needs one that is higher or lower"
                raise misplaced(message, "labels", index, "value")
            if "ndcg@10" in self.metrics and not 0 <= label.value <= MAX_VALUE:
                message = (
                    f"{label.value:g}: NDCG's gain is 2^value - 1, so values are 0 to {MAX_VALUE}; give others in the "
                    "same order, or leave ndcg@10 out of 'metrics'"
                )
                raise misplaced(message, "labels", index, "value")
        return self

    @pydantic.model_validator(mode="after")
    def _labels_have_events(self) -> Self:
        negatives = self.questions.sampled_negatives
        if negatives and negatives.label not in self.words:
            message = f"'{negatives.label}' is not a label; {suggest(negatives.label, self.words, listing='labels')}"
            raise misplaced(message, "questions", "sampled_negatives", "label")
        for index, label in enumerate(self.labels):
            if label.match is None and not (negatives and negatives.label == label.word):
                message = (
                    f"no event is ever '{label.word}': give it 'match', or make it the label of "
                    "questions.sampled_negatives"
                )
                raise misplaced(message, "labels", index)
        return self

    @property
    def words(self) -> tuple[str, ...]:
        """The label words, in the order of `labels`."""
        return tuple(label.word for label in self.labels)

    @property
    def values(self) -> np.ndarray:
        """float64 [labels]: the value of each label in a ranking."""
        return np.array([label.value for label in self.labels])

    def boundaries(self, dataset: Dataset) -> tuple[int, int]:
        """The start of the validation period and of the test period, in microseconds since 1970.

        Raises:
          ConfigError: a setting is neither a date nor a share, or validation does not begin before test.
        """
        starts = {}
        for name in ("validation", "test"):
            try:
                starts[name] = _parse_time(getattr(self.split, name), dataset.event_time)
            except ValueError as error:
                raise self.error(str(error), "split", name) from None
        validation, test = starts["validation"], starts["test"]
        if validation >= test:
            message = f"validation ({self.split.validation}) must begin before test ({self.split.test})"
            hint = f"; both are {np.datetime64(test, 'us')}" if validation == test else ""
            raise self.error(message + hint, "split")
        return validation, test

    def check(self, card: Card, event_columns: list[str]) -> None:
        """Checks that the dataset has the task's actions and event columns.

        Raises:
          ConfigError: names file, line and key.
        """
        for key in ("history", "questions"):
            for index, action in enumerate(getattr(self, key).actions):
                if action not in card.events.actions:
                    hint = suggest(action, card.events.actions, listing="it has")
                    raise self.error(f"the dataset has no action '{action}'; {hint}", key, "actions", index)
        known = list(dict.fromkeys(["action", *event_columns]))
        for index, label in enumerate(self.labels):
            for column in label.match or {}:
                if column not in known:
                    hint = suggest(column, known, listing="they have")
                    raise self.error(f"events have no column '{column}'; {hint}", "labels", index, "match", column)

    def check_values(self, dataset: Dataset) -> None:
        """Checks that the values of `match` are of their columns' types, and that some event matches each label.

        Raises:
          ConfigError: names file, line and key.
        """
        events = np.flatnonzero(np.isin(dataset.event_action, self.questions.actions))
        for index, label in enumerate(self.labels):
            for column in label.match or {}:
                try:
                    for value in label.match_values(column):
                        _check_type(value, dataset.event_column(column).type)
                except ValueError as error:
                    raise self.error(f"{error}", "labels", index, "match", column) from None
            if label.match is not None and not label.matches(dataset, events).any():
                matches = " and ".join(_describe_match(dataset, label, column, events) for column in label.match)
                raise self.error(f"no event in question is {matches}", "labels", index, "match")

    def check_words(self, tokenizer: Tokenizer) -> None:
        """Checks that every label word is one token.

        Raises:
          ConfigError: names file and line.
        """
        for index, word in enumerate(self.words):
            try:
                tokenizer.label_token_id(word)
            except ValueError as error:
                raise self.error(str(error), "labels", index, "word") from None


def load_tasks(paths: Iterable[str | Path], dataset: Dataset) -> list[Task]:
    """Reads task files and checks each against the dataset.

    Raises:
      ConfigError: a task is wrong, or two have the same name; names file and line.
    """
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


def _describe_match(dataset: Dataset, label: Label, column: str, events: np.ndarray) -> str:
    """The label's values of a column, and a few values that the column has in `events`."""
    values = dataset.event_column(column).take(events).unique().drop_null()
    shown = ", ".join(show(value) for value in values[:SHOWN]) + (", .." if len(values) > SHOWN else "")
    return f"{column}: {label.match[column]!r} (there is: {shown or 'nothing'})"  # type: ignore[index]


def _check_type(value: Any, type_: pa.DataType) -> None:
    """ValueError, with what would be right, if a column of this type cannot hold the value."""
    if pa.types.is_nested(type_):
        raise ValueError(f"this column holds {type_}; a label matches columns of single values")
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
    """Converts a value of a task file to the type of its column; ValueError if that is impossible.

    Categories are text in a server's request, even if they are numbers in the task, so a text column takes numbers.
    """
    if pa.types.is_string(type_):
        return str(value)
    if pa.types.is_integer(type_) and isinstance(value, float):
        if not value.is_integer():
            raise ValueError(f"this column holds whole numbers, found {value!r}")
        return int(value)
    if pa.types.is_date(type_) or pa.types.is_timestamp(type_):
        try:
            time = datetime.datetime.fromisoformat(str(value))
        except ValueError:
            raise ValueError(f"this column holds dates, found {value!r}; expected one such as 1998-03-07") from None
        if pa.types.is_date(type_):
            return time.date()
        time = time.replace(tzinfo=time.tzinfo or datetime.UTC)
        return time if type_.tz else time.astimezone(datetime.UTC).replace(tzinfo=None)
    if not (pa.types.is_integer(type_) or pa.types.is_floating(type_) or pa.types.is_boolean(type_)):
        raise ValueError(f"this column holds {type_}; a label matches texts, numbers, dates, or true and false")
    return value


def _is_number(text: str) -> bool:
    try:
        return math.isfinite(float(text))
    except ValueError:
        return False


def _parse_time(text: str, event_times: np.ndarray) -> int:
    """A date, or a share of the events ("80%"), as microseconds since 1970."""
    if text.endswith("%"):
        try:
            share = float(text[:-1]) / 100
        except ValueError:
            share = float("nan")
        if not 0 < share < 1:
            raise ValueError(f"'{text}': a share of the events is a number between 0% and 100%")
        return int(np.quantile(event_times, share))
    try:
        date = datetime.datetime.fromisoformat(text)
    except ValueError:
        share_text = f"{float(text) * (100 if float(text) < 1 else 1):g}%" if _is_number(text) else "80%"
        raise ValueError(f"'{text}': expected a date, 1998-03-07, or a share, {share_text}") from None
    return int(date.replace(tzinfo=date.tzinfo or datetime.UTC).timestamp() * 1_000_000)
