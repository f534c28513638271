"""`Verbalizer`: renders ranking examples as prompts, in one of several styles, within a budget of tokens."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from functools import cached_property
from typing import Any

import numpy as np
import pyarrow as pa

from brewjax.data.prompts.attributes import RowRenderer, RowsAsOf, Where
from brewjax.data.prompts.history import HistoryRenderer
from brewjax.data.prompts.overlong import Overlong, OverlongLog, truncate_to_fit
from brewjax.data.prompts.styles import STYLES, Style
from brewjax.data.tables.card import Attribute
from brewjax.data.tables.dataset import Dataset
from brewjax.data.tables.scales import Scales
from brewjax.data.tables.statistics import FactSource, FactValues, Table
from brewjax.data.tasks.examples import Choice, RankingExample
from brewjax.data.tasks.task import Task
from brewjax.data.text.chat import AS_IT_COMES, Chat, ChatTemplate, chat_parts
from brewjax.data.text.prompt import Prompt, Question
from brewjax.data.text.tokenizer import Tokenizer

EXAMPLES_AT_A_TIME = 256  # whose facts are computed together
CHOICES = " / "  # between the names of the items of a multiple-choice question


class Verbalizer:
    """Renders the examples of one dataset as prompts.

    Usage:
      >>> scales = Scales.fit(dataset, until=task.boundaries(dataset)[0])
      >>> verbalizer = Verbalizer(dataset, scales, tokenizer, max_tokens=1024)
      >>> example = next(build_examples(dataset, task, "test"))
      >>> print(verbalizer.prompt(task, example, "sectioned").render())  # doctest: +ELLIPSIS
      ## Instruction
      ...

    Args:
      dataset: the tables.
      scales: fitted to training data.
      tokenizer: counts the tokens of the budget, and has the chat template.
      max_tokens: budget for preamble, history and the longest question; the oldest events are left out to fit.
      template: variables of the chat template, for the styles that use it.
      facts: where facts come from; by default they are computed from the dataset's events.
      temperatures: of prompts, by the name of their task; 1 by default.
      kinds: the kinds of numbers that are stated in styles that name them by kind, see `stated_kinds`; by default all.

    Attributes:
      overlong: counts the items and members whose texts did not fit.
    """

    def __init__(
        self,
        dataset: Dataset,
        scales: Scales,
        tokenizer: Tokenizer,
        max_tokens: int,
        template: ChatTemplate = AS_IT_COMES,
        facts: FactSource | None = None,
        temperatures: Mapping[str, float] | None = None,
        kinds: Collection[str] | None = None,
    ):
        self.dataset, self.tokenizer, self._max_tokens, self._template = dataset, tokenizer, max_tokens, template
        self._temperatures = temperatures or {}
        self.overlong = OverlongLog()
        self._scales, self._facts = scales, facts or FactValues.of(dataset)
        tables: tuple[Table, ...] = ("members", "items", "events")
        clean, self._kinds = tokenizer.clean, kinds
        self._rows = {table: RowRenderer(dataset, table, scales, self._facts, clean, kinds) for table in tables}
        self._history = HistoryRenderer(dataset, tokenizer, self._rows)

    def with_members(self, members: pa.Table) -> Verbalizer:
        """Makes the verbalizer of other members, such as an edited profile.

        Args:
          members: the members table, with other attributes in it.

        Returns:
          The verbalizer; facts stay those of the members as they were.
        """
        dataset = dataclasses.replace(self.dataset, members=members)
        settings = (self._max_tokens, self._template, self._facts, self._temperatures, self._kinds)
        return Verbalizer(dataset, self._scales, self.tokenizer, *settings)

    @cached_property
    def _chat(self) -> Chat:
        return chat_parts(self.tokenizer, self._template)

    def _chat_for(self, words: Sequence[str]) -> Chat:
        """The parts of the chat template. If the space before an answer and a label word are not one token, the space
        becomes a token of the question."""
        chat = self._chat
        if chat.answer and max(self.tokenizer.lengths([chat.answer + word for word in words])) > 1:
            return chat._replace(assistant=chat.assistant + chat.answer, answer="")
        return chat

    def names(self, items: np.ndarray) -> list[str]:
        """Names items for people to read.

        Args:
          items: int [items], rows.

        Returns:
          A name for each, on one line.
        """
        return [self.tokenizer.clean(self.dataset.item_name(row)) for row in items]

    def facts(
        self,
        table: Table,
        rows: np.ndarray,
        time: int | np.ndarray,
        style: Style,
        where: Where = "question",
        members: np.ndarray | None = None,
    ) -> list[list[str]]:
        """Renders the attributes and facts of rows of a table.

        Args:
          table: "members", "items" or "events".
          rows: int [rows].
          time: microseconds since 1970 as of which ages and facts are computed, one for all rows or one each.
          style: in whose words.
          where: whether the texts stand in the history or in a question.
          members: int [rows], the member of each row, for facts of pairs; without, these facts are left out.

        Returns:
          The texts of each row.
        """
        return self._rows[table].render(RowsAsOf(rows, np.broadcast_to(time, len(rows)), members), style, where)

    def with_facts(self, examples: Iterable[RankingExample]) -> Iterator[RankingExample]:
        """Computes the facts of many examples at once, which is several times as fast as one prompt at a time.

        Args:
          examples: to be rendered by this verbalizer.

        Yields:
          Each example, with the numbers of its facts.
        """
        examples = iter(examples)
        while batch := list(itertools.islice(examples, EXAMPLES_AT_A_TIME)):
            counts = np.array([len(example.candidates) for example in batch])
            members = np.array([example.member for example in batch])
            times = np.array([example.cutoff_time for example in batch])
            of_members = self._rows["members"].all_facts(RowsAsOf(members, times))
            candidates = np.concatenate([example.candidates for example in batch])
            rows = RowsAsOf(candidates, np.repeat(times, counts), np.repeat(members, counts))
            of_candidates = self._rows["items"].all_facts(rows)
            for index, (example, end) in enumerate(zip(batch, np.cumsum(counts).tolist(), strict=True)):
                of_example = slice(end - len(example.candidates), end)
                yield dataclasses.replace(
                    example,
                    member_facts={key: numbers[index : index + 1] for key, numbers in of_members.items()},
                    candidate_facts={key: numbers[of_example] for key, numbers in of_candidates.items()},
                )

    def question_values(self, items: np.ndarray, time: int) -> list[tuple[Attribute, list[Any]]]:
        """Computes every attribute and fact of items that questions state; facts of pairs are not among them.

        Args:
          items: int [items], rows; in a union, all of one dataset.
          time: as of which facts are computed, in microseconds since 1970.

        Returns:
          Each attribute with its values [items], None or NaN where a value is unknown.
        """
        if not len(items):
            return []
        renderer, rows = self._rows["items"], RowsAsOf(items, np.full(len(items), time))
        attributes, facts = renderer.stated_of(int(items[0]))
        values = [(a, renderer.values(a, items)) for a in attributes if "question" in a.where]
        of_items = [stated for stated in facts if stated.group == "items"]
        return values + [(stated.attribute, renderer.fact_values(stated, rows).tolist()) for stated in of_items]

    def prompt(
        self, task: Task, example: RankingExample, style_name: str, note: str = "", choices: Sequence[Choice] = ()
    ) -> Prompt:
        """Renders an example.

        The oldest events are left out to fit the budget. If a question does not fit without any event, its texts, and
        those of the profile, are truncated, provided that `task.questions.overlong` allows it. Choices that do not fit
        are left out.

        Args:
          task: whose words the prompt is in.
          example: a member as of a time, with candidates.
          style_name: a key of STYLES.
          note: a developer's steering note, in place of the task's.
          choices: multiple-choice questions, asked in place of the example's candidates.

        Returns:
          The prompt: a question for each candidate, in their order.

        Raises:
          ValueError: a text that must not, or cannot, be truncated does not fit; names the item or member, and its
            longest column.
        """
        style = STYLES[style_name]
        chat = self._chat_for(task.words) if style.chat else Chat()
        if choices:
            questions = self._choice_questions(task, choices, style, chat)
        else:
            questions = self._questions(task, example, style, chat)
        truncated: list[str] = []
        render_preamble = lambda longest=None: self._preamble(task, example, style, chat, note, longest)  # noqa: E731
        preamble, budget = render_preamble(), self._budget(task, style)
        preamble_tokens, question_tokens = self._count(preamble), self._count_questions(questions)
        if max(question_tokens, default=0) > budget - preamble_tokens:
            bare_tokens = self._count_questions(self._questions(task, example, style, chat, 0))
            room = self._room_for_questions(task, budget, render_preamble, max(bare_tokens))
            if choices:
                questions = tuple(
                    question for question, size in zip(questions, question_tokens, strict=True) if size <= room
                )
            else:
                questions = self._truncate_questions(
                    task, example, style, chat, questions, question_tokens, room, truncated
                )
            question_tokens = self._count_questions(questions)
            room = budget - max(question_tokens, default=0)
            if preamble_tokens > room:
                preamble = self._truncate_preamble(task, example, style, preamble, render_preamble, room, truncated)
                preamble_tokens = self._count(preamble)
        room = budget - preamble_tokens - max(question_tokens, default=0)
        history = self._history.render(task, example, style, chat, room)
        words = tuple(chat.answer + word for word in task.words)
        return Prompt(
            preamble,
            history.events,
            questions,
            words,
            history.num_truncated,
            history.answer_offsets,
            tuple(truncated),
            self._temperatures.get(task.name, 1.0),
        )

    def _budget(self, task: Task, style: Style) -> int:
        """Tokens for all but BOS and the headings of a history."""
        return self._max_tokens - 1 - sum(self.tokenizer.lengths([*self._history.headings(task, style).values()]))

    def _room_for_questions(
        self, task: Task, budget: int, render_preamble: Callable[[int | None], str], bare_question: int
    ) -> int:
        """Tokens for a question: what the profile leaves, but at least half of the budget if both are long. ValueError
        if the words of the task alone exceed the budget."""
        bare_preamble = self._count(render_preamble(0))
        if bare_preamble + bare_question > budget:
            raise ValueError(
                f"task '{task.name}': its instruction and a question take {bare_preamble + bare_question} tokens "
                f"without any text of the tables, over the budget of {self._max_tokens}; raise max_tokens, or shorten "
                "them"
            )
        half = min(max(budget // 2, bare_question), budget - bare_preamble)
        return max(budget - self._count(render_preamble(None)), half)

    def fitting(self, task: Task, example: RankingExample, style_name: str) -> RankingExample:
        """Leaves out the candidates whose questions do not fit, if the task's policy is to skip them.

        Args:
          task: whose `questions.overlong` decides.
          example: with candidates.
          style_name: a key of STYLES.

        Returns:
          The example with the candidates that remain, which may be none.
        """
        if task.questions.overlong != "skip":
            return example
        style = STYLES[style_name]
        chat = self._chat_for(task.words) if style.chat else Chat()
        questions = self._questions(task, example, style, chat)
        budget = self._budget(task, style)
        render_preamble = lambda longest: self._preamble(task, example, style, chat, "", longest)  # noqa: E731
        bare_tokens = self._count_questions(self._questions(task, example, style, chat, 0))
        room = self._room_for_questions(task, budget, render_preamble, max(bare_tokens))
        fits = np.array(self._count_questions(questions)) <= room
        for row, question in zip(example.candidates[~fits], np.array(questions, object)[~fits], strict=True):
            text = question.heading + question.text
            overlong = self.describe_overlong("items", row, text, room, example.cutoff_time, style)
            self.overlong.add(task.name, "skipped", overlong)
        return example.select(fits)

    def all_fitting(self, task: Task, examples: Iterable[RankingExample], style_name: str) -> Iterator[RankingExample]:
        """Applies `fitting` to each example, and leaves out examples without any candidate left.

        Args:
          task: whose `questions.overlong` decides.
          examples: with candidates.
          style_name: a key of STYLES.

        Returns:
          An iterator of the examples that remain.
        """
        for example in examples:
            fitting = self.fitting(task, example, style_name)
            if len(fitting.candidates):
                yield fitting

    def print_overlong(self) -> None:
        """Prints, on stderr, what was truncated or skipped since the last call."""
        self.overlong.print()

    def _preamble(
        self, task: Task, example: RankingExample, style: Style, chat: Chat, note: str, longest: int | None
    ) -> str:
        note = note or task.steering_note
        instruction = task.instruction + (f"\nNote: {note}" if note else "")
        member = RowsAsOf(np.array([example.member]), np.array([example.cutoff_time]), facts=example.member_facts)
        profile = self._rows["members"].render(member, style, "question", longest)[0]
        card, names = self.dataset.card, task.history.actions
        preamble = style.preamble.format(
            instruction=instruction,
            profile=style.join.join(profile),
            member=card.members.noun.capitalize(),
            item=(card.side_of(names[0]) if len({*map(card.origin_of, names)}) == 1 else card).items.noun,
        )
        if style.turns:
            return chat.begin + instruction + "\n" + preamble.rstrip("\n") + chat.user
        return chat.begin + instruction + chat.user + preamble if style.chat else preamble

    def _questions(
        self, task: Task, example: RankingExample, style: Style, chat: Chat, longest: int | None = None
    ) -> tuple[Question, ...]:
        count = len(example.candidates)
        times, members = np.full(count, example.cutoff_time), np.full(count, example.member)
        rows = RowsAsOf(example.candidates, times, members, example.candidate_facts)
        facts = self._rows["items"].render(rows, style, "question", longest)
        if columns := task.questions.context:
            for index in np.flatnonzero(example.exposures >= 0):
                exposure = RowsAsOf(example.exposures[index : index + 1], times[:1])
                facts[index] += self._rows["events"].render(exposure, style, "question", longest, columns)[0]
        return tuple(
            Question(
                style.question_text(task.name, task.questions.question, style.join.join(item_facts)) + chat.assistant,
                int(label) if label >= 0 else None,
                style.heading,
            )
            for item_facts, label in zip(facts, example.labels, strict=True)
        )

    def _truncate_questions(
        self,
        task: Task,
        example: RankingExample,
        style: Style,
        chat: Chat,
        questions: Sequence[Question],
        question_tokens: Sequence[int],
        room: int,
        truncated: list[str],
    ) -> tuple[Question, ...]:
        """Truncates the item texts of each question of more than `room` tokens, and notes the items in `truncated`."""
        fitting = list(questions)
        for index in np.flatnonzero(np.array(question_tokens) > room).tolist():
            single = example.select(slice(index, index + 1))
            full_text = questions[index].heading + questions[index].text
            item = int(single.candidates[0])
            overlong = self.describe_overlong("items", item, full_text, room, example.cutoff_time, style)
            render = lambda longest, single=single: (  # noqa: E731
                style.heading + self._questions(task, single, style, chat, longest)[0].text
            )
            allowed = task.questions.overlong == "truncate"
            text = self._truncate(task, render, overlong, truncated) if allowed else None
            if text is None:
                raise self._overlong_error(task, overlong)
            fitting[index] = dataclasses.replace(questions[index], text=text.removeprefix(style.heading))
        return tuple(fitting)

    def _truncate_preamble(
        self,
        task: Task,
        example: RankingExample,
        style: Style,
        preamble: str,
        render_preamble: Callable[[int | None], str],
        room: int,
        truncated: list[str],
    ) -> str:
        """Truncates the profile's texts until the preamble has at most `room` tokens, and notes it in `truncated`."""
        overlong = self.describe_overlong("members", example.member, preamble, room, example.cutoff_time, style)
        allowed = task.questions.overlong != "error"
        text = self._truncate(task, render_preamble, overlong, truncated) if allowed else None
        if text is None:
            raise self._overlong_error(task, overlong)
        return text

    def _truncate(
        self, task: Task, render: Callable[[int | None], str], overlong: Overlong, truncated: list[str]
    ) -> str | None:
        text = truncate_to_fit(render, self._count, overlong.room)
        if text is not None:
            truncated.append(str(overlong))
            self.overlong.add(task.name, "truncated", overlong)
        return text

    def describe_overlong(self, table: Table, row: int, text: str, room: int, time: int, style: Style) -> Overlong:
        """Describes a text that does not fit, for a log line or an error.

        Args:
          table: "members", "items" or "events".
          row: of the table.
          text: as it was rendered.
          room: the tokens that it may have.
          time: as of which it was rendered, in microseconds since 1970.
          style: in which it was rendered.

        Returns:
          Whose text it is, its size, and its longest column.
        """
        if table == "items":
            noun = f"{self.dataset.item_card(row).items.noun} {self.dataset.item_id(row)}"
        else:
            noun = f"the instruction with {self.dataset.card.members.noun} {self.dataset.member_id(row)}"
        return Overlong(row, noun, self._rows[table].longest(row, time, style), self._count(text), room)

    def _overlong_error(self, task: Task, overlong: Overlong) -> ValueError:
        allowed = task.questions.overlong == "truncate"
        hint = "" if allowed else ", or set 'overlong: truncate' under 'questions' of the task"
        return ValueError(
            f"task '{task.name}': {overlong} next to the rest of a prompt of {self._max_tokens:,}; raise max_tokens, "
            f"or shorten the attribute by max_words{hint}"
        )

    def _count(self, text: str) -> int:
        """Tokens of a text at the beginning of a prompt."""
        return len(self.tokenizer.encode([text], begins=True)[0])

    def _count_questions(self, questions: Sequence[Question]) -> list[int]:
        """Tokens of each question with its text answer, if it has one."""
        texts = self.tokenizer.lengths([question.heading + question.text for question in questions])
        answers = self.tokenizer.lengths([question.answer for question in questions])
        return [text + answer for text, answer in zip(texts, answers, strict=True)]

    def _choice_questions(
        self, task: Task, choices: Sequence[Choice], style: Style, chat: Chat
    ) -> tuple[Question, ...]:
        questions = []
        for choice in choices:
            names = self.names(choice.items)
            text = style.question_text(task.name, task.questions.choice_question, CHOICES.join(names))
            answer = chat.answer + names[choice.correct]
            questions.append(Question(text + chat.assistant, None, style.heading, answer))
        return tuple(questions)
