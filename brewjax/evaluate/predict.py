"""A model's predictions on tasks: examples said, scored and laid out as the baselines' are."""

from __future__ import annotations

import itertools
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
    """What scoring took; `seconds` on this machine, packing included and compiling not."""

    questions: int
    tokens: int
    seconds: float


class Predictions(NamedTuple):
    """Of one task, as `evaluate.predictions` has them, and what they took."""

    table: pa.Table
    work: ScoringCost


def predict(
    bundle: Bundle, dataset: Dataset, asked: Sequence[tuple[Task, Sequence[RankingExample]]]
) -> list[Predictions]:
    """Predictions for every question of each task's examples, in their order, but for those that the task skips as
    overlong; prints what was cut or skipped, and how fast they were scored."""
    style, fitting, encoded = bundle.prompts.score_style, [], []
    for task, examples in asked:
        verbalizer = bundle.verbalizer(dataset, task)
        answered = verbalizer.all_fitting(task, track(examples, f"{task.name}: say"), style)
        pairs = [(example, bundle.encode(verbalizer.prompt(task, example, style))) for example in answered]
        verbalizer.print_overlong()
        if not pairs:
            raise task.error("every question is too long and was skipped; raise max_tokens", "questions", "overlong")
        fitting.append([example for example, _ in pairs])
        encoded.append([prompt for _, prompt in pairs])
    scorer = bundle.scorer(list(itertools.chain(*encoded)))
    scorer.warm_up()
    return [
        _score(scorer, task, examples, prompts)
        for (task, _), examples, prompts in zip(asked, fitting, encoded, strict=True)
    ]


def _score(
    scorer: Scorer, task: Task, examples: Sequence[RankingExample], prompts: Sequence[EncodedPrompt]
) -> Predictions:
    began = time.perf_counter()
    probabilities = scorer.score_encoded(prompts)
    seconds = time.perf_counter() - began
    questions, tokens = sum(len(prompt.questions) for prompt in prompts), sum(len(prompt) for prompt in prompts)
    speed = f"{seconds:.1f} s, {tokens / seconds:,.0f} tokens/s"
    plain_console().print(f"{task.name}: {questions:,} questions scored in {tokens:,} tokens, {speed}")
    return Predictions(from_examples(examples, np.concatenate(probabilities)), ScoringCost(questions, tokens, seconds))
