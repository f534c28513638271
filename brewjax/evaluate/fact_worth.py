"""What each number that prompts state is worth: what the fact regression loses without knowing whose it is."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from brewjax.data.tables.dataset import Dataset
from brewjax.data.tables.scales import Scales
from brewjax.data.tasks.examples import RankingExample, sample_examples
from brewjax.data.tasks.task import Task
from brewjax.evaluate.features import CandidateRows
from brewjax.evaluate.metrics import gauc, log_loss
from brewjax.evaluate.predictions import from_examples
from brewjax.evaluate.regression import FactRegression, stated_numbers

SHUFFLES = 5
MAX_EXAMPLES = 2000  # of the training period


class FactWorth(NamedTuple):
    """What a number is worth to the fact regression, by permutation importance (Breiman 2001, section 10).

    Attributes:
      name: such as "items.popularity".
      gauc: what the AUC in list loses when the number is shuffled over the questions; NaN where no list can be ranked.
      log_loss: what the log loss gains; above 0, the number helps.
      log_odds: of the label of the highest value, at the number's highest value less at its lowest; 0 if unknown.
    """

    name: str
    gauc: float
    log_loss: float
    log_odds: float


def measure_facts(dataset: Dataset, task: Task, test: Sequence[RankingExample], seed: int = 0) -> list[FactWorth]:
    """Fits the fact regression once, and shuffles each of its numbers in turn.

    Numbers that say the same stand in for each other, so that each alone is worth little.

    Args:
      dataset: the tables.
      task: whose labels are predicted.
      test: examples that are judged; all labels are known.
      seed: of the shuffles.

    Returns:
      The numbers, those first that lower the log loss most; none where there is no question, or prompts state none.
    """
    train = sample_examples(dataset, task, "train", MAX_EXAMPLES)
    numbers = stated_numbers(dataset, task, test) if train and test else {}
    if not numbers:
        return []
    regression = FactRegression.fit(dataset, task, train, Scales.fit(dataset, task.boundaries(dataset)[0]))
    labels = CandidateRows.from_examples(test).label
    weights, best = np.ones(len(labels)), int(np.argmax(task.values))
    lists = from_examples(test, np.full((len(labels), len(task.words)), 1 / len(task.words)))["list"].to_numpy()

    def judge(changed: dict[str, np.ndarray]) -> np.ndarray:
        probabilities = regression.predict_numbers(changed, len(labels))
        ranked = gauc(probabilities @ task.values, task.values[labels], lists, weights)
        return np.array([ranked, log_loss(probabilities, labels, weights)])

    whole, rng = judge(numbers), np.random.default_rng(seed)
    worths, offset = [], 0
    for name, scale in regression.scales.items():
        shuffled = [judge(numbers | {name: rng.permutation(numbers[name])}) - whole for _ in range(SHUFFLES)]
        change = np.mean(shuffled, axis=0)
        of_label = regression.weights[:, best] - np.delete(regression.weights, best, 1).mean(1)
        known = numbers[name][np.isfinite(numbers[name])]
        ends = offset + np.searchsorted(scale, [known.min(), known.max()] if len(known) else [])
        log_odds = np.diff(of_label[ends]).sum()
        worths.append(FactWorth(name, -float(change[0]), float(change[1]), float(log_odds)))
        offset += len(scale) + 2  # the buckets, and "unknown"
    return sorted(worths, key=lambda worth: -worth.log_loss)
