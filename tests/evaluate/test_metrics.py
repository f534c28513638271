from __future__ import annotations

import itertools

import hypothesis
import numpy as np
import pytest
import sklearn.metrics
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from brewjax.evaluate.metrics import auc, calibration_error, gauc, log_loss, ndcg, reliability

FEW = st.sampled_from([0.05, 0.2, 0.35, 0.5, 0.8, 0.95])  # few different scores: many ties


@st.composite
def questions(draw, labels: int = 2):
    """Scores, labels, groups and integer weights of the same rows; at least one row has a weight."""
    rows = draw(st.integers(1, 40))
    column = lambda elements: draw(hnp.arrays(np.float64, rows, elements=elements))  # noqa: E731
    weights = column(st.integers(0, 3).map(float))
    weights[0] += 1
    integers = lambda below: column(st.integers(0, below - 1).map(float)).astype(int)  # noqa: E731
    return column(FEW), integers(labels), integers(6), weights


def two_columns(scores: np.ndarray) -> np.ndarray:
    return np.stack([scores, 1 - scores], axis=1)


@hypothesis.given(questions())
@hypothesis.settings(deadline=None)
def test_auc_is_scikit_learns(rows):
    scores, labels, _, weights = rows
    hypothesis.assume(len(np.unique(labels[weights > 0])) == 2)
    expected = sklearn.metrics.roc_auc_score(labels, scores, sample_weight=weights)
    assert auc(scores, labels.astype(float), weights) == pytest.approx(expected)


@hypothesis.given(questions(labels=4))
@hypothesis.settings(deadline=None)
def test_auc_of_more_values_is_the_share_of_concordant_pairs(rows):
    scores, values, _, weights = rows
    concordant = total = 0.0
    for i, j in itertools.permutations(range(len(scores)), 2):
        if values[i] > values[j]:
            total += weights[i] * weights[j]
            concordant += weights[i] * weights[j] * ((scores[i] > scores[j]) + (scores[i] == scores[j]) / 2)
    expected = concordant / total if total else np.nan
    assert auc(scores, values.astype(float), weights) == pytest.approx(expected, nan_ok=True)


@hypothesis.given(questions())
@hypothesis.settings(deadline=None)
def test_log_loss_is_scikit_learns(rows):
    scores, labels, _, weights = rows
    probabilities = two_columns(scores)
    expected = sklearn.metrics.log_loss(labels, probabilities, sample_weight=weights, labels=[0, 1])
    assert log_loss(probabilities, labels, weights) == pytest.approx(expected)


def test_log_loss_of_a_certain_mistake_is_finite():
    loss = log_loss(np.array([[0.0, 1.0]]), np.array([0]), np.ones(1))
    assert loss == pytest.approx(-np.log(np.finfo(np.float32).eps))


@hypothesis.given(questions(labels=4))
@hypothesis.settings(deadline=None)
def test_ndcg_is_scikit_learns_mean_over_groups(rows):
    scores, values, groups, _ = rows
    expected = [
        sklearn.metrics.ndcg_score([2.0 ** values[groups == g] - 1], [scores[groups == g]], k=10)
        for g in np.unique(groups)
        if len(np.unique(values[groups == g])) > 1
    ]
    actual = ndcg(scores, values.astype(float), groups, np.ones(len(scores)))
    assert actual == pytest.approx(np.mean(expected) if expected else np.nan, nan_ok=True)


@hypothesis.given(questions(labels=4))
@hypothesis.settings(deadline=None)
def test_gauc_is_the_mean_over_lists_of_the_auc_in_each(rows):
    scores, values, groups, _ = rows
    values = values.astype(float)
    lists = [groups == group for group in np.unique(groups) if len(np.unique(values[groups == group])) > 1]
    aucs = [auc(scores[rows], values[rows], np.ones(rows.sum())) for rows in lists]
    expected = np.average(aucs, weights=[rows.sum() for rows in lists]) if lists else np.nan
    actual = gauc(scores, values, groups, np.ones((3, len(scores))))
    assert actual == pytest.approx([expected] * 3, nan_ok=True)


def test_constant_scores_are_worth_a_random_order():
    values = np.array([1.0, 1.0, 0.0, 2.0, 0.0])
    weights, groups, constant = np.ones(5), np.zeros(5, int), np.full(5, 0.3)
    orders = [ndcg(np.array(order, float), values, groups, weights) for order in itertools.permutations(range(5))]
    assert ndcg(constant, values, groups, weights) == pytest.approx(np.mean(orders))
    assert auc(constant, values, weights) == 0.5


def test_ndcg_looks_at_the_first_ten_only():
    values = np.array([1.0] + [0.0] * 19)
    below_ten = np.array([-15.0, *-np.arange(19.0)])
    assert ndcg(below_ten, values, np.zeros(20, int), np.ones(20)) == 0


def test_ndcg_weighs_groups():
    scores, values = np.array([2.0, 1.0, 1.0, 2.0]), np.array([1.0, 0.0, 1.0, 0.0])
    groups, weights = np.array([7, 7, 3, 3]), np.array([3.0, 3.0, 1.0, 1.0])
    assert ndcg(scores, values, groups, weights) == pytest.approx((3 * 1 + 1 / np.log2(3)) / 4)


def test_calibration_error_by_hand():
    predicted = np.repeat(np.arange(10) / 10 + 0.05, 4)  # ten bins of four
    true = np.tile([True, False, True, False], 10)  # half of each bin
    labels = np.where(true, 0, 1)
    expected = np.mean(np.abs(np.arange(10) / 10 + 0.05 - 0.5))
    assert calibration_error(two_columns(predicted), labels, np.ones(40)) == pytest.approx(expected)
    probability, outcome, weight = reliability(predicted, true, np.ones(40))
    np.testing.assert_allclose(probability, 4 * (np.arange(10) / 10 + 0.05))
    np.testing.assert_allclose(outcome, 2)
    np.testing.assert_allclose(weight, 4)


def test_calibration_error_of_more_labels_is_the_mean_over_labels():
    probabilities = np.tile([0.5, 0.3, 0.2], (10, 1))
    labels = np.repeat([0, 1, 2], [8, 1, 1])
    assert calibration_error(probabilities, labels, np.ones(10)) == pytest.approx((0.3 + 0.2 + 0.1) / 3)


def all_metrics(scores, labels, groups, weights):
    probabilities = two_columns(scores)
    return np.stack(
        [
            auc(scores, 1.0 - labels, weights),
            log_loss(probabilities, labels, weights),
            ndcg(scores, 1.0 - labels, groups, weights),
            calibration_error(probabilities, labels, weights),
        ]
    )


@hypothesis.given(questions(), st.randoms(use_true_random=False))
@hypothesis.settings(deadline=None)
def test_the_order_of_rows_changes_nothing(rows, random):
    order = random.sample(range(len(rows[0])), len(rows[0]))
    np.testing.assert_allclose(all_metrics(*rows), all_metrics(*(column[order] for column in rows)), atol=1e-12)


@hypothesis.given(questions())
@hypothesis.settings(deadline=None)
def test_a_weight_is_so_many_rows(rows):
    scores, labels, groups, weights = rows
    times = weights.astype(int)
    repeated = [np.repeat(column, times) for column in (scores, labels, groups, np.ones(len(scores)))]
    for metric in (0, 1, 3):  # NDCG's groups are repeated whole, not row by row
        np.testing.assert_allclose(all_metrics(*rows)[metric], all_metrics(*repeated)[metric], atol=1e-12)


@hypothesis.given(questions())
@hypothesis.settings(deadline=None)
def test_many_weights_at_once_are_each_by_itself(rows):
    scores, labels, groups, weights = rows
    several = np.stack([weights, np.ones(len(weights)), weights[::-1]])
    together = all_metrics(scores, labels, groups, several)
    for index in range(len(several)):
        np.testing.assert_allclose(together[:, index], all_metrics(scores, labels, groups, several[index]), atol=1e-12)


@pytest.mark.filterwarnings("error")
def test_what_is_not_defined_is_nan():
    scores, groups = np.array([0.2, 0.4]), np.zeros(2, int)
    one_class, nothing = np.zeros(2, int), np.zeros(2)
    assert np.isnan(all_metrics(scores, one_class, groups, np.ones(2))).tolist() == [True, False, True, False]
    assert np.isnan(all_metrics(scores, np.array([0, 1]), groups, nothing)).all()
