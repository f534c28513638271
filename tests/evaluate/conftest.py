"""What the tests of evaluation share: the jobs dataset, a task on it, and predictions made up at random."""

from __future__ import annotations

import numpy as np
import pyarrow as pa
import pytest

from brewjax.data.tasks.examples import RankingExample
from brewjax.data.tasks.task import Task
from brewjax.evaluate.predictions import from_examples
from tests.data.conftest import jobs, jobs_with  # noqa: F401 (fixtures)

TASK = """\
name: apply
instruction: Predict.
history: {actions: [viewed, applied]}
questions: {question: Will the member apply, actions: [viewed, applied], candidates_per_prompt: 3%s}
labels:
  - {word: "Yes", value: 1, match: {action: applied}}
  - {word: "No", value: 0, match: {action: viewed}}
"""


@pytest.fixture(scope="session")
def task() -> Task:
    return Task.parse(TASK % "")


@pytest.fixture(scope="session")
def sampled_task() -> Task:
    """The same with two sampled negatives per event, and no other negatives."""
    text = TASK % ', sampled_negatives: {label: "No", per_event: 2}'
    return Task.parse(
        text.replace("[viewed, applied], candidates_per_prompt", "[applied], candidates_per_prompt").replace(
            "viewed}", "seen}"
        )
    )


@pytest.fixture(scope="session")
def three_label_task() -> Task:
    return Task.parse(
        (TASK % "").replace("apply\n", "three\n") + '  - {word: "Never", value: 0.5, match: {action: [dismissed]}}\n'
    )


def make_examples(rng: np.random.Generator, count: int, members: int = 20, labels: int = 2) -> list[RankingExample]:
    """Random examples of 4 questions each, of members with every number of past events."""
    nothing = np.zeros(0, np.int64)
    past = rng.choice([0, 3, 8, 50, 200], count)
    return [
        RankingExample(
            "apply",
            int(rng.integers(members)),
            0,
            nothing,
            int(p),
            rng.integers(9, size=4),
            rng.integers(labels, size=4),
            np.full(4, -1),
        )
        for p in past
    ]


def informed_predictions(rng: np.random.Generator, examples: list[RankingExample], noise: float = 1.0) -> pa.Table:
    """Two-label predictions that know something of the answers."""
    labels = np.concatenate([example.labels for example in examples])
    yes = 1 / (1 + np.exp(2 * labels - 1 + noise * rng.normal(size=len(labels))))
    return from_examples(examples, np.stack([yes, 1 - yes], axis=1))
