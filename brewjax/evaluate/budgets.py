"""What a history is worth: a model's quality by the token budget of its prompts."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np
import pyarrow as pa

from brewjax.bundle.bundle import Bundle
from brewjax.data.tasks.task import Task
from brewjax.evaluate.predict import TaskExamples, encode_tasks, score_tasks
from brewjax.evaluate.results import OVERALL, Estimate, evaluate


class PrefixSize(NamedTuple):
    """What a task's prompts hold before their questions, on average."""

    events: float
    tokens: float


class BudgetPoint(NamedTuple):
    """A model's quality on a task with prompts of a budget.

    Attributes:
      max_tokens: the budget.
      size: of the prompts that fit it.
      quality: by the task's first metric.
      gain: the same, minus that with the smallest budget, paired over members; None where a task skips questions that
        a smaller budget has no room for.
    """

    max_tokens: int
    size: PrefixSize
    quality: Estimate
    gain: Estimate | None


def predict_within(
    bundle: Bundle, tasks: Sequence[TaskExamples], style: str, max_tokens: int
) -> list[tuple[pa.Table, PrefixSize]]:
    """Scores examples in prompts of a style within a budget.

    Args:
      bundle: the model.
      tasks: with their examples.
      style: a style with a history, which the model was trained on.
      max_tokens: the budget; see `PromptConfig.max_tokens`.

    Returns:
      Of each task, the table of predictions and what its prompts held.

    Raises:
      ValueError: instruction and question alone exceed the budget.
    """
    prompts = bundle.prompts.model_copy(update={"score_style": style, "max_tokens": max_tokens})
    bundle = dataclasses.replace(bundle, prompts=prompts)
    tasks = [each._replace(name=f"{each.name or each.task.name} within {max_tokens} tokens") for each in tasks]
    encoded = encode_tasks(bundle, tasks)
    sizes = [
        PrefixSize(
            float(np.mean([len(prompt.prefix_pieces) - 1 for prompt in of_task])),
            float(np.mean([prompt.prefix_length for prompt in of_task])),
        )
        for _, of_task in encoded
    ]
    predicted = score_tasks(bundle, tasks, encoded)
    return [(predictions.table, size) for predictions, size in zip(predicted, sizes, strict=True)]


def budget_curve(
    task: Task, predictions: Mapping[int, tuple[pa.Table, PrefixSize]], bootstrap: int
) -> list[BudgetPoint]:
    """Evaluates the predictions of a task.

    Args:
      task: that they are of.
      predictions: by budget, as `predict_within` returns them.
      bootstrap: resamples of members behind each interval.

    Returns:
      A point for each budget, the smallest first.
    """
    points: list[BudgetPoint] = []
    smallest = predictions[min(predictions)][0]
    for max_tokens, (table, size) in sorted(predictions.items()):
        quality = evaluate(table, task, bootstrap)[OVERALL].metrics[task.metrics[0]]
        gain = quality - points[0].quality if points and len(table) == len(smallest) else None
        points.append(BudgetPoint(max_tokens, size, quality, gain))
    return points
