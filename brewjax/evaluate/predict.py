"""A model's predictions on a task: examples said, scored and laid out as the baselines' are."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import pyarrow as pa
from rich.console import Console
from rich.progress import track

from brewjax.data.dataset import Dataset
from brewjax.data.examples import Example
from brewjax.data.task import Task
from brewjax.evaluate.predictions import from_examples
from brewjax.scoring.bundle import Bundle


class Work(NamedTuple):
    """What scoring took; `seconds` on this machine, packing included and compiling not."""

    questions: int
    tokens: int
    seconds: float


def predict(bundle: Bundle, dataset: Dataset, task: Task, examples: Sequence[Example]) -> tuple[pa.Table, Work]:
    """Predictions for every question of `examples`, in their order; prints how fast they were scored."""
    verbalizer = bundle.verbalizer(dataset, task)
    style = bundle.prompts.score_style
    prompts = [
        bundle.encode(verbalizer.prompt(task, example, style))
        for example in track(examples, f"{task.name}: say", transient=True)
    ]
    scorer = bundle.scorer(prompts)
    scorer.warm_up()
    began = time.perf_counter()
    probabilities = scorer.score_encoded(prompts)
    seconds = time.perf_counter() - began
    questions, tokens = sum(len(prompt.questions) for prompt in prompts), sum(len(prompt) for prompt in prompts)
    speed = f"{seconds:.1f} s, {tokens / seconds:,.0f} tokens/s"
    Console().print(f"{task.name}: {questions:,} questions scored in {tokens:,} tokens, {speed}")
    return from_examples(examples, np.concatenate(probabilities)), Work(questions, tokens, seconds)
