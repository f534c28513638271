"""The floor that a model must clear: logistic regression on exactly the numbers that its prompts state."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence

import numpy as np
import scipy.optimize
import scipy.sparse
from scipy.special import log_softmax, softmax

from brewjax.data.tables.dataset import Dataset
from brewjax.data.tables.scales import Scales
from brewjax.data.tables.statistics import FactValues, floats
from brewjax.data.tasks.examples import RankingExample
from brewjax.data.tasks.task import Task
from brewjax.evaluate.features import CandidateRows

RIDGE = 10.0  # weight of the squared coefficients, in questions
BUCKETS = 10  # of a number that prompts state as it is


@dataclasses.dataclass(frozen=True)
class FactRegression:
    """Multinomial logistic regression on one-hot codes of the facts and number attributes of member, item and pair, in
    the buckets in which prompts state them, and on the context of the question.

    Attributes:
      scales: by the name of each number, float64 [buckets - 1]: the values between its buckets, ascending.
      weights: float64 [codes + 1, labels]; the last row is the intercept.
    """

    scales: dict[str, np.ndarray]
    weights: np.ndarray

    @classmethod
    def fit(cls, dataset: Dataset, task: Task, train: Sequence[RankingExample], scales: Scales) -> FactRegression:
        """Fits the regression.

        Args:
          dataset: the tables.
          task: whose labels are predicted.
          train: examples of the training period.
          scales: the scales of the dataset's numbers in buckets.

        Returns:
          The regression.

        Raises:
          ValueError: there is no question.
        """
        if not train:
            raise ValueError(f"task {task.name}: no question in the train split, the regression cannot be trained")
        labels = CandidateRows.from_examples(train).label
        return cls.fit_numbers(stated_numbers(dataset, task, train), labels, len(task.words), scales.quantiles)

    @classmethod
    def fit_numbers(
        cls,
        numbers: Mapping[str, np.ndarray],
        labels: np.ndarray,
        num_labels: int,
        quantiles: Mapping[str, Sequence[float]],
    ) -> FactRegression:
        """Fits the regression on numbers that are known already.

        Args:
          numbers: by name, float64 [questions] each, NaN where unknown.
          labels: int64 [questions], the true answers.
          num_labels: how many labels there are, also such as no question has.
          quantiles: the scales of some of the numbers; the others get BUCKETS buckets of equal shares.

        Returns:
          The regression, with the L2 penalty RIDGE on all weights but the intercept.
        """
        scales = {}
        for name, values in numbers.items():
            known = values[np.isfinite(values)]
            default_scale = np.quantile(known, np.arange(1, BUCKETS) / BUCKETS) if len(known) else np.zeros(0)
            scales[name] = np.array(quantiles.get(name) or default_scale)
        design = _one_hot(numbers, scales, len(labels))
        target = np.eye(num_labels)[labels]
        shape = (design.shape[1], num_labels)

        def loss(flat: np.ndarray) -> tuple[float, np.ndarray]:
            weights = flat.reshape(shape)
            logits = design @ weights
            penalty = RIDGE / 2 * float((weights[:-1] ** 2).sum())
            gradient = design.T @ (softmax(logits, axis=1) - target)
            gradient[:-1] += RIDGE * weights[:-1]
            return -float((log_softmax(logits, axis=1) * target).sum()) + penalty, gradient.ravel()

        fitted = scipy.optimize.minimize(loss, np.zeros(shape).ravel(), jac=True, method="L-BFGS-B")
        return cls(scales, fitted.x.reshape(shape))

    def predict(self, dataset: Dataset, task: Task, examples: Sequence[RankingExample]) -> np.ndarray:
        """Predicts the labels of examples.

        Args:
          dataset: the tables.
          task: whose labels are predicted.
          examples: with candidates.

        Returns:
          Probabilities, float64 [questions, labels].
        """
        return self.predict_numbers(
            stated_numbers(dataset, task, examples), sum(len(example.candidates) for example in examples)
        )

    def predict_numbers(self, numbers: Mapping[str, np.ndarray], count: int) -> np.ndarray:
        """Probabilities of `count` questions from their `numbers` (as of `fit_numbers`), float64 [questions,
        labels]."""
        return softmax(_one_hot(numbers, self.scales, count) @ self.weights, axis=1)


def stated_numbers(dataset: Dataset, task: Task, examples: Sequence[RankingExample]) -> dict[str, np.ndarray]:
    """The numbers that the profile and the question of each candidate state, float64 [questions] each, by name."""
    rows, card = CandidateRows.from_examples(examples), task.side_of(dataset.card)
    exposures = np.concatenate([[], *(example.exposures for example in examples)]).astype(np.int64)
    numbers: dict[str, np.ndarray] = {}
    for table, index in (("members", rows.member), ("items", rows.item)):
        for attribute in getattr(card, table).attributes:
            if attribute.kind == "number" and "question" in attribute.where:
                numbers[f"{table}.{attribute.column}"] = floats(getattr(dataset, table)[attribute.column])[index]
    for attribute in card.events.attributes:
        if attribute.kind == "number" and attribute.column in task.questions.context:
            values = floats(dataset.events[attribute.column])[exposures]
            numbers[f"events.{attribute.column}"] = np.where(exposures >= 0, values, np.nan)
    facts = FactValues.of(dataset)
    for group, fact in card.facts.declared():
        if group != "events":
            numbers[f"{group}.{fact.name}"] = facts.values(group, fact, rows.member, rows.item, rows.cutoff_time)
    return numbers


def _one_hot(numbers: Mapping[str, np.ndarray], scales: Mapping[str, np.ndarray], count: int) -> scipy.sparse.csr_array:
    """One column for each bucket of each number, one for each number that is unknown, and a column of ones."""
    columns, offset = [], 0
    for name, scale in scales.items():
        values = numbers[name]
        columns.append(offset + np.where(np.isfinite(values), np.searchsorted(scale, values), len(scale) + 1))
        offset += len(scale) + 2
    columns.append(np.full(count, offset))
    index = np.stack(columns, axis=1)
    pointers = np.arange(0, index.size + 1, index.shape[1])
    return scipy.sparse.csr_array((np.ones(index.size), index.ravel(), pointers), shape=(count, offset + 1))
