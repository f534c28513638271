"""Cases: a member, what is asked, the candidates, and the order that is expected of some of them.

A line of a file each, to be shown on the page and to be checked against any model.
"""

from __future__ import annotations

import datetime
import functools
import itertools
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pydantic
from rich.table import Table

from brewjax.config import Config, ConfigError
from brewjax.console import plain_console
from brewjax.data.tables.dataset import Dataset
from brewjax.data.tasks.examples import RankingExample, unanswered
from brewjax.data.tasks.task import Task
from brewjax.explore.context import Context
from brewjax.explore.explorer import Explorer
from brewjax.suite.questions import frozen_questions
from brewjax.suite.suite import Suite

TYPED = "typed"  # stands for the id of a typed member
MAX_PRESETS = 500  # of a task of a suite, which a reader can choose from


class Case(Config):
    """A ranking that can be done again. What is empty or null is as the task has it."""

    member: str | None = None
    """The member's id."""
    typed_events: tuple[str, ...] | None = None
    """In place of `member`: what a member who is not in the tables did, an event a line, the oldest first, such as
    "rated: Alien (1979) | stars=5"."""
    task: str
    """The task's name."""
    at: str | None = None
    """A moment such as 2025-03-07T12:30; null for just after the last event."""
    items: tuple[str, ...] = pydantic.Field(min_length=1)
    """Ids of the candidates."""
    instruction: str | None = None
    """In place of the task's."""
    note: str | None = None
    """The steering note."""
    style: str | None = None
    """Of the prompt."""
    history: tuple[int, ...] | None = None
    """Rows of the events in their order; null for all that the task's history holds."""
    left_out: tuple[int, ...] = ()
    """Rows of the events that are switched off."""
    profile: dict[str, str] = {}
    """Attributes of the member that were changed, by column."""
    expected: tuple[str, ...] = ()
    """Ids of candidates in the order in which they should come. Others may be before, between and after them."""
    comment: str = ""
    """What the case is about, for people."""

    @pydantic.model_validator(mode="after")
    def _fits(self) -> Case:
        if (self.member is None) == (self.typed_events is None):
            raise ValueError("give either 'member' or 'typed_events'")
        for item in self.expected:
            if item not in self.items:
                raise ValueError(f"expected '{item}', which is not among the items")
        return self

    def context(self, explorer: Explorer) -> Context:
        """The case as a context of a model. Raises ValueError for what the tables do not have."""
        context = explorer.context(
            self.member,
            typed_events=self.typed_events,
            task=self.task,
            at=self.at,
            items=self.items,
            instruction=self.instruction,
            note=self.note,
            style=self.style,
        )
        return context.change(history=self.history, left_out=self.left_out, profile=self.profile)


class CaseResult(NamedTuple):
    """How a model ranks a case.

    Attributes:
      ranks: of the expected items among the candidates, from 1, in the expected order.
      wrong: pairs of ids, the first of which should come before the second and does not.
    """

    ranks: tuple[int, ...]
    wrong: tuple[tuple[str, str], ...]


class Preset(NamedTuple):
    """What the page has to choose from: a case, or a question of a suite.

    Attributes:
      title: for people to choose by.
      context: makes it a context of a model.
      expected: ids in the order in which they should come.
      answers: the label word that was right, by the item's id, where it is known.
    """

    title: str
    context: Callable[[Explorer], Context]
    expected: tuple[str, ...] = ()
    answers: Mapping[str, str] = {}


def load_cases(path: str | Path) -> list[Case]:
    """Reads a file of cases, one JSON object a line; empty lines are skipped.

    Args:
      path: of the file.

    Returns:
      The cases.

    Raises:
      ConfigError: the file cannot be read, or a line is no case; names the line.
    """
    try:
        lines = Path(path).read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: {error}") from None
    cases = [Case.parse(line, f"{path}: case {number}") for number, line in enumerate(lines, 1) if line.strip()]
    if not cases:
        raise ConfigError(f"{path}: there is no case in it; `save case` of the page of `brewjax explore` makes one")
    return cases


def make_case(context: Context, expected: Sequence[str] = (), comment: str = "") -> Case:
    """The case that does a ranking again.

    Args:
      context: what is ranked.
      expected: ids of candidates in the order in which they should come.
      comment: what the case is about.

    Raises:
      ValueError: an expected item is not a candidate.
    """
    for item in expected:
        context.find(item)
    dataset, example = context.dataset, context.example
    timed = dataset.card.events.time is not None
    since_1970 = datetime.timedelta(microseconds=int(example.cutoff_time) if timed else 0)
    at = datetime.datetime.fromtimestamp(0, datetime.UTC) + since_1970 if timed else None
    whole = unanswered(dataset, context.task, example.member, example.cutoff_time, example.candidates).history
    return Case(
        member=context.member if context.typed_events is None else None,
        typed_events=context.typed_events,
        task=context.task.name,
        at=at.isoformat() if at else None,
        items=tuple(context.item_ids),
        instruction=context.task.instruction,
        note=context.task.steering_note,
        style=context.style,
        history=None if np.array_equal(whole, example.history) else tuple(example.history.tolist()),
        left_out=tuple(sorted(context.left_out)),
        profile=dict(context.edited_profile),
        expected=tuple(expected),
        comment=comment,
    )


def check_order(context: Context, expected: Sequence[str]) -> CaseResult:
    """Compares a ranking with an expected order.

    Args:
      context: what is ranked.
      expected: ids of candidates in the order in which they should come.
    """
    ids = context.item_ids
    ranks = {ids[index]: rank for rank, index in enumerate(context.order, 1)}
    pairs = itertools.combinations(expected, 2)
    return CaseResult(
        tuple(ranks[item] for item in expected),
        tuple((first, second) for first, second in pairs if ranks[first] > ranks[second]),
    )


def case_presets(cases: Sequence[Case]) -> list[Preset]:
    """The cases of a file, to choose from."""
    return [
        Preset(f"{number}. {case.comment or f'{case.member or TYPED}, {case.task}'}", case.context, case.expected)
        for number, case in enumerate(cases, 1)
    ]


def suite_presets(suite: Suite, dataset: Dataset) -> list[Preset]:
    """The frozen quick questions of a suite about a dataset, to choose from: at most MAX_PRESETS of a task.

    Args:
      suite: whose surface with this dataset's folder is taken.
      dataset: the tables.

    Raises:
      ConfigError: no surface of the suite has this folder, or its questions were frozen from other tables.
    """
    folder = Path(dataset.path).resolve()
    names = [name for name, surface in suite.surfaces.items() if Path(surface.dataset).resolve() == folder]
    if not names:
        folders = ", ".join(surface.dataset for surface in suite.surfaces.values())
        raise suite.error(f"no surface has the dataset {dataset.path}; there are {folders}", "surfaces")
    presets = []
    for surface_task in suite.tasks_of(names[0]):
        task, questions = surface_task.task, frozen_questions(suite, "quick", dataset, surface_task)
        for number, example in enumerate(questions.examples[:MAX_PRESETS], 1):
            ids = [dataset.item_id(row) for row in example.candidates]
            answers = dict(zip(ids, [task.words[label] for label in example.labels], strict=True))
            title = f"{surface_task.name} {number}: {dataset.member_id(example.member)}"
            presets.append(Preset(title, functools.partial(_context_of, example, task), answers=answers))
    return presets


def _context_of(example: RankingExample, task: Task, explorer: Explorer) -> Context:
    return explorer.context_of(example, task)


def print_cases(explorer: Explorer, cases: Sequence[Case]) -> bool:
    """Checks cases and prints a line for each; returns whether all are ranked as expected."""
    table = Table("case", "ranks of the expected items", "pairs in order", "first pair that is not", box=None)
    right = True
    for preset, case in zip(case_presets(cases), cases, strict=True):
        result = check_order(case.context(explorer), case.expected)
        pairs = len(case.expected) * (len(case.expected) - 1) // 2
        worst = " before ".join(result.wrong[0]) if result.wrong else ""
        ranks = " ".join(map(str, result.ranks))
        table.add_row(preset.title, ranks, f"{pairs - len(result.wrong)} of {pairs}", worst)
        right = right and not result.wrong
    plain_console().print(table)
    return right
