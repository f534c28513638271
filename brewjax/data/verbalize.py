"""From a member, their past and the items asked about to a `Prompt`, in one of several styles."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import cached_property
from typing import Any, Literal

import numpy as np
import pyarrow as pa

from brewjax.data.chat import AS_IT_COMES, Chat, ChatTemplate, chat_parts
from brewjax.data.dataset import Attribute, Dataset
from brewjax.data.examples import Choice, Example, answers_to
from brewjax.data.numbers import ItemStatistic, Percentiles, age
from brewjax.data.prompt import Prompt, Question
from brewjax.data.styles import STYLES, Style
from brewjax.data.task import Task
from brewjax.data.tokenizer import Tokenizer

Table = Literal["members", "items", "events"]
Where = Literal["history", "question"]
CHOICES = " / "  # between the names of the items to choose from


class Verbalizer:
    """Says examples of one dataset as prompts, within a budget of tokens.

    Args:
      percentiles: fitted on training data.
      max_tokens: the oldest events are dropped until center, events and the longest question fit.
      template: of the styles that use the tokenizer's chat template.
    """

    def __init__(
        self,
        dataset: Dataset,
        percentiles: Percentiles,
        tokenizer: Tokenizer,
        max_tokens: int,
        template: ChatTemplate = AS_IT_COMES,
    ):
        self.dataset, self.tokenizer, self._max_tokens, self._template = dataset, tokenizer, max_tokens, template
        self._facts = {
            table: _Facts(
                table, getattr(dataset, table), getattr(dataset.card, table).attributes, percentiles, tokenizer
            )
            for table in ("members", "items", "events")
        }
        for attribute in dataset.card.items.attributes:
            if attribute.derive:
                self._facts["items"].statistics[attribute.column] = ItemStatistic(dataset, attribute.derive)

    @cached_property
    def _chat(self) -> Chat:
        return chat_parts(self.tokenizer, self._template)

    def _chat_of(self, words: Sequence[str]) -> Chat:
        """Where an answer and the space before it are not one token, the space is a token of the question."""
        chat = self._chat
        if chat.answer and max(self.tokenizer.lengths([chat.answer + word for word in words])) > 1:
            return chat._replace(assistant=chat.assistant + chat.answer, answer="")
        return chat

    def names(self, items: np.ndarray) -> list[str]:
        """What people call each item (rows)."""
        return [self.tokenizer.clean(self.dataset.item_name(row)) for row in items]

    def facts(
        self, table: Table, rows: np.ndarray, moment: int | np.ndarray, style: Style, where: Where = "question"
    ) -> list[list[str]]:
        """What is said of each row as of `moment`, one for all or one each (microseconds)."""
        return self._facts[table].say(rows, moment, style, where)

    def item_values(self, attribute: Attribute, items: np.ndarray, moment: int) -> list[Any]:
        """What `attribute` is of each item as of `moment`; None or NaN where it is not known."""
        return self._facts["items"].values(attribute, items, np.full(len(items), moment))

    def prompt(
        self, task: Task, example: Example, style_name: str, note: str = "", choices: Sequence[Choice] = ()
    ) -> Prompt:
        """Says an example. Raises ValueError where the profile and a question alone exceed the budget.

        Args:
          note: a developer's wish, said in place of the task's own.
          choices: asked, each to be answered by an item's name, in place of the example's items.
        """
        style, card, cut = STYLES[style_name], self.dataset.card, example.cut
        member, plural = card.members.noun.capitalize(), card.items.plural
        chat = self._chat_of(task.words) if style.chat else Chat()
        note = note or task.note
        instruction = task.instruction + (f"\nNote: {note}" if note else "")
        center = style.center.format(
            instruction=instruction,
            profile=style.join.join(self.facts("members", np.array([example.member]), cut, style)[0]),
            member=member,
            item=card.items.noun,
        )
        if style.turns:
            center = chat.begin + instruction + "\n" + center.rstrip("\n") + chat.user
        elif style.chat:
            center = chat.begin + instruction + chat.user + center
        if choices:
            questions = self._choices(task, choices, style, chat)
        else:
            questions = self._questions(task, example, style, chat)
        groups = {
            name: style.group.format(member=f"The {card.members.noun}", past=action.past, items=plural)
            for name, action in card.events.actions.items()
            if name in task.history.actions
        }
        texts, turns = self._history(task, example, style, chat, say_action=not style.group and len(groups) > 1)
        dropped = self._excess([center, *groups.values()], texts, turns, questions, task.name)
        texts, rows = texts[dropped:], example.history[dropped:]
        if style.group:
            texts = _grouped(texts, self.dataset.event_action[rows], groups)
        words = tuple(chat.answer + word for word in task.words)
        return Prompt(center, tuple(texts), questions, words, dropped, tuple(turns[dropped:]) if style.turns else ())

    def _questions(self, task: Task, example: Example, style: Style, chat: Chat) -> tuple[Question, ...]:
        return tuple(
            Question(
                style.question.format(ask=task.questions.ask, facts=style.join.join(facts)) + chat.assistant,
                int(label) if label >= 0 else None,
                style.heading,
            )
            for facts, label in zip(self.facts("items", example.items, example.cut, style), example.labels, strict=True)
        )

    def _choices(self, task: Task, choices: Sequence[Choice], style: Style, chat: Chat) -> tuple[Question, ...]:
        questions = []
        for choice in choices:
            names = self.names(choice.items)
            text = style.question.format(ask=task.questions.choose, facts=CHOICES.join(names)) + chat.assistant
            questions.append(Question(text, None, style.heading, chat.answer + names[choice.right]))
        return tuple(questions)

    def _history(
        self, task: Task, example: Example, style: Style, chat: Chat, say_action: bool
    ) -> tuple[list[str], list[int]]:
        """The text of each event: its age, the action, and what is said of the event and of its item; and where in it
        the answer begins, 0 where it is no turn."""
        rows, cut = example.history, example.cut
        times = self.dataset.event_time[rows]
        of_events = self.facts("events", rows, cut, style)
        # A turn asks as of its own moment: a statistic that its event is part of would tell its answer.
        of_items = self.facts("items", self.dataset.event_item[rows], times if style.turns else cut, style, "history")
        answers = np.full(len(rows), -1)
        if style.turns and not task.questions.sampled_negatives:
            answers = answers_to(self.dataset, task, rows)
        texts, turns = [], []
        for row, time, of_event, of_item, answer in zip(rows, times, of_events, of_items, answers, strict=True):
            facts = [style.fact.format(name="Age", value=_age_fact(cut - int(time), style))]
            if say_action:
                action = self.dataset.card.events.actions[self.dataset.event_action[row]].past
                facts.append(style.fact.format(name="Action", value=action))
            question = ""
            if answer >= 0:
                asked = style.question.format(ask=task.questions.ask, facts=style.join.join(of_item))
                question = style.heading + asked + chat.assistant
                facts += of_event
            else:
                facts += of_event + of_item
            answered = chat.answer + task.words[answer] + chat.user_again if question else ""
            texts.append(question + answered + style.event.format(facts=style.join.join(facts)))
            turns.append(len(question))
        return texts, turns

    def _excess(
        self, fixed: list[str], events: list[str], turns: list[int], questions: Sequence[Question], task: str
    ) -> int:
        """How many of the oldest events must go."""
        lengths = lambda texts: np.array(self.tokenizer.lengths(list(texts)), np.int64)  # noqa: E731
        asked = lengths(question.heading + question.text for question in questions)
        [center] = self.tokenizer.encode(fixed[:1], begins=True)
        needed = (
            1 + len(center) + sum(lengths(fixed[1:])) + max(asked + lengths(question.answer for question in questions))
        )
        if needed > self._max_tokens:
            raise ValueError(
                f"task '{task}': the instruction, the profile and one question take {needed} tokens, "
                f"over the budget of {self._max_tokens}; raise max_tokens or shorten an attribute by max_words"
            )
        told = lengths(event[:turn] for event, turn in zip(events, turns, strict=True))
        told += lengths(event[turn:] for event, turn in zip(events, turns, strict=True))
        newest_first = np.cumsum(told[::-1])
        return len(events) - int(np.searchsorted(newest_first, self._max_tokens - needed, side="right"))


class _Facts:
    """Says the attributes of one table's rows."""

    def __init__(
        self,
        name: str,
        table: pa.Table,
        attributes: Sequence[Attribute],
        percentiles: Percentiles,
        tokenizer: Tokenizer,
    ):
        self._name, self._attributes, self._percentiles = name, attributes, percentiles
        self._columns = {a.column: _values(table[a.column], a.kind) for a in attributes if not a.derive}
        self._clean: Callable[[str], str] = tokenizer.clean
        self.statistics: dict[str, ItemStatistic] = {}

    def say(self, rows: np.ndarray, moment: int | np.ndarray, style: Style, where: Where) -> list[list[str]]:
        """The facts of each row as of `moment`; unknown values are left out, or empty where places stand for names."""
        moments = np.broadcast_to(moment, len(rows))
        attributes = [attribute for attribute in self._attributes if where in attribute.where]
        named = "{name}" in style.fact
        said: list[list[str]] = [[] for _ in rows]
        for attribute in attributes:
            values = self.values(attribute, rows, moments)
            for facts, value, of in zip(said, values, moments.tolist(), strict=True):
                text = "" if is_unknown(value) else self._value(attribute, value, of, style)
                if text or not named:
                    facts.append(style.fact.format(name=attribute.name, value=text))
        return said

    def values(self, attribute: Attribute, rows: np.ndarray, moments: np.ndarray) -> list[Any]:
        if attribute.derive:
            return self.statistics[attribute.column].at(rows, moments).tolist()
        column = self._columns[attribute.column]
        return [column[row] for row in rows]

    def _value(self, attribute: Attribute, value: Any, moment: int, style: Style) -> str:
        if attribute.kind == "number":
            if attribute.percentile:
                return style.percentile.format(self._percentiles.of(self._name, attribute.column, value))
            number = f"{value:.4g}" if isinstance(value, float) and abs(value) < 1_000 else f"{value:.0f}"
            return f"{number} {attribute.unit}".strip() if not style.short else number
        if attribute.kind == "date":
            since = moment - value
            if since < 0:
                return f"in {_age_fact(-since, style)}"
            return _age_fact(since, style) + ("" if style.short else " ago")
        if attribute.kind == "list":
            return ("," if style.short else ", ").join(self._clean(str(entry)) for entry in value)
        text = self._clean(str(value))
        return " ".join(text.split(" ")[: attribute.max_words]) if attribute.max_words else text


def is_unknown(value: Any) -> bool:
    """Whether a value of an attribute is none: null, an empty list, or not a number."""
    return value is None or value == [] or (isinstance(value, float) and math.isnan(value))


def _values(column: pa.ChunkedArray, kind: str) -> list[Any]:
    """The values of a column; dates as microseconds since 1970."""
    return (column.cast(pa.timestamp("us")).cast(pa.int64()) if kind == "date" else column).to_pylist()


def _age_fact(microseconds: int, style: Style) -> str:
    count, unit = age(microseconds)
    if style.short:
        return f"{count}{'mo' if unit == 'month' else unit[0]}"
    return f"{count} {unit}{'' if count == 1 else 's'}"


def _grouped(texts: list[str], actions: np.ndarray, groups: dict[str, str]) -> list[str]:
    """The events of each action together, the group's words before its first event."""
    grouped = []
    for action, words in groups.items():
        members = [text for text, own in zip(texts, actions, strict=True) if own == action]
        if members:
            grouped += [words + members[0], *members[1:]]
    return grouped
