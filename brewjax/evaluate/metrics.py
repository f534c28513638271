"""Metrics of ranking and of calibration: functions of arrays and of row weights, so that a bootstrap is other weights.

`weights` is float64 [..., rows] with at least one row, the result has shape [...]. Where a metric is not defined
(one class only, no weight) it is NaN.
"""

from __future__ import annotations

import numpy as np

BINS = 10


def auc(scores: np.ndarray, values: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """The chance that of two questions with different values the higher is scored higher; equal scores count half.

    With two values this is the area under the ROC curve; with more, the concordance index (Harrell et al., JAMA 1982).

    Args:
      scores, values: float64 [rows].
    """
    order, ties = _ties(scores)
    weights, values = weights[..., order], values[order]
    below = np.zeros((*weights.shape[:-1], len(ties)))  # at each score, the weight of all smaller values
    concordant = pairs = np.zeros(weights.shape[:-1])
    for value in np.unique(values):
        mass = np.add.reduceat(weights * (values == value), ties, axis=-1)
        concordant = concordant + (mass * (below.cumsum(-1) - below / 2)).sum(-1)
        pairs = pairs + mass.sum(-1) * below.sum(-1)
        below += mass
    return ratio(concordant, pairs)


def log_loss(probabilities: np.ndarray, labels: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """Mean of -ln(probability of the true label), the probability at least the epsilon of float32.

    Args:
      probabilities: float64 [rows, labels].
      labels: int [rows].
    """
    true = np.take_along_axis(probabilities, labels[:, None], axis=1)[:, 0]
    return ratio(weights @ -np.log(np.clip(true, np.finfo(np.float32).eps, 1)), weights.sum(-1))


def ndcg(scores: np.ndarray, values: np.ndarray, groups: np.ndarray, weights: np.ndarray, k: int = 10) -> np.ndarray:
    """NDCG@k, averaged over groups by the mean weight of their rows.

    The gain of an answer is 2^value - 1, its discount 1 / log2(rank + 1) (Burges et al., ICML 2005). Equal scores get
    the mean over all their orders (McSherry and Najork, ECIR 2008), so that the order of the rows cannot help. A group
    whose values are all equal cannot be ranked and is left out.

    Args:
      scores, values: float64 [rows]; no value is negative.
      groups: int [rows]; the rows of a group are the questions behind one history.
    """
    order = np.lexsort((values, groups))
    starts = np.flatnonzero(np.diff(groups[order], prepend=groups[order[0]] - 1))
    ends = np.append(starts[1:], len(groups))
    mass = np.add.reduceat(weights[..., order], starts, axis=-1) / (ends - starts)
    ranked = values[order[starts]] < values[order[ends - 1]]
    gains = np.exp2(values) - 1
    normalized = _dcg(scores, gains, groups, k)[ranked] / _dcg(values, gains, groups, k)[ranked]
    return ratio(mass[..., ranked] @ normalized, mass[..., ranked].sum(-1))


def _dcg(scores: np.ndarray, gains: np.ndarray, groups: np.ndarray, k: int) -> np.ndarray:
    """The expected DCG@k of each group in ascending order, over all orders of equal scores."""
    order = np.lexsort((-scores, groups))
    scores, gains, groups = scores[order], gains[order], groups[order]
    first = np.diff(groups, prepend=groups[0] - 1) != 0
    start = np.flatnonzero(first)
    rank = np.arange(len(groups)) - np.repeat(start, np.diff(start, append=len(groups)))
    discounts = np.where(rank < k, 1 / np.log2(rank + 2), 0)
    ties = np.flatnonzero(first | (np.diff(scores, prepend=scores[0]) != 0))
    mean_gain = np.add.reduceat(gains, ties) / np.diff(ties, append=len(gains))
    return np.bincount(np.cumsum(first)[ties] - 1, mean_gain * np.add.reduceat(discounts, ties))


def calibration_error(probabilities: np.ndarray, labels: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """Expected calibration error: |mean probability - frequency| averaged over 10 bins of equal weight.

    Of the first label where there are two; the mean over the labels where there are more (classwise ECE: Kull et al.,
    NeurIPS 2019). Equal probabilities share a bin.

    Args:
      probabilities: float64 [rows, labels].
      labels: int [rows].
    """
    count = probabilities.shape[1]
    classes = range(count if count > 2 else 1)
    errors = []
    for label in classes:
        said, true, _ = reliability(probabilities[:, label], labels == label, weights)
        errors.append(np.abs(said - true).sum(-1))
    return ratio(np.mean(errors, axis=0), weights.sum(-1))


def reliability(probability: np.ndarray, outcome: np.ndarray, weights: np.ndarray) -> tuple[np.ndarray, ...]:
    """Ten bins of equal weight by probability: their sums of probability, of outcomes and of weight, each [..., 10].

    Args:
      probability: float64 [rows].
      outcome: bool [rows].
    """
    order, ties = _ties(probability)
    weights = weights[..., order]
    mass = np.add.reduceat(weights, ties, axis=-1)
    middle = ratio(mass.cumsum(-1) - mass / 2, mass.sum(-1, keepdims=True))
    place = np.minimum((np.nan_to_num(middle) * BINS).astype(int), BINS - 1).reshape(-1, len(ties))
    place += BINS * np.arange(len(place))[:, None]  # each leading index of the weights has its own bins

    def total(row_values: np.ndarray) -> np.ndarray:
        sums = np.add.reduceat(weights * row_values[order], ties, axis=-1)
        return np.bincount(place.ravel(), sums.ravel(), BINS * len(place)).reshape(*weights.shape[:-1], BINS)

    return total(probability), total(outcome), total(np.ones(len(order)))


def _ties(scores: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The rows in ascending order of score, and where in that order each different score begins."""
    order = np.argsort(scores)
    return order, np.flatnonzero(np.diff(scores[order], prepend=-np.inf))


def ratio(numerator: np.ndarray, denominator: np.ndarray) -> np.ndarray:
    """NaN, without a warning, where nothing is divided by nothing."""
    with np.errstate(invalid="ignore", divide="ignore"):
        return np.asarray(numerator) / denominator
