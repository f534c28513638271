"""From a member, their past and the items asked about to a `Prompt`, in one of several styles."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pyarrow as pa

from brewjax.data.dataset import Attribute, Dataset
from brewjax.data.examples import Example
from brewjax.data.numbers import ItemStatistic, Percentiles, age
from brewjax.data.prompt import Prompt, Question
from brewjax.data.task import Task
from brewjax.data.tokenizer import Tokenizer


@dataclasses.dataclass(frozen=True)
class Style:
    """How things are said. Templates are filled with `str.format`.

    Attributes:
      center: filled with instruction, profile, member, item.
      fact: one attribute, filled with name and value; facts are joined by `join`.
      group: said before the events of one action, filled with member, past, items; "" tells events in order of
        time instead, each with its action.
      event, question: filled with facts (and ask, for a question).
      heading: what a question begins with.
      percentile: filled with a number from 1 to 100.
      short: ages as "2d", not "2 days".
      chat: the parts are put into the tokenizer's own chat template.
    """

    center: str
    fact: str
    join: str
    group: str
    event: str
    heading: str
    question: str
    percentile: str = "percentile {}"
    short: bool = False
    chat: bool = False


SECTIONED = Style(
    center="## Instruction\n{instruction}\n## {member} Profile\n{profile}\n## Past {item} interaction data\n",
    fact="{name}: {value}",
    join=", ",
    group="{member} {past} the following {items}:\n",
    event="[{facts}]\n",
    heading="## Question",
    question="\n{ask}: [{facts}]\n## Answer\n",
)
STYLES = {
    "sectioned": SECTIONED,
    "chat": dataclasses.replace(
        SECTIONED,
        center="{profile}\n{member} history:\n",
        group="",
        event="- {facts}\n",
        heading="Question",
        question=": {ask}? {facts}",
        chat=True,
    ),
    "compact": Style(
        center="{instruction}\n{profile}\n",
        fact="{value}",
        join="|",
        group="",
        event="{facts}\n",
        heading="?",
        question=" {facts}\n",
        percentile="{}",
        short=True,
    ),
    "key-value": Style(
        center="task={instruction}\nmember: {profile}\n",
        fact="{name}={value}",
        join="; ",
        group="",
        event="event: {facts}\n",
        heading="question",
        question=": {ask}; {facts}; answer=",
        percentile="p{}",
        short=True,
    ),
}


class Verbalizer:
    """Says examples of one dataset as prompts, within a budget of tokens.

    Args:
      percentiles: fitted on training data.
      max_tokens: the oldest events are dropped until center, events and the longest question fit.
    """

    def __init__(self, dataset: Dataset, percentiles: Percentiles, tokenizer: Tokenizer, max_tokens: int):
        self._dataset, self._percentiles, self._tokenizer, self._max_tokens = (
            dataset,
            percentiles,
            tokenizer,
            max_tokens,
        )
        self._items = _Facts("items", dataset.items, dataset.card.items.attributes, percentiles, tokenizer)
        self._members = _Facts("members", dataset.members, dataset.card.members.attributes, percentiles, tokenizer)
        self._events = _Facts("events", dataset.events, dataset.card.events.attributes, percentiles, tokenizer)
        for attribute in dataset.card.items.attributes:
            if attribute.derive:
                self._items.statistics[attribute.column] = ItemStatistic(dataset, attribute.derive)

    def prompt(self, task: Task, example: Example, style_name: str) -> Prompt:
        """Says an example. Raises ValueError where the profile and a question alone exceed the budget."""
        style, card, cut = STYLES[style_name], self._dataset.card, example.cut
        member, plural = card.members.noun.capitalize(), card.items.plural
        before, system, after = self._chat_parts() if style.chat else ("", "", "")
        instruction = task.instruction + (f"\nNote: {task.note}" if task.note else "")
        center = style.center.format(
            instruction=instruction,
            profile=style.join.join(self._members.say(np.array([example.member]), cut, style)[0]),
            member=member,
            item=card.items.noun,
        )
        if style.chat:
            center = before + instruction + system + center
        questions = tuple(
            Question(
                style.question.format(ask=task.questions.ask, facts=style.join.join(facts)) + after,
                int(label) if label >= 0 else None,
                style.heading,
            )
            for facts, label in zip(self._items.say(example.items, cut, style, "question"), example.labels, strict=True)
        )
        groups = {
            name: style.group.format(member=f"The {card.members.noun}", past=action.past, items=plural)
            for name, action in card.events.actions.items()
            if name in task.history.actions
        }
        texts = self._history(example, style, say_action=not style.group and len(groups) > 1)
        fixed = [center, *groups.values()]
        dropped = self._excess(fixed, texts, [question.heading + question.text for question in questions], task.name)
        texts, rows = texts[dropped:], example.history[dropped:]
        if style.group:
            texts = _grouped(texts, self._dataset.event_action[rows], groups)
        return Prompt(center, tuple(texts), questions, task.words, dropped)

    def _history(self, example: Example, style: Style, say_action: bool) -> list[str]:
        """The text of each event: its age, the action, and what is said of the event and of its item."""
        rows, cut = example.history, example.cut
        of_events = self._events.say(rows, cut, style)
        of_items = self._items.say(self._dataset.event_item[rows], cut, style, "history")
        texts = []
        for row, of_event, of_item in zip(rows, of_events, of_items, strict=True):
            facts = [style.fact.format(name="Age", value=_age_fact(cut - int(self._dataset.event_time[row]), style))]
            if say_action:
                action = self._dataset.card.events.actions[self._dataset.event_action[row]].past
                facts.append(style.fact.format(name="Action", value=action))
            texts.append(style.event.format(facts=style.join.join(facts + of_event + of_item)))
        return texts

    def _excess(self, fixed: list[str], events: list[str], questions: list[str], task: str) -> int:
        """How many of the oldest events must go."""
        lengths = self._tokenizer.lengths(fixed + events + questions)
        needed = 1 + sum(lengths[: len(fixed)]) + max(lengths[len(fixed) + len(events) :])
        if needed > self._max_tokens:
            raise ValueError(
                f"task '{task}': the instruction, the profile and one question take {needed} tokens, "
                f"over the budget of {self._max_tokens}; raise max_tokens or shorten an attribute by max_words"
            )
        newest_first = np.cumsum(lengths[len(fixed) : len(fixed) + len(events)][::-1])
        return len(events) - int(np.searchsorted(newest_first, self._max_tokens - needed, side="right"))

    def _chat_parts(self) -> tuple[str, str, str]:
        """The chat template's text before the instruction, between it and the user's turn, and after the question."""
        marks = ("\x01", "\x02")
        turns = [{"role": "system", "content": marks[0]}, {"role": "user", "content": marks[1]}]
        text = self._tokenizer.chat(turns)
        before, rest = text.split(marks[0])
        system, after = rest.split(marks[1])
        return before, system, after


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

    def say(self, rows: np.ndarray, moment: int, style: Style, where: str = "question") -> list[list[str]]:
        """The facts of each row as of `moment`; unknown values are left out, or empty where places stand for names."""
        attributes = [attribute for attribute in self._attributes if where in attribute.where]
        named = "{name}" in style.fact
        said: list[list[str]] = [[] for _ in rows]
        for attribute in attributes:
            for facts, value in zip(said, self._values(attribute, rows, moment), strict=True):
                unknown = value is None or value == [] or (isinstance(value, float) and math.isnan(value))
                text = "" if unknown else self._value(attribute, value, moment, style)
                if text or not named:
                    facts.append(style.fact.format(name=attribute.name, value=text))
        return said

    def _values(self, attribute: Attribute, rows: np.ndarray, moment: int) -> list[Any]:
        if attribute.derive:
            return self.statistics[attribute.column].at(rows, np.full(len(rows), moment)).tolist()
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
