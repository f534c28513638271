"""A ranker's scores of the items of contrastive records, which an encoder learns from besides what members did."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from brewjax.bundle.bundle import Bundle
from brewjax.data.records.contrastive import ContrastiveConfig, LookUp, choose_items
from brewjax.data.records.example_table import write_example_table
from brewjax.data.records.provenance import training_examples
from brewjax.data.records.soft_labels import SMALLEST
from brewjax.data.tables.dataset import Dataset
from brewjax.data.tables.partition import WHOLE
from brewjax.data.tasks.examples import NO_EVENT, RankingExample
from brewjax.data.tasks.task import Task
from brewjax.evaluate.predict import encode_examples


def score_records(
    ranker: Bundle, dataset: Dataset, task: Task, config: ContrastiveConfig, mined: LookUp | None, folder: Path
) -> None:
    """Scores the items of all records, for an `ExampleTable` to read: float32 log-odds of the task's best label in the
    order of `choose_items`, NaN for a question that is too long for the ranker.

    Args:
      ranker: scores them, each record's as the questions of one prompt.
      dataset: the tables.
      task: whose examples are trained on.
      config: chooses the examples and their items.
      mined: gives the mined negatives, if there are any.
      folder: where the table goes; what is there is not made again.

    Raises:
      ConfigError: every question is too long.
    """
    best = int(np.argmax(task.values))

    def score(examples: Sequence[RankingExample]) -> list[np.ndarray]:
        chosen = [choose_items(example, task, config, mined) for example in examples]
        log_odds = [np.full(len(items), np.nan, np.float32) for items, _ in chosen]
        number_by_seed = {
            example.seed: number
            for number, (example, (_, positives)) in enumerate(zip(examples, chosen, strict=True))
            if positives
        }
        if number_by_seed:
            questions = [_with_items(examples[number], chosen[number][0]) for number in number_by_seed.values()]
            fitting, prompts = encode_examples(ranker, dataset, task, questions)
            for example, probabilities in zip(fitting, ranker.score_encoded(prompts), strict=True):
                number = number_by_seed[example.seed]
                is_fitting = np.isin(chosen[number][0], example.candidates)
                of_best = np.clip(probabilities[:, best].astype(np.float64), SMALLEST, 1 - SMALLEST)
                log_odds[number][is_fitting] = np.log(of_best) - np.log1p(-of_best)
        return log_odds

    examples = training_examples(dataset, task, config, WHOLE, config.repeats)
    write_example_table(folder, examples, score, "ranker's scores")


def _with_items(example: RankingExample, items: np.ndarray) -> RankingExample:
    """The example with other candidates, whose answers are unknown; those that it has keep their exposures."""
    exposure = dict(zip(example.candidates.tolist(), example.exposures.tolist(), strict=True))
    exposures = np.array([exposure.get(item, NO_EVENT) for item in items.tolist()], np.int64)
    labels = np.full(len(items), -1, np.int32)
    return dataclasses.replace(example, candidates=items.astype(np.int32), labels=labels, exposures=exposures)
