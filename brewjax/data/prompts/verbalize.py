"""From a member, their past and the items asked about to a `Prompt`, in one of several styles."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import cached_property
from typing import Any, Literal

import numpy as np
import pyarrow as pa

from brewjax.console import plain_console
from brewjax.data.prompts.numbers import age, format_number
from brewjax.data.prompts.overlong import Overlong, OverlongLog, cut_to_fit
from brewjax.data.prompts.styles import STYLES, Style
from brewjax.data.tables.card import Attribute
from brewjax.data.tables.dataset import Dataset
from brewjax.data.tables.statistics import ItemStatistic, Percentiles
from brewjax.data.tasks.examples import Choice, RankingExample, event_labels
from brewjax.data.tasks.task import Task
from brewjax.data.text.chat import AS_IT_COMES, Chat, ChatTemplate, chat_parts
from brewjax.data.text.prompt import Prompt, Question
from brewjax.data.text.tokenizer import Tokenizer

Table = Literal["members", "items", "events"]
Where = Literal["history", "question"]
TEXTUAL = ("text", "category", "list")  # kinds of attributes that can be cut
CHOICES = " / "  # between the names of the items to choose from


class Verbalizer:
    """Says examples of one dataset as prompts, within a budget of tokens.

    Args:
      percentiles: fitted on training data.
      max_tokens: the oldest events are dropped until preamble, events and the longest question fit.
      template: of the styles that use the tokenizer's chat template.

    Attributes:
      overlong: the items and members of which more was to be said than fits.
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
        self.overlong = OverlongLog()
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
        return self._facts[table].render(rows, moment, style, where)

    def item_values(self, attribute: Attribute, items: np.ndarray, moment: int) -> list[Any]:
        """What `attribute` is of each item as of `moment`; None or NaN where it is not known."""
        return self._facts["items"].values(attribute, items, np.full(len(items), moment))

    def prompt(
        self, task: Task, example: RankingExample, style_name: str, note: str = "", choices: Sequence[Choice] = ()
    ) -> Prompt:
        """Says an example. What does not fit is cut as `task.questions.overlong` says; choices that do not, left out.

        Raises ValueError, naming the item or member and the column, where that is not to be cut, or cannot be.

        Args:
          note: a developer's wish, said in place of the task's own.
          choices: asked, each to be answered by an item's name, in place of the example's items.
        """
        style = STYLES[style_name]
        chat = self._chat_of(task.words) if style.chat else Chat()
        if choices:
            questions = self._choices(task, choices, style, chat)
        else:
            questions = self._questions(task, example, style, chat)
        groups = self._groups(task, style)
        cut: list[str] = []
        render_preamble = lambda longest=None: self._preamble(task, example, style, chat, note, longest)  # noqa: E731
        preamble, budget = render_preamble(), self._max_tokens - 1 - sum(self.tokenizer.lengths([*groups.values()]))
        preamble_tokens, needed = self._count(preamble), self._tokens_of(questions)
        if max(needed, default=0) > budget - preamble_tokens:
            bare = self._tokens_of(self._questions(task, example, style, chat, 0))
            room = self._room_for_questions(task, budget, render_preamble, max(bare))
            if choices:
                questions = tuple(question for question, size in zip(questions, needed, strict=True) if size <= room)
            else:
                questions = self._cut_questions(task, example, style, chat, questions, needed, room, cut)
            needed = self._tokens_of(questions)
            room = budget - max(needed, default=0)
            if preamble_tokens > room:
                overlong = self._overlong("members", example.member, preamble, room, example.cutoff_time, style)
                fitting = (
                    None if task.questions.overlong == "error" else self._cut(task, render_preamble, overlong, cut)
                )
                if fitting is None:
                    raise self._too_long(task, overlong)
                preamble, preamble_tokens = fitting, self._count(fitting)
        texts, turns = self._history(task, example, style, chat, say_action=not style.group and len(groups) > 1)
        dropped = self._num_events_over_budget(budget - preamble_tokens - max(needed, default=0), texts, turns)
        texts, rows = texts[dropped:], example.history[dropped:]
        if style.group:
            texts = _grouped(texts, self.dataset.event_action[rows], groups)
        answers = tuple(turns[dropped:]) if style.turns else ()
        words = tuple(chat.answer + word for word in task.words)
        return Prompt(preamble, tuple(texts), questions, words, dropped, answers, tuple(cut))

    def _room_for_questions(
        self, task: Task, budget: int, render_preamble: Callable[[int | None], str], bare_question: int
    ) -> int:
        """Tokens for a question: what the profile leaves, or half of the budget where both are long. ValueError where
        the words of the task alone are too many."""
        bare_preamble = self._count(render_preamble(0))
        if bare_preamble + bare_question > budget:
            raise ValueError(
                f"task '{task.name}': its instruction and a question take {bare_preamble + bare_question} tokens without "
                f"any text of the tables, over the budget of {self._max_tokens}; raise max_tokens, or shorten them"
            )
        half = min(max(budget // 2, bare_question), budget - bare_preamble)
        return max(budget - self._count(render_preamble(None)), half)

    def fitting(self, task: Task, example: RankingExample, style_name: str) -> RankingExample:
        """The example without the questions that are to be skipped because they do not fit beside the profile."""
        if task.questions.overlong != "skip":
            return example
        style = STYLES[style_name]
        chat = self._chat_of(task.words) if style.chat else Chat()
        questions = self._questions(task, example, style, chat)
        budget = self._max_tokens - 1 - sum(self.tokenizer.lengths([*self._groups(task, style).values()]))
        render_preamble = lambda longest: self._preamble(task, example, style, chat, "", longest)  # noqa: E731
        bare = self._tokens_of(self._questions(task, example, style, chat, 0))
        room = self._room_for_questions(task, budget, render_preamble, max(bare))
        fits = np.array(self._tokens_of(questions)) <= room
        for row, question in zip(example.candidates[~fits], np.array(questions, object)[~fits], strict=True):
            text = question.heading + question.text
            self.overlong.add(
                task.name, "skipped", self._overlong("items", row, text, room, example.cutoff_time, style)
            )
        return example.select(fits)

    def all_fitting(self, task: Task, examples: Iterable[RankingExample], style_name: str) -> Iterator[RankingExample]:
        """The examples without what is to be skipped (see `fitting`), those left without questions left out."""
        for example in examples:
            fitting = self.fitting(task, example, style_name)
            if len(fitting.candidates):
                yield fitting

    def print_overlong(self) -> None:
        """Says what was cut or skipped since the last time."""
        for line in self.overlong.lines():
            plain_console(stderr=True).print(line, soft_wrap=True)

    def _groups(self, task: Task, style: Style) -> dict[str, str]:
        """What is said before the events of each action that the task tells."""
        card = self.dataset.card
        return {
            name: style.group.format(member=f"The {card.members.noun}", past=action.past, items=card.items.plural)
            for name, action in card.events.actions.items()
            if name in task.history.actions
        }

    def _preamble(
        self, task: Task, example: RankingExample, style: Style, chat: Chat, note: str, longest: int | None
    ) -> str:
        note = note or task.steering_note
        instruction = task.instruction + (f"\nNote: {note}" if note else "")
        profile = self._facts["members"].render(
            np.array([example.member]), example.cutoff_time, style, "question", longest
        )[0]
        card = self.dataset.card
        preamble = style.preamble.format(
            instruction=instruction,
            profile=style.join.join(profile),
            member=card.members.noun.capitalize(),
            item=card.items.noun,
        )
        if style.turns:
            return chat.begin + instruction + "\n" + preamble.rstrip("\n") + chat.user
        return chat.begin + instruction + chat.user + preamble if style.chat else preamble

    def _questions(
        self, task: Task, example: RankingExample, style: Style, chat: Chat, longest: int | None = None
    ) -> tuple[Question, ...]:
        facts = self._facts["items"].render(example.candidates, example.cutoff_time, style, "question", longest)
        return tuple(
            Question(
                style.question.format(ask=task.questions.question, facts=style.join.join(of_item)) + chat.assistant,
                int(label) if label >= 0 else None,
                style.heading,
            )
            for of_item, label in zip(facts, example.labels, strict=True)
        )

    def _cut_questions(
        self,
        task: Task,
        example: RankingExample,
        style: Style,
        chat: Chat,
        questions: Sequence[Question],
        needed: Sequence[int],
        room: int,
        cut: list[str],
    ) -> tuple[Question, ...]:
        """Each question that needs more than `room` tokens with its item's texts cut; notes them in `cut`."""
        fitting = list(questions)
        for place in np.flatnonzero(np.array(needed) > room).tolist():
            single = example.select(slice(place, place + 1))
            whole = questions[place].heading + questions[place].text
            overlong = self._overlong("items", int(single.candidates[0]), whole, room, example.cutoff_time, style)
            say = lambda longest, single=single: (  # noqa: E731
                style.heading + self._questions(task, single, style, chat, longest)[0].text
            )
            text = self._cut(task, say, overlong, cut) if task.questions.overlong == "cut" else None
            if text is None:
                raise self._too_long(task, overlong)
            fitting[place] = dataclasses.replace(questions[place], text=text.removeprefix(style.heading))
        return tuple(fitting)

    def _cut(self, task: Task, say: Callable[[int | None], str], overlong: Overlong, cut: list[str]) -> str | None:
        text = cut_to_fit(say, self._count, overlong.room)
        if text is not None:
            cut.append(str(overlong))
            self.overlong.add(task.name, "cut", overlong)
        return text

    def _overlong(self, table: Table, row: int, text: str, room: int, moment: int, style: Style) -> Overlong:
        if table == "items":
            noun = f"{self.dataset.card.items.noun} {self.dataset.item_id(row)}"
        else:
            noun = f"the instruction with {self.dataset.card.members.noun} {self.dataset.member_id(row)}"
        return Overlong(row, noun, self._facts[table].longest(row, moment, style), self._count(text), room)

    def _too_long(self, task: Task, overlong: Overlong) -> ValueError:
        cut = "" if task.questions.overlong == "cut" else ", or say 'overlong: cut' under 'questions' of the task"
        return ValueError(
            f"task '{task.name}': {overlong} beside the rest of a prompt of {self._max_tokens:,}; raise max_tokens, or "
            f"shorten the attribute by max_words{cut}"
        )

    def _count(self, text: str) -> int:
        """Tokens of a text that a prompt begins with."""
        return len(self.tokenizer.encode([text], begins=True)[0])

    def _tokens_of(self, questions: Sequence[Question]) -> list[int]:
        """Tokens of each question and its own answer."""
        asked = self.tokenizer.lengths([question.heading + question.text for question in questions])
        answers = self.tokenizer.lengths([question.answer for question in questions])
        return [question + answer for question, answer in zip(asked, answers, strict=True)]

    def _choices(self, task: Task, choices: Sequence[Choice], style: Style, chat: Chat) -> tuple[Question, ...]:
        questions = []
        for choice in choices:
            names = self.names(choice.items)
            text = style.question.format(ask=task.questions.choice_question, facts=CHOICES.join(names)) + chat.assistant
            questions.append(Question(text, None, style.heading, chat.answer + names[choice.correct]))
        return tuple(questions)

    def _history(
        self, task: Task, example: RankingExample, style: Style, chat: Chat, say_action: bool
    ) -> tuple[list[str], list[int]]:
        """The text of each event: its age, the action, and what is said of the event and of its item; and where in it
        the answer begins, 0 where it is no turn."""
        rows, cut = example.history, example.cutoff_time
        times = self.dataset.event_time[rows]
        of_events = self.facts("events", rows, cut, style)
        # A turn asks as of its own moment: a statistic that its event is part of would tell its answer.
        of_items = self.facts("items", self.dataset.event_item[rows], times if style.turns else cut, style, "history")
        answers = np.full(len(rows), -1)
        if style.turns and not task.questions.sampled_negatives:
            answers = event_labels(self.dataset, task, rows)
        texts, turns = [], []
        for row, time, of_event, of_item, answer in zip(rows, times, of_events, of_items, answers, strict=True):
            facts = [style.fact.format(name="Age", value=_age_fact(cut - int(time), style))]
            if say_action:
                action = self.dataset.card.events.actions[self.dataset.event_action[row]].past
                facts.append(style.fact.format(name="Action", value=action))
            question = ""
            if answer >= 0:
                asked = style.question.format(ask=task.questions.question, facts=style.join.join(of_item))
                question = style.heading + asked + chat.assistant
                facts += of_event
            else:
                facts += of_event + of_item
            answered = chat.answer + task.words[answer] + chat.user_again if question else ""
            texts.append(question + answered + style.event.format(facts=style.join.join(facts)))
            turns.append(len(question))
        return texts, turns

    def _num_events_over_budget(self, room: int, events: list[str], turns: list[int]) -> int:
        """How many of the oldest events must go for the others to take at most `room` tokens."""
        lengths = lambda texts: np.array(self.tokenizer.lengths(list(texts)), np.int64)  # noqa: E731
        told = lengths(event[:turn] for event, turn in zip(events, turns, strict=True))
        told += lengths(event[turn:] for event, turn in zip(events, turns, strict=True))
        newest_first = np.cumsum(told[::-1])
        return len(events) - int(np.searchsorted(newest_first, room, side="right"))


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

    def render(
        self,
        rows: np.ndarray,
        moment: int | np.ndarray,
        style: Style,
        where: Where,
        longest: int | None = None,
    ) -> list[list[str]]:
        """The facts of each row as of `moment`, texts cut to `longest` characters; unknown values are left out, or
        empty where places stand for names."""
        moments = np.broadcast_to(moment, len(rows))
        attributes = [attribute for attribute in self._attributes if where in attribute.where]
        named = "{name}" in style.fact
        said: list[list[str]] = [[] for _ in rows]
        for attribute in attributes:
            values = self.values(attribute, rows, moments)
            for facts, value, of in zip(said, values, moments.tolist(), strict=True):
                text = "" if is_unknown(value) else self._value(attribute, value, of, style)
                if attribute.kind in TEXTUAL:
                    text = text[:longest].rstrip()
                if text or not named:
                    facts.append(style.fact.format(name=attribute.name, value=text))
        return said

    def longest(self, row: int, moment: int, style: Style) -> str:
        """The column of which most is said of a row."""
        attributes = [attribute for attribute in self._attributes if "question" in attribute.where]
        sizes = {}
        for attribute in attributes:
            (value,) = self.values(attribute, np.array([row]), np.array([moment]))
            sizes[attribute.column] = 0 if is_unknown(value) else len(self._value(attribute, value, moment, style))
        return max(sizes, key=sizes.__getitem__, default="instruction")

    def values(self, attribute: Attribute, rows: np.ndarray, moments: np.ndarray) -> list[Any]:
        if attribute.derive:
            return self.statistics[attribute.column].at(rows, moments).tolist()
        column = self._columns[attribute.column]
        return [column[row] for row in rows]

    def _value(self, attribute: Attribute, value: Any, moment: int, style: Style) -> str:
        if attribute.kind == "number":
            if attribute.percentile:
                return style.percentile.format(self._percentiles.of(self._name, attribute.column, value))
            number = format_number(value)
            return f"{number} {attribute.unit}".strip() if not style.short else number
        if attribute.kind == "date":
            since = moment - value
            if since < 0:
                return f"in {_age_fact(-since, style)}"
            return _age_fact(since, style) + ("" if style.short else " ago")
        if attribute.kind == "list":
            return ("," if style.short else ", ").join(text for entry in value if (text := self._clean(str(entry))))
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
