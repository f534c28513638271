"""A ranking task, declared in a YAML file of a few lines: a question about a member and an item, and its answers."""

from __future__ import annotations

import datetime
import re
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal, Self

import numpy as np
import pydantic

from brewjax.config import Config, Count, Days, Words, misplaced, refuse_twice, suggest
from brewjax.data.tables.card import CARD, Card
from brewjax.data.tables.dataset import Dataset
from brewjax.data.tasks.conditions import (
    check_column,
    check_condition,
    describe,
    event_values,
    is_number,
    known_columns,
    matches,
)

if TYPE_CHECKING:
    from brewjax.data.text.tokenizer import Tokenizer

MetricName = Literal["gauc", "ndcg@10", "auc", "log_loss", "calibration_error"]
Split = Literal["train", "validation", "test"]
MAX_VALUE = 1000  # of a label: NDCG's 2^1024 would overflow


class HistoryConfig(Config):
    """Which past events the history of a prompt holds."""

    actions: tuple[str, ...]
    """Events of these actions are in the history."""
    max_events: int = pydantic.Field(default=100, ge=0, lt=1 << 31)
    """Only the newest events are, at most so many."""
    max_age_days: Days | None = None
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
    """Columns of events (or `action`, `item.COLUMN`, `member.COLUMN`), each with the value, list of values or range
    (`{min: 4}`, `max`, `above`, `below`) for which this is the answer; all must match. One label may leave it out: that
    of `sampled_negatives`, or, with `outcomes`, the answer where nothing else followed."""


class NegativesConfig(Config):
    """Sampled negatives: items without any event of the member, drawn at random as candidates."""

    ALIASES: ClassVar = {"power": "popularity", "category": "same", "sharing": "same"}

    label: str
    """The label word that is the answer for sampled items."""
    per_event: int = pydantic.Field(gt=0, le=10_000)
    """How many items are sampled for each event."""
    popularity: float = pydantic.Field(default=0, ge=0, le=1)
    """Items are drawn in proportion to their number of events until then, to this power: 0 draws all evenly."""
    same: str | None = None
    """Only items that share a value of this category or list with the item of the event are drawn."""

    @pydantic.model_validator(mode="after")
    def _one_way(self) -> Self:
        if self.popularity and self.same:
            raise misplaced("give 'popularity' or 'same', not both", "same")
        return self


OverlongPolicy = Literal["truncate", "skip", "error"]


class QuestionConfig(Config):
    """Which events are asked about, in which words, and how many candidates share one history."""

    ALIASES: ClassVar = {
        "ask": "question",
        "text": "question",
        "choose": "choice_question",
        "per_prompt": "candidates_per_prompt",
        "negatives": "sampled_negatives",
        "outcome": "outcomes",
        "window": "window_days",
        "within_days": "window_days",
        "eligibility": "where",
        "conditions": "where",
        "group": "per_request",
    }

    question: Words
    """The question about one candidate, for instance "Will the member apply to the following job"."""
    choice_question: str = ""
    """The multiple-choice form, "To which of the following jobs will the member apply", answered by an item's name;
    needed where training draws choices (`choice_fraction`)."""
    actions: tuple[str, ...] = pydantic.Field(min_length=1)
    """Events of these actions are asked about: exposures, such as an impression or a view."""
    outcomes: tuple[str, ...] = ()
    """Events of these actions answer an earlier event about the same item, for instance the application after a view. A
    question whose window is not over by the end of its split is not asked."""
    window_days: Days = 1
    """What a member does with an item within so many days of the first event in question is one question, and its
    answer is the label with the highest value among all of it."""
    where: dict[str, Any] = {}
    """Conditions on columns of events (or `action`, `item.COLUMN`, `member.COLUMN`) for an event to be asked about, as
    in a label's `match`. Those on items and members say who is asked about what when serving, too."""
    context: tuple[str, ...] = ()
    """Attributes of events that are known when the question is asked, such as a query or a slot: they stand in it."""
    per_request: bool = False
    """Whether the candidates of a prompt are those of one request (`events.request` of the card)."""
    repeats: bool | None = None
    """Whether an item that the member had an event with before may be asked about again. By default events may, unless
    there are sampled negatives, which never are repeats; and rankings hold only items new to the member."""
    span_days: Days = 1
    """The events in question of one prompt lie within so many days of its moment; facts are as of its moment."""
    candidates_per_prompt: Count = 16
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
        refuse_twice(self.outcomes, "action", "outcomes")
        refuse_twice(self.context, "attribute", "context")
        return self

    @property
    def asks_repeats(self) -> bool:
        """Whether events with an item that the member had before are asked about."""
        return self.sampled_negatives is None if self.repeats is None else self.repeats


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


class Phrasing(Config):
    """A task in other words."""

    instruction: Words
    """The instruction at the start of a prompt."""
    question: Words
    """The question about one candidate."""
    choice_question: str = ""
    """The multiple-choice form; by default that of the task."""


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
    phrasings: tuple[Phrasing, ...] = ()
    """The task in other words. Training draws one of them, or the task's own words, for each prompt, so that the model
    learns to read instructions and not to recognise one; evaluation and serving use the task's own."""
    split: TimeSplit = TimeSplit(validation="80%", test="90%")
    """The times at which validation and test begin."""
    metrics: tuple[MetricName, ...] = pydantic.Field(
        ("gauc", "ndcg@10", "auc", "log_loss", "calibration_error"), min_length=1
    )
    """The metrics of an evaluation; the first is the headline of reports. `gauc` (the AUC within a list) and `ndcg@10`
    are of lists: a request, or all that a member was asked about."""

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
        unmatched = [index for index, label in enumerate(self.labels) if label.match is None]
        for index in unmatched[0 if not self.questions.outcomes else 1 :]:
            word = self.labels[index].word
            if not (negatives and negatives.label == word):
                message = (
                    f"no event is ever '{word}': give it 'match', or make it the label of questions.sampled_negatives"
                )
                raise misplaced(message, "labels", index)
        return self

    @property
    def words(self) -> tuple[str, ...]:
        """The label words, each one token, in the order of `labels`."""
        return tuple(label.word for label in self.labels)

    @property
    def default_label(self) -> int:
        """Index of the label of a question that nothing else followed; -1 if there is none."""
        if not self.questions.outcomes:
            return -1
        return next((index for index, label in enumerate(self.labels) if label.match is None), -1)

    @property
    def values(self) -> np.ndarray:
        """float64 [labels]: the value of each label in a ranking."""
        return np.array([label.value for label in self.labels])

    def side_of(self, card: Card) -> Card:
        """The card that the task is asked of: of a union, from the side of the dataset whose items are asked about.

        Args:
          card: of the dataset.

        Returns:
          One of the card's `origins`.
        """
        return card.side_of(self.questions.actions[0])

    def draw_phrasing(self, rng: np.random.Generator) -> Task:
        """Draws the words that a training record asks in, so that a model does not learn one wording by heart.

        Args:
          rng: decides.

        Returns:
          The task in its own words or, as likely each, in those of one of its `phrasings`.
        """
        index = int(rng.integers(1 + len(self.phrasings))) if self.phrasings else 0
        if not index:
            return self
        phrasing = self.phrasings[index - 1]
        update = {"question": phrasing.question}
        if phrasing.choice_question:
            update["choice_question"] = phrasing.choice_question
        questions = self.questions.model_copy(update=update)
        return self.model_copy(update={"instruction": phrasing.instruction, "questions": questions})

    def boundaries(self, dataset: Dataset) -> tuple[int, int]:
        """Computes where the periods of the temporal split begin.

        Args:
          dataset: in which a share of the events is a time.

        Returns:
          The start of the validation period and of the test period, in microseconds since 1970.

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

    def check(self, dataset: Dataset) -> None:
        """Checks that the dataset has the task's actions and columns, that values are of their columns' types, and that
        some event matches each label.

        Args:
          dataset: that the task is asked of.

        Raises:
          ConfigError: names file, line and key.
        """
        card, questions = dataset.card, self.questions
        for key, name, actions in (
            ("history", "actions", self.history.actions),
            ("questions", "actions", questions.actions),
            ("questions", "outcomes", questions.outcomes),
        ):
            for index, action in enumerate(actions):
                if action not in card.events.actions:
                    hint = suggest(action, card.events.actions, listing="it has")
                    raise self.error(f"the dataset has no action '{action}'; {hint}", key, name, index)
        for name, actions in (("actions", questions.actions), ("outcomes", questions.outcomes)):
            for index, action in enumerate(actions):
                if action not in self.side_of(card).events.actions:
                    message = f"'{action}' is of another dataset than '{questions.actions[0]}'; ask about items of one"
                    raise self.error(message, "questions", name, index)
        card = self.side_of(card)
        if questions.outcomes and card.events.time is None:
            raise self.error("events without times have no window for an outcome", "questions", "outcomes")
        if questions.per_request and card.events.request is None:
            message = f"{dataset.path / CARD} names no 'events.request', the column with the id of each list"
            raise self.error(message, "questions", "per_request")
        attributes = [attribute.column for attribute in card.events.attributes]
        for index, column in enumerate(questions.context):
            if column not in attributes:
                hint = suggest(column, attributes, listing="they have")
                raise self.error(f"events have no attribute '{column}'; {hint}", "questions", "context", index)
        negatives = questions.sampled_negatives
        if negatives and negatives.same:
            kinds = {a.column: a.kind for a in card.items.attributes if a.kind in ("category", "list")}
            if negatives.same not in kinds:
                hint = suggest(negatives.same, kinds, listing="there are")
                message = f"items have no category or list '{negatives.same}'; {hint}"
                raise self.error(message, "questions", "sampled_negatives", "same")
        self._check_conditions(dataset)

    def _check_conditions(self, dataset: Dataset) -> None:
        events = np.flatnonzero(dataset.has_action((*self.questions.actions, *self.questions.outcomes)))
        known = known_columns(dataset)
        sources: list[tuple[tuple[str | int, ...], dict[str, Any]]] = [(("questions", "where"), self.questions.where)]
        sources += [(("labels", index, "match"), label.match or {}) for index, label in enumerate(self.labels)]
        for location, conditions in sources:
            for column, condition in conditions.items():
                try:
                    check_column(column, known)
                    check_condition(condition, event_values(dataset, column, events[:0]).type)
                except ValueError as error:
                    raise self.error(f"{error}", *location, column) from None
            is_excerpt = dataset.summary is not None  # which need not have such an event
            if conditions and not is_excerpt and not matches(dataset, conditions, events).any():
                shown = " and ".join(describe(dataset, column, value, events) for column, value in conditions.items())
                raise self.error(f"no event in question is {shown}", *location)

    def check_words(self, tokenizer: Tokenizer) -> None:
        """Checks that every label word is one token.

        Args:
          tokenizer: of the model that is asked.

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

    Args:
      paths: of the YAML files.
      dataset: that the tasks ask about; of an excerpt, the periods of the split are not checked.

    Returns:
      The tasks, in the order of `paths`.

    Raises:
      ConfigError: a task is wrong, or two have the same name; names file and line.
    """
    tasks = [Task.load(path) for path in paths]
    for task in tasks:
        if dataset.summary is None:
            task.boundaries(dataset)
        task.check(dataset)
    names = [task.name for task in tasks]
    for task in tasks:
        if names.count(task.name) > 1:
            raise task.error(f"two tasks are named '{task.name}'", "name")
    return tasks


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
        share_text = f"{float(text) * (100 if float(text) < 1 else 1):g}%" if is_number(text) else "80%"
        raise ValueError(f"'{text}': expected a date, 1998-03-07, or a share, {share_text}") from None
    return int(date.replace(tzinfo=date.tzinfo or datetime.UTC).timestamp() * 1_000_000)
