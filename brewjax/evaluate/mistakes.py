"""The prompts where a model was most wrong: what it read, what the answer was, and what the best baseline predicted."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from brewjax.data.prompts.verbalize import Verbalizer
from brewjax.data.tasks.examples import RankingExample
from brewjax.evaluate.predictions import probabilities
from brewjax.evaluate.results import Comparison

SHOWN = 5


class Mistake(NamedTuple):
    """A question that a model answered wrongly.

    Attributes:
      member, title: the member's id, and the item's name.
      answer: the label word that was right.
      probability: of the answer, by the model.
      baseline: name of the best baseline; "" where there is none.
      baseline_probability: of the answer, by this baseline; NaN where there is none.
      text: the prompt with this one question.
    """

    member: str
    title: str
    answer: str
    probability: float
    baseline: str
    baseline_probability: float
    text: str


def find_mistakes(
    comparison: Comparison,
    baselines: Sequence[str],
    verbalizer: Verbalizer,
    examples: Sequence[RankingExample],
    style: str,
    count: int = SHOWN,
) -> list[Mistake]:
    """The questions whose answer the first model of a comparison held for least probable, at most one of a member.

    Args:
      comparison: of a task.
      baselines: names of those to choose the best from, by the task's first metric.
      verbalizer: renders prompts of the dataset.
      examples: those that were predicted, in order.
      style: of the prompts.
      count: how many.

    Returns:
      The mistakes, the greatest first.
    """
    model, task = next(iter(comparison.results)), comparison.task
    table = comparison.predictions[model]
    best = comparison.select(*baselines).best(task.metrics[0]) if baselines else None
    label, member = table["label"].to_numpy(), table["member"].to_numpy()

    def of_answer(name: str) -> np.ndarray:
        return np.take_along_axis(probabilities(comparison.predictions[name], task), label[:, None], 1)[:, 0]

    by_model = of_answer(model)
    by_baseline = of_answer(best) if best else np.full(len(label), np.nan)
    order = np.argsort(by_model, kind="stable")
    _, first = np.unique(member[order], return_index=True)
    mistakes = []
    for row in order[np.sort(first)][:count].tolist():
        example, item = examples[table["example"][row].as_py()], table["item"][row].as_py()
        (place, *_) = np.flatnonzero(example.candidates == item)
        prompt = verbalizer.prompt(task, example.select(slice(int(place), int(place) + 1)), style)
        mistakes.append(
            Mistake(
                member=verbalizer.dataset.member_id(example.member),
                title=verbalizer.names(np.array([item]))[0],
                answer=task.words[label[row]],
                probability=float(by_model[row]),
                baseline=best or "",
                baseline_probability=float(by_baseline[row]),
                text=prompt.render(),
            )
        )
    return mistakes
