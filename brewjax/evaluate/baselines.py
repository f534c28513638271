"""Baselines that a model has to beat: popularity, a regression on what prompts state, and gradient-boosted trees.

All answer the same questions as the model, and see only events before each example's cutoff time.
"""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Sequence
from typing import Any

import numpy as np
import pyarrow as pa
from scipy.special import expit

from brewjax.console import plain_console
from brewjax.data.simulate.truth import oracle
from brewjax.data.tables.dataset import Dataset
from brewjax.data.tables.point_in_time import PointInTimeIndex
from brewjax.data.tables.scales import Scales
from brewjax.data.tasks.examples import RankingExample, build_examples
from brewjax.data.tasks.questions import find_questions, match_labels
from brewjax.data.tasks.task import Task
from brewjax.evaluate.features import CandidateRows, Features, build_features
from brewjax.evaluate.metrics import log_loss
from brewjax.evaluate.predictions import from_examples
from brewjax.evaluate.regression import FactRegression

BASELINES = ("popularity", "fact regression", "LightGBM")
ORACLE = "oracle"  # the truth of a simulated dataset, which no model can expect to beat
SMOOTHING = (1, 3, 10, 30, 100)  # candidate weights of the prior, in events

GRID = tuple(  # LightGBM settings to try, the fastest first: the first three make a quick search
    dict(zip(("num_leaves", "learning_rate", "min_child_samples", "feature_fraction"), setting, strict=True))
    for setting in (
        (63, 0.1, 200, 0.5),
        (31, 0.1, 100, 0.7),
        (31, 0.1, 20, 0.3),
        (15, 0.1, 50, 0.5),
        (63, 0.05, 200, 0.5),
        (31, 0.05, 100, 0.5),
        (63, 0.05, 50, 0.3),
        (127, 0.05, 200, 0.5),
    )
)
MAX_ROUNDS = 1000
EARLY_STOPPING_ROUNDS = 30  # rounds without a better validation log loss that end the training of a setting


def predict_baselines(
    dataset: Dataset, task: Task, examples: Sequence[RankingExample], settings: int = 1
) -> dict[str, pa.Table]:
    """Trains the baselines on the training period, and predicts examples.

    Args:
      dataset: the tables.
      task: whose labels are predicted.
      examples: all of their labels are known.
      settings: how many LightGBM settings to try on the validation period.

    Returns:
      Tables of predictions by the names in BASELINES; and ORACLE, where the dataset was simulated.

    Raises:
      ValueError: the training or the validation period has no question.
    """
    train, validation = (list(build_examples(dataset, task, split)) for split in ("train", "validation"))
    scales = Scales.fit(dataset, task.boundaries(dataset)[0])
    trees = LightGBM.fit(dataset, task, train, validation, settings)
    plain_console().print(f"{task.name}: LightGBM chose {trees.settings}, {trees.rounds} rounds")
    predicted = (
        popularity(dataset, task, train, examples),
        FactRegression.fit(dataset, task, train, scales).predict(dataset, task, examples),
        trees.predict(dataset, task, examples),
    )
    tables = {name: from_examples(examples, values) for name, values in zip(BASELINES, predicted, strict=True)}
    truth = oracle(dataset, task, examples)
    return tables if truth is None else tables | {ORACLE: from_examples(examples, truth)}


def popularity(
    dataset: Dataset, task: Task, train: Sequence[RankingExample], examples: Sequence[RankingExample]
) -> np.ndarray:
    """Predicts from the item alone: its label frequencies before the cutoff time, smoothed towards those of all items.

    With sampled negatives no event has the negative label. Its probability then comes from a logistic regression on
    the logarithm of the item's share of all events.

    Args:
      dataset: the tables.
      task: whose labels are predicted.
      train: fits the smoothing and the regression.
      examples: are predicted.

    Returns:
      Probabilities, float64 [questions of `examples`, labels].
    """
    candidates, train_candidates = CandidateRows.from_examples(examples), CandidateRows.from_examples(train)
    negatives = task.questions.sampled_negatives
    labels = np.array([index for index, word in enumerate(task.words) if not negatives or word != negatives.label])
    counts, totals = _label_counts(dataset, task, labels, candidates)
    train_counts, train_totals = _label_counts(dataset, task, labels, train_candidates)

    is_event = np.isin(train_candidates.label, labels)
    answers = np.searchsorted(labels, train_candidates.label[is_event])
    smoothed = [_frequencies(train_counts[is_event], train_totals[is_event], weight) for weight in SMOOTHING]
    losses = [log_loss(frequencies, answers, np.ones(len(answers))) for frequencies in smoothed]
    frequencies = _frequencies(counts, totals, SMOOTHING[np.argmin(losses)])
    if not negatives:
        return frequencies

    def compute_log_share(counts: np.ndarray, totals: np.ndarray) -> np.ndarray:
        return np.log((counts.sum(axis=1) + 1) / (totals.sum(axis=1) + len(dataset.items)))

    intercept, slope = _logistic_regression(compute_log_share(train_counts, train_totals), is_event)
    positive = expit(intercept + slope * compute_log_share(counts, totals))
    result = np.empty((len(positive), len(task.words)))
    result[:, task.words.index(negatives.label)] = 1 - positive
    result[:, labels] = frequencies * positive[:, None]
    return result


def own_past(
    dataset: Dataset, task: Task, train: Sequence[RankingExample], examples: Sequence[RankingExample]
) -> np.ndarray:
    """Predicts from what the member did with the item before: the label frequencies of the two together, smoothed
    towards those of all items. Of what is never repeated it says the same for every item.

    With sampled negatives, the probability of the negative label comes from a logistic regression on the logarithm of
    one more than the number of the member's events with the item.

    Args:
      dataset: the tables.
      task: whose labels are predicted.
      train: fits the smoothing and the regression.
      examples: are predicted.

    Returns:
      Probabilities, float64 [questions of `examples`, labels].
    """
    candidates, train_candidates = CandidateRows.from_examples(examples), CandidateRows.from_examples(train)
    negatives = task.questions.sampled_negatives
    if not negatives:
        labels = np.arange(len(task.words))
        fitted = _label_counts(dataset, task, labels, train_candidates, of_pair=True)
        losses = [
            log_loss(_frequencies(*fitted, weight), train_candidates.label, np.ones(len(train_candidates.label)))
            for weight in SMOOTHING
        ]
        counts = _label_counts(dataset, task, labels, candidates, of_pair=True)
        return _frequencies(*counts, SMOOTHING[np.argmin(losses)])
    code = dataset.event_member.astype(np.int64) * len(dataset.items) + dataset.event_item
    index = PointInTimeIndex(code, dataset.event_time)

    def compute_log_count(rows: CandidateRows) -> np.ndarray:
        start, end = index.window(rows.member * len(dataset.items) + rows.item, rows.cutoff_time)
        return np.log1p(end - start)

    negative = task.words.index(negatives.label)
    intercept, slope = _logistic_regression(compute_log_count(train_candidates), train_candidates.label != negative)
    positive = expit(intercept + slope * compute_log_count(candidates))
    result = np.repeat((positive / (len(task.words) - 1))[:, None], len(task.words), axis=1)
    result[:, negative] = 1 - positive
    return result


def _label_counts(
    dataset: Dataset, task: Task, labels: np.ndarray, candidates: CandidateRows, of_pair: bool = False
) -> tuple[np.ndarray, np.ndarray]:
    """Counts of the events before the cutoff time with each of `labels`, of the candidate (of the member with it,
    where `of_pair`) and of all items, each float64 [questions, labels]."""
    events, answers, times = _answered_events(dataset, task)
    key, item = dataset.event_item[events].astype(np.int64), candidates.item
    if of_pair:
        key += dataset.event_member[events].astype(np.int64) * len(dataset.items)
        item = item + candidates.member * len(dataset.items)
    item_events = PointInTimeIndex(key, times)
    all_events = PointInTimeIndex(np.zeros(len(events)), times)
    item_window = item_events.window(item, candidates.cutoff_time)
    window = all_events.window(np.zeros(len(candidates.cutoff_time)), candidates.cutoff_time)
    counts = [item_events.sum(answers == label, item_window) for label in labels]
    totals = [all_events.sum(answers == label, window) for label in labels]
    return np.stack(counts, axis=1), np.stack(totals, axis=1)


def _answered_events(dataset: Dataset, task: Task) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Events with the label of each, and the time at which it was known; repeats and new items are events too."""
    if task.questions.outcomes:
        questions = find_questions(dataset, task)
        return questions.events, questions.labels, questions.known
    labels = match_labels(dataset, task, np.arange(len(dataset.events)))
    events = np.flatnonzero(labels >= 0)
    return events, labels[events], dataset.event_time[events]


def _frequencies(counts: np.ndarray, totals: np.ndarray, smoothing: float) -> np.ndarray:
    prior = (totals + 1) / (totals + 1).sum(axis=1, keepdims=True)
    return (counts + smoothing * prior) / (counts.sum(axis=1, keepdims=True) + smoothing)


def _logistic_regression(x: np.ndarray, outcome: np.ndarray) -> np.ndarray:
    """Intercept and slope by Newton's method; a weak ridge keeps them finite if the classes are separable."""
    design = np.stack([np.ones_like(x), x], axis=1)
    ridge = 1e-3 * np.eye(2)
    solution = np.zeros(2)
    for _ in range(30):
        p = expit(design @ solution)
        gradient = design.T @ (outcome - p) - ridge @ solution
        solution += np.linalg.solve(design.T @ (design * (p * (1 - p))[:, None]) + ridge, gradient)
    return solution


@dataclasses.dataclass(frozen=True)
class LightGBM:
    """Gradient-boosted trees (Ke et al., NeurIPS 2017) over `features.py`, tuned on the validation period.

    Attributes:
      booster: the trained `lightgbm.Booster`.
      settings: the entry of GRID with the lowest log loss on validation.
      rounds: the number of trees at which it was reached.
      validation_loss: that log loss.
    """

    booster: Any
    settings: dict[str, Any]
    rounds: int
    validation_loss: float

    @classmethod
    def fit(
        cls,
        dataset: Dataset,
        task: Task,
        train: Sequence[RankingExample],
        validation: Sequence[RankingExample],
        settings: int = len(GRID),
        seed: int = 0,
    ) -> LightGBM:
        """Trains with each setting until the validation loss stops improving, and keeps the best.

        Args:
          dataset: the tables.
          task: whose labels are predicted.
          train: examples to learn from.
          validation: examples that say when to stop, and which setting is the best.
          settings: how many of GRID to try.
          seed: of LightGBM.

        Returns:
          The best model.

        Raises:
          ImportError: lightgbm is not installed.
          ValueError: a split has no question.
        """
        for split, examples in (("train", train), ("validation", validation)):
            if not examples:
                raise ValueError(f"task {task.name}: no question in the {split} split, LightGBM cannot be trained")
        training, held_out = (
            (build_features(dataset, task, examples), CandidateRows.from_examples(examples).label)
            for examples in (train, validation)
        )
        return cls.fit_features(task, training, held_out, settings, seed)

    @classmethod
    def fit_features(
        cls,
        task: Task,
        train: tuple[Features, np.ndarray],
        validation: tuple[Features, np.ndarray],
        settings: int = len(GRID),
        seed: int = 0,
    ) -> LightGBM:
        """As `fit`, on features with the label of each row.

        Args:
          task: whose labels are predicted.
          train: features and labels to learn from.
          validation: features and labels that say when to stop, and which setting is the best.
          settings: how many of GRID to try.
          seed: of LightGBM.

        Returns:
          The best model.
        """
        lightgbm = _import_lightgbm()
        training = _lightgbm_dataset(lightgbm, task, *train)
        held_out = _lightgbm_dataset(lightgbm, task, *validation, reference=training)
        binary = len(task.words) == 2
        fixed = {
            "objective": "binary" if binary else "multiclass",
            "num_class": 1 if binary else len(task.words),
            "metric": "binary_logloss" if binary else "multi_logloss",
            "bagging_fraction": 0.8,
            "bagging_freq": 1,
            "feature_pre_filter": False,  # lets one Dataset serve every min_child_samples
            "deterministic": True,
            "force_row_wise": True,
            "seed": seed,
            "verbosity": -1,
        }
        fits = []
        for setting in GRID[:settings]:
            stop = lightgbm.early_stopping(EARLY_STOPPING_ROUNDS, verbose=False)
            booster = lightgbm.train(fixed | setting, training, MAX_ROUNDS, [held_out], callbacks=[stop])
            loss = booster.best_score["valid_0"][fixed["metric"]]
            fits.append(cls(booster, setting, booster.best_iteration, loss))
        return min(fits, key=lambda fit: fit.validation_loss)

    def predict(self, dataset: Dataset, task: Task, examples: Sequence[RankingExample]) -> np.ndarray:
        """Predicts the labels of examples.

        Args:
          dataset: the tables.
          task: whose labels are predicted.
          examples: with candidates.

        Returns:
          Probabilities, float64 [questions, labels].
        """
        return self.predict_features(task, build_features(dataset, task, examples).values)

    def predict_features(self, task: Task, values: np.ndarray) -> np.ndarray:
        """Predicts the labels of questions from their features.

        Args:
          task: whose labels are predicted.
          values: float [questions, features], in the order of `build_features`.

        Returns:
          Probabilities, float64 [questions, labels].
        """
        predicted = self.booster.predict(values)
        return np.stack([predicted, 1 - predicted], axis=1) if len(task.words) == 2 else predicted


def _lightgbm_dataset(lightgbm: Any, task: Task, features: Features, label: np.ndarray, reference: Any = None) -> Any:
    return lightgbm.Dataset(
        features.values,
        label == 0 if len(task.words) == 2 else label,  # a binary prediction is then of the first label
        reference=reference,
        categorical_feature=[features.names.index(name) for name in features.categorical],
    )


def _import_lightgbm() -> Any:
    # OpenMP's threads wait in a busy loop, which is ten times slower if another process needs the same cores.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    try:
        import lightgbm
    except ImportError as error:
        raise ImportError("the LightGBM baseline needs an extra: pip install 'brewjax[baselines]'") from error
    return lightgbm
