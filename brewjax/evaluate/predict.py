"""A model's predictions on tasks: examples are rendered, encoded and scored, and tabulated as the baselines' are."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import pyarrow as pa

from brewjax.bundle.bundle import Bundle
from brewjax.console import plain_console, track
from brewjax.data.tables.dataset import Dataset
from brewjax.data.tasks.examples import RankingExample
from brewjax.data.tasks.task import Task
from brewjax.data.text.encode import EncodedPrompt
from brewjax.evaluate.predictions import from_examples
from brewjax.scoring.scorer import Scorer


class ScoringCost(NamedTuple):
    """What scoring took.

    Attributes:
      questions: how many were scored.
      tokens: of all prompts, prefixes and questions.
      seconds: on this machine, with packing and without compilation.
    """

    questions: int
    tokens: int
    seconds: float


class TaskExamples(NamedTuple):
    """Examples of a task, all of whose labels are known, to be scored.

    Attributes:
      dataset: where their rows are.
      task: what is asked.
      examples: see `RankingExample`.
      surface: of the model, as which the dataset is read; "" finds it, see `Bundle.verbalizer`.
      name: of the task, to be printed; its own by default.
    """

    dataset: Dataset
    task: Task
    examples: Sequence[RankingExample]
    surface: str = ""
    name: str = ""


EncodedTask = tuple[list[RankingExample], list[EncodedPrompt]]  # the examples that remain, and their prompts


class Predictions(NamedTuple):
    """The predictions of one task (a table as `from_examples` makes it), and what they took."""

    table: pa.Table
    work: ScoringCost


def predict(bundle: Bundle, tasks: Sequence[TaskExamples]) -> list[Predictions]:
    """Scores every candidate of each task's examples, in order, except those that the task skips as overlong.

    Prints what was truncated or skipped, and the speed.

    Args:
      bundle: the model.
      tasks: with their examples; the prompts of all share compiled shapes.

    Returns:
      The predictions of each task.

    Raises:
      ConfigError: every question of a task was skipped.
    """
    return score_tasks(bundle, tasks, encode_tasks(bundle, tasks))


def encode_tasks(bundle: Bundle, tasks: Sequence[TaskExamples]) -> list[EncodedTask]:
    """`encode_examples` of each task."""
    return [encode_examples(bundle, each.dataset, each.task, each.examples, each.surface) for each in tasks]


def score_tasks(bundle: Bundle, tasks: Sequence[TaskExamples], encoded: Sequence[EncodedTask]) -> list[Predictions]:
    """Scores the prompts of tasks as `encode_tasks` made them; prints the speed."""
    scorer = bundle.scorer([prompt for _, prompts in encoded for prompt in prompts])
    scorer.warm_up()
    return [
        score_task(scorer, each.name or each.task.name, examples, prompts)
        for each, (examples, prompts) in zip(tasks, encoded, strict=True)
    ]


def encode_examples(
    bundle: Bundle,
    dataset: Dataset,
    task: Task,
    examples: Sequence[RankingExample],
    surface: str = "",
    scales_of: Dataset | None = None,
) -> EncodedTask:
    """Renders and tokenizes examples as the model reads them, in its style and budget.

    Args:
      bundle: the model.
      dataset: the tables.
      task: what is asked of them.
      examples: with candidates.
      surface: see `TaskExamples`.
      scales_of: see `Bundle.verbalizer`.

    Returns:
      The examples that remain, without questions that the task skips as overlong, and their prompts.

    Raises:
      ConfigError: every question was skipped.
    """
    style, verbalizer = bundle.prompts.score_style, bundle.verbalizer(dataset, task, surface, scales_of)
    with_facts = verbalizer.with_facts(track(examples, f"{task.name}: render"))
    fitting = [*verbalizer.all_fitting(task, with_facts, style)]
    prompts = [bundle.encode(verbalizer.prompt(task, example, style)) for example in fitting]
    verbalizer.print_overlong()
    if not prompts:
        raise task.error("every question is too long and was skipped; raise max_tokens", "questions", "overlong")
    return fitting, prompts


def score_task(
    scorer: Scorer, name: str, examples: Sequence[RankingExample], prompts: Sequence[EncodedPrompt]
) -> Predictions:
    """Scores encoded prompts, all of `examples`, and prints the speed beside the task's name."""
    start_time = time.perf_counter()
    probabilities = scorer.score_encoded(prompts)
    seconds = time.perf_counter() - start_time
    questions = sum(len(prompt.questions) for prompt in prompts)
    tokens = sum(len(prompt) for prompt in prompts)
    speed = f"{seconds:.1f} s, {tokens / seconds:,.0f} tokens/s"
    plain_console().print(f"{name}: {questions:,} questions scored in {tokens:,} tokens, {speed}")
    return Predictions(from_examples(examples, np.concatenate(probabilities)), ScoringCost(questions, tokens, seconds))
