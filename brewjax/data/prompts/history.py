"""`HistoryRenderer`: the texts of a member's past events, as many as a budget of tokens allows."""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

import numpy as np

from brewjax.data.prompts.attributes import RowRenderer, RowsAsOf, render_ages
from brewjax.data.prompts.styles import Style
from brewjax.data.tables.dataset import Dataset
from brewjax.data.tables.statistics import Table
from brewjax.data.tasks.examples import RankingExample
from brewjax.data.tasks.questions import Questions, find_questions
from brewjax.data.tasks.task import Task
from brewjax.data.text.chat import Chat
from brewjax.data.text.tokenizer import Tokenizer


class RenderedHistory(NamedTuple):
    """A history as texts; see `Prompt` for its fields."""

    events: tuple[str, ...]
    num_truncated: int
    answer_offsets: tuple[int, ...]


class HistoryRenderer:
    """Renders histories of one dataset.

    Args:
      dataset: the tables.
      tokenizer: counts the tokens of events.
      rows: renders the rows of "events" and "items".
    """

    def __init__(self, dataset: Dataset, tokenizer: Tokenizer, rows: Mapping[Table, RowRenderer]):
        self._dataset, self._tokenizer, self._rows = dataset, tokenizer, rows
        self._known_questions: dict[str, Questions] = {}  # of each task, by name

    def render(self, task: Task, example: RankingExample, style: Style, chat: Chat, room: int) -> RenderedHistory:
        """Renders the newest events of a history that fit.

        Args:
          task: whose words the events are in.
          example: with the history.
          style: a style of prompts.
          chat: the parts of the chat template, for events that are turns.
          room: tokens for all events.

        Returns:
          The texts of the events, oldest first, or grouped by action.
        """
        events, offsets = self._events(task, example, style, chat)
        num_truncated = self._num_events_over_budget(room, events, offsets)
        events, rows = events[num_truncated:], example.history[num_truncated:]
        if style.group:
            actions = [self._dataset.action_name(row) for row in rows]
            events = _group_events(events, actions, self.headings(task, style))
        answer_offsets = tuple(offsets[num_truncated:]) if style.turns else ()
        return RenderedHistory(tuple(events), num_truncated, answer_offsets)

    def headings(self, task: Task, style: Style) -> dict[str, str]:
        """The words before the events of each action, in styles that group events by action.

        Args:
          task: says which actions its history has.
          style: in whose words.

        Returns:
          The words by action; empty texts in other styles.
        """
        card = self._dataset.card
        return {
            name: style.group.format(
                member=f"The {card.members.noun}", past=action.past, items=card.side_of(name).items.plural
            )
            for name, action in card.events.actions.items()
            if name in task.history.actions
        }

    def _actions(self, task: Task, style: Style) -> dict[str, str]:
        """By action of the history, what each event states of it; nothing where there is one action, or where events
        are grouped by it."""
        card, names = self._dataset.card, task.history.actions
        if len(names) == 1 or style.group:
            return {}
        if style.buckets_only:
            places = {name: place for place, name in enumerate(card.events.actions, 1)}
            return {name: style.bucket.format(name="action", bucket=places[name]) for name in names}
        several = len({card.origin_of(name) for name in names}) > 1  # datasets: it is stated what was acted on
        words = {
            name: card.events.actions[name].past + (f" the {card.side_of(name).items.noun}" if several else "")
            for name in names
        }
        return {name: style.fact.format(name="Action", value=value) for name, value in words.items()}

    def _events(self, task: Task, example: RankingExample, style: Style, chat: Chat) -> tuple[list[str], list[int]]:
        """The text of each event: its age, its action and the facts of the event and of its item; and the character at
        which the answer begins, 0 if it is no turn with an answer."""
        rows, cutoff_time = example.history if style.history else example.history[:0], example.cutoff_time
        times = self._dataset.event_time[rows]
        cutoff_times = np.full(len(rows), cutoff_time)
        event_facts = self._rows["events"].render(RowsAsOf(rows, cutoff_times), style, "question")
        # A turn asks as of the event's own time: a statistic that includes the event would give its answer away.
        items = RowsAsOf(self._dataset.event_item[rows], times if style.turns else cutoff_times)
        item_facts = self._rows["items"].render(items, style, "history")
        labels = np.full(len(rows), -1)
        if style.turns and not task.questions.sampled_negatives:
            labels = self._answers(task, rows, cutoff_time)
        actions = self._actions(task, style)
        has_age = self._dataset.card.events.time is not None and not style.buckets_only
        ages = render_ages(cutoff_time - times, style)
        texts, offsets = [], []
        for row, age, row_facts, row_item_facts, label in zip(
            rows, ages, event_facts, item_facts, labels.tolist(), strict=True
        ):
            facts = []
            if has_age:
                facts.append(style.fact.format(name="Age", value=age))
            if actions:
                facts.append(actions[self._dataset.action_name(row)])
            question = answer = ""
            if label >= 0:
                text = style.question_text(task.name, task.questions.question, style.join.join(row_item_facts))
                question = style.heading + text + chat.assistant
                answer = chat.answer + task.words[label] + chat.user_again
                facts += row_facts
            else:
                facts += row_facts + row_item_facts
            texts.append(question + answer + style.event.format(facts=style.join.join(facts)))
            offsets.append(len(question))
        return texts, offsets

    def _answers(self, task: Task, events: np.ndarray, time: int) -> np.ndarray:
        """The answers to past events that were known at a time, int64 [events]; -1 where there was none."""
        if task.name not in self._known_questions:
            self._known_questions[task.name] = find_questions(self._dataset, task)
        questions = self._known_questions[task.name]
        if not len(questions.events):
            return np.full(len(events), -1)
        position = np.minimum(np.searchsorted(questions.events, events), len(questions.events) - 1)
        known = (questions.events[position] == events) & (questions.known[position] < time)
        return np.where(known, questions.labels[position], -1)

    def _num_events_over_budget(self, room: int, events: list[str], offsets: list[int]) -> int:
        """How many of the oldest events must be left out for the others to take at most `room` tokens."""
        heads = [event[:offset] for event, offset in zip(events, offsets, strict=True) if offset]
        tails = [event[offset:] for event, offset in zip(events, offsets, strict=True)]
        event_tokens = np.array(self._tokenizer.lengths(tails), np.int64)
        event_tokens[np.array(offsets, bool)] += np.array(self._tokenizer.lengths(heads), np.int64)
        newest_first = np.cumsum(event_tokens[::-1])
        return len(events) - int(np.searchsorted(newest_first, room, side="right"))


def _group_events(texts: list[str], actions: list[str], groups: dict[str, str]) -> list[str]:
    """The events of each action together, with the group's words before its first event."""
    grouped = []
    for action, words in groups.items():
        members = [text for text, event_action in zip(texts, actions, strict=True) if event_action == action]
        if members:
            grouped += [words + members[0], *members[1:]]
    return grouped
