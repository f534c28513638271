"""Ranking and calibration metrics as functions of arrays and row weights; a bootstrap sample is a row of weights.

A row is a question. `weights` is float64 [..., rows] with at least one row, and the result has shape [...]. A metric
that is undefined (one class only, no weight) is NaN.
"""

from __future__ import annotations

import numpy as np

BINS = 10  # of the calibration error and of reliability plots


def auc(scores: np.ndarray, values: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """The probability that of two questions with different values the higher has the higher score; ties count half.

    With two values this is the area under the ROC curve; with more, the concordance index (Harrell et al., JAMA 1982).

    Args:
      scores: float64 [rows], by which items are ranked.
      values: float64 [rows], the value of the true answer.
      weights: float64 [..., rows].

    Returns:
      float64 [...], one for each set of weights; NaN where all values are equal.
    """
    order, ties = _ties(scores)
    weights, values = weights[..., order], values[order]
    below = np.zeros((*weights.shape[:-1], len(ties)))  # per distinct score, the weight of all smaller values
    concordant = pairs = np.zeros(weights.shape[:-1])
    for value in np.unique(values):
        mass = np.add.reduceat(weights * (values == value), ties, axis=-1)
        concordant = concordant + (mass * (below.cumsum(-1) - below / 2)).sum(-1)
        pairs = pairs + mass.sum(-1) * below.sum(-1)
        below += mass
    return ratio(concordant, pairs)


def gauc(scores: np.ndarray, values: np.ndarray, groups: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """The AUC within each group, averaged by the groups' weights (GAUC: Zhou et al., KDD 2018, section 5.2).

    It says how well a ranker orders one list. What all items of a list share, such as a generous member, counts for
    nothing. A group whose values are all equal cannot be ranked and is left out.

    Args:
      scores: float64 [rows], by which items are ranked.
      values: float64 [rows], the value of the true answer.
      groups: int [rows]; the rows of a group are one list.
      weights: float64 [..., rows], equal within a group.

    Returns:
      float64 [...], one for each set of weights; NaN where no group can be ranked.
    """
    order = np.lexsort((scores, groups))
    scores, values, groups = scores[order], values[order], groups[order]
    first = np.diff(groups, prepend=groups[0] - 1) != 0
    ties = np.flatnonzero(first | (np.diff(scores, prepend=scores[0]) != 0))
    group = np.cumsum(first) - 1
    group_of_tie = group[ties]
    begins = np.searchsorted(group_of_tie, group_of_tie)  # the first tie of the same group
    below = np.zeros(len(ties))  # per distinct score of a group, the number of smaller values
    concordant = pairs = np.zeros(group[-1] + 1)
    for value in np.unique(values):
        count = np.add.reduceat((values == value).astype(np.float64), ties)
        smaller = below.cumsum() - below
        smaller -= smaller[begins]
        concordant = concordant + np.bincount(group_of_tie, count * (smaller + below / 2))
        pairs = pairs + np.bincount(group_of_tie, count) * np.bincount(group_of_tie, below)
        below += count
    mass = np.add.reduceat(weights[..., order], np.flatnonzero(first), axis=-1)
    ranked = pairs > 0
    return ratio(mass[..., ranked] @ ratio(concordant[ranked], pairs[ranked]), mass[..., ranked].sum(-1))


def log_loss(probabilities: np.ndarray, labels: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """Mean of -ln(probability of the true label), with probabilities clipped to at least the epsilon of float32.

    Args:
      probabilities: float64 [rows, labels].
      labels: int [rows], index of the true label.
      weights: float64 [..., rows].

    Returns:
      float64 [...], in nats, one for each set of weights.
    """
    true = np.take_along_axis(probabilities, labels[:, None], axis=1)[:, 0]
    return ratio(weights @ -np.log(np.clip(true, np.finfo(np.float32).eps, 1)), weights.sum(-1))


def ndcg(scores: np.ndarray, values: np.ndarray, groups: np.ndarray, weights: np.ndarray, k: int = 10) -> np.ndarray:
    """NDCG@k, averaged over groups by the mean weight of their rows.

    The gain of an answer is 2^value - 1, its discount 1 / log2(rank + 1) (Burges et al., ICML 2005). Tied scores get
    the mean over all their orders (McSherry and Najork, ECIR 2008), so that the order of the rows has no effect. A
    group whose values are all equal cannot be ranked and is left out.

    Args:
      scores: float64 [rows], by which items are ranked.
      values: float64 [rows], the value of the true answer, not negative.
      groups: int [rows]; the rows of a group are one list.
      weights: float64 [..., rows].
      k: ranks after this one count for nothing.

    Returns:
      float64 [...], one for each set of weights; NaN where no group can be ranked.
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
    """The DCG@k of each group, in ascending order of groups, averaged over all orders of tied scores."""
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

    With two labels it is that of the first; with more, the mean over the labels (classwise ECE: Kull et al., NeurIPS
    2019). Equal probabilities share a bin.

    Args:
      probabilities: float64 [rows, labels].
      labels: int [rows], index of the true label.
      weights: float64 [..., rows].

    Returns:
      float64 [...], from 0 to 1, one for each set of weights.
    """
    num_labels = probabilities.shape[1]
    classes = range(num_labels if num_labels > 2 else 1)
    errors = []
    for label in classes:
        predicted, observed, _ = reliability(probabilities[:, label], labels == label, weights)
        errors.append(np.abs(predicted - observed).sum(-1))
    return ratio(np.mean(errors, axis=0), weights.sum(-1))


def reliability(probability: np.ndarray, outcome: np.ndarray, weights: np.ndarray) -> tuple[np.ndarray, ...]:
    """Sums predictions and outcomes in ten bins of equal weight by probability; equal probabilities share a bin.

    Args:
      probability: float64 [rows].
      outcome: bool [rows].
      weights: float64 [..., rows].

    Returns:
      The sums of probability, of outcomes and of weight of each bin, float64 [..., 10] each.
    """
    order, ties = _ties(probability)
    weights = weights[..., order]
    mass = np.add.reduceat(weights, ties, axis=-1)
    middle = ratio(mass.cumsum(-1) - mass / 2, mass.sum(-1, keepdims=True))
    bins = np.minimum((np.nan_to_num(middle) * BINS).astype(int), BINS - 1).reshape(-1, len(ties))
    bins += BINS * np.arange(len(bins))[:, None]  # each leading index of the weights has its own bins

    def sum_by_bin(row_values: np.ndarray) -> np.ndarray:
        sums = np.add.reduceat(weights * row_values[order], ties, axis=-1)
        return np.bincount(bins.ravel(), sums.ravel(), BINS * len(bins)).reshape(*weights.shape[:-1], BINS)

    return sum_by_bin(probability), sum_by_bin(outcome), sum_by_bin(np.ones(len(order)))


def _ties(scores: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The rows in ascending order of score, and the index in that order at which each distinct score begins."""
    order = np.argsort(scores)
    return order, np.flatnonzero(np.diff(scores[order], prepend=-np.inf))


def ratio(numerator: np.ndarray, denominator: np.ndarray) -> np.ndarray:
    """Divides without a warning.

    Args:
      numerator: float [...].
      denominator: float [...].

    Returns:
      float [...], the quotient; NaN for 0 / 0.
    """
    with np.errstate(invalid="ignore", divide="ignore"):
        return np.asarray(numerator) / denominator
