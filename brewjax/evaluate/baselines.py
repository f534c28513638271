"""What a model has to beat: popularity, and gradient-boosted trees over features built by hand.

Both answer the same questions as the model and know only what was known at each example's cut.
"""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Sequence
from typing import Any

import numpy as np
from scipy.special import expit

from brewjax.data.tables.dataset import Dataset
from brewjax.data.tables.point_in_time import PointInTimeIndex
from brewjax.data.tasks.examples import RankingExample, labelled_events
from brewjax.data.tasks.task import Task
from brewjax.evaluate.features import CandidateRows, Features, build_features
from brewjax.evaluate.metrics import log_loss

SMOOTHING = (1, 3, 10, 30, 100)  # how many events the prior may be worth

GRID = tuple(  # the fastest first: the first three make a quick search
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
PATIENCE = 30  # rounds without a better validation log loss before a setting stops


def popularity(
    dataset: Dataset, task: Task, train: Sequence[RankingExample], examples: Sequence[RankingExample]
) -> np.ndarray:
    """Probabilities float64 [questions of `examples`, labels] from the item alone.

    An item's label frequencies among the events before the cut, smoothed towards those of all items. Where negatives
    are sampled, events say nothing about the negative label: there a logistic regression on the logarithm of the
    item's share of all events tells it from the others. What is fitted is fitted on the questions of `train`.
    """
    asked, learned = CandidateRows.of(examples), CandidateRows.of(train)
    negatives = task.questions.sampled_negatives
    labels = np.array([index for index, word in enumerate(task.words) if not negatives or word != negatives.label])
    counts, totals = _label_counts(dataset, task, labels, asked)
    learned_counts, learned_totals = _label_counts(dataset, task, labels, learned)

    told = np.isin(learned.label, labels)
    answers = np.searchsorted(labels, learned.label[told])
    smoothed = [_frequencies(learned_counts[told], learned_totals[told], events) for events in SMOOTHING]
    losses = [log_loss(frequencies, answers, np.ones(len(answers))) for frequencies in smoothed]
    frequencies = _frequencies(counts, totals, SMOOTHING[np.argmin(losses)])
    if not negatives:
        return frequencies

    def log_share(counts: np.ndarray, totals: np.ndarray) -> np.ndarray:
        return np.log((counts.sum(axis=1) + 1) / (totals.sum(axis=1) + len(dataset.items)))

    intercept, slope = _logistic_regression(log_share(learned_counts, learned_totals), told)
    positive = expit(intercept + slope * log_share(counts, totals))
    result = np.empty((len(positive), len(task.words)))
    result[:, task.words.index(negatives.label)] = 1 - positive
    result[:, labels] = frequencies * positive[:, None]
    return result


def _label_counts(
    dataset: Dataset, task: Task, labels: np.ndarray, asked: CandidateRows
) -> tuple[np.ndarray, np.ndarray]:
    """[questions, labels]: events before the cut with each of the labels, of the item in question and of all items."""
    events, answers = labelled_events(dataset, task)
    times = dataset.event_time[events]
    item, everything = (
        PointInTimeIndex(dataset.event_item[events], times),
        PointInTimeIndex(np.zeros(len(events)), times),
    )
    item_window = item.window(asked.item, asked.cutoff_time)
    window = everything.window(np.zeros(len(asked.cutoff_time)), asked.cutoff_time)
    counts = [item.sum(answers == label, item_window) for label in labels]
    totals = [everything.sum(answers == label, window) for label in labels]
    return np.stack(counts, axis=1), np.stack(totals, axis=1)


def _frequencies(counts: np.ndarray, totals: np.ndarray, smoothing: float) -> np.ndarray:
    prior = (totals + 1) / (totals + 1).sum(axis=1, keepdims=True)
    return (counts + smoothing * prior) / (counts.sum(axis=1, keepdims=True) + smoothing)


def _logistic_regression(x: np.ndarray, outcome: np.ndarray) -> np.ndarray:
    """Intercept and slope by Newton's method; a weak ridge keeps them finite where the classes can be separated."""
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
      settings: those of GRID that had the lowest log loss on validation.
      rounds: after how many trees that was.
      validation_loss: what it was.
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
        """Trains with each of the first `settings` of GRID until validation stops improving, and keeps the best.

        Raises ImportError without lightgbm, ValueError where a split has no question.
        """
        lightgbm = _import_lightgbm()
        for split, examples in (("train", train), ("validation", validation)):
            if not examples:
                raise ValueError(f"task {task.name}: no question in the {split} split, LightGBM cannot be trained")
        training = _lightgbm_dataset(lightgbm, build_features(dataset, task, train), task, train)
        held_out = _lightgbm_dataset(
            lightgbm, build_features(dataset, task, validation), task, validation, reference=training
        )
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
        for chosen in GRID[:settings]:
            stop = lightgbm.early_stopping(PATIENCE, verbose=False)
            booster = lightgbm.train(fixed | chosen, training, MAX_ROUNDS, [held_out], callbacks=[stop])
            loss = booster.best_score["valid_0"][fixed["metric"]]
            fits.append(cls(booster, chosen, booster.best_iteration, loss))
        return min(fits, key=lambda fit: fit.validation_loss)

    def predict(self, dataset: Dataset, task: Task, examples: Sequence[RankingExample]) -> np.ndarray:
        """Probabilities float64 [questions, labels]."""
        said = self.booster.predict(build_features(dataset, task, examples).values)
        return np.stack([said, 1 - said], axis=1) if len(task.words) == 2 else said


def _lightgbm_dataset(
    lightgbm: Any, features: Features, task: Task, examples: Sequence[RankingExample], reference: Any = None
) -> Any:
    label = CandidateRows.of(examples).label
    return lightgbm.Dataset(
        features.values,
        label == 0 if len(task.words) == 2 else label,  # so that a binary prediction is of the first label
        reference=reference,
        categorical_feature=[features.names.index(name) for name in features.categorical],
    )


def _import_lightgbm() -> Any:
    # OpenMP's threads wait in a busy loop, which is ten times slower where another process wants the same cores.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    try:
        import lightgbm
    except ImportError as error:
        raise ImportError("the LightGBM baseline needs an extra: pip install 'brewjax[baselines]'") from error
    return lightgbm
