import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from brewjax.compress import least_squares
from brewjax.compress.least_squares import Subset, choose, damp, group_rows, lost_share, resolve

SIZES = pytest.mark.parametrize(("groups", "size"), [(12, 1), (5, 3)])


def draw(seed: int, rows: int, columns: int = 4) -> tuple[np.ndarray, np.ndarray]:
    """X^T X of inputs that depend on each other, damped, and a matrix."""
    random = np.random.default_rng(seed)
    X = random.standard_normal((4 * rows, rows)) @ random.standard_normal((rows, rows))
    return damp(X.T @ X, 0.01), random.standard_normal((rows, columns))


def best(H: np.ndarray, W: np.ndarray, rows: np.ndarray) -> tuple[np.ndarray, float]:
    """What remains, and the objective, by an ordinary least-squares solver: H = R^T R."""
    R = np.linalg.cholesky(H).T
    U = np.linalg.lstsq(R[:, rows], R @ W)[0]
    return U, float(np.sum((R @ W - R[:, rows] @ U) ** 2))


@SIZES
@settings(deadline=None, max_examples=20)
@given(seed=st.integers(0, 10**6), moves=st.lists(st.integers(0, 11), max_size=12))
def test_a_subset_stays_the_least_squares_solution_whatever_moves(groups, size, seed, moves):
    H, W = draw(seed, groups * size)
    subset = Subset(H, W, size)
    for group in moves:
        if subset.is_kept.sum() > 1 or not subset.is_kept[group % groups]:
            subset.move(np.array([group % groups]))
    rows = group_rows(np.flatnonzero(subset.is_kept), size)
    U, objective = best(H, W, rows)
    np.testing.assert_allclose(subset.rest[rows], U, rtol=1e-6, atol=1e-8)
    np.testing.assert_allclose(resolve(H, W, rows), U, rtol=1e-6, atol=1e-8)
    for group, score in enumerate(subset.scores()):
        without = np.setdiff1d(np.flatnonzero(subset.is_kept), group)
        toggled = without if subset.is_kept[group] else np.append(without, group)
        if len(toggled):
            change = abs(best(H, W, group_rows(toggled, size))[1] - objective)
            np.testing.assert_allclose(score, change, rtol=1e-6, atol=1e-8 * objective + 1e-8)


@SIZES
def test_several_at_once_are_as_one_after_the_other(groups, size):
    H, W = draw(0, groups * size)
    together, apart = Subset(H, W, size), Subset(H, W, size)
    together.move(np.array([3, 1]))
    for group in (1, 3):
        apart.move(np.array([group]))
    np.testing.assert_allclose(together.rest, apart.rest, atol=1e-9)
    np.testing.assert_allclose(together.pivots, apart.pivots, atol=1e-9)


@settings(deadline=None, max_examples=30)
@given(seed=st.integers(0, 10**6), keep=st.integers(1, 11), size=st.sampled_from([1, 2]))
def test_swaps_and_re_solving_are_never_for_the_worse(seed, keep, size):
    H, W = draw(seed, 12 * size)
    objectives = []
    for swaps in (0, 1, 3, 50):
        groups = choose(H, W, size, keep, swaps)
        assert len(groups) == keep
        assert list(groups) == sorted(set(groups))
        rows = group_rows(groups, size)
        objectives.append(lost_share(H, W, rows, resolve(H, W, rows)))
        assert objectives[-1] <= lost_share(H, W, rows, W[rows]) + 1e-12
    assert objectives == sorted(objectives, reverse=True) or np.ptp(objectives) < 1e-9


def test_most_choices_are_the_best_of_all():
    """Greedy removal with swaps against every subset there is."""
    ratios = []
    for seed in range(20):
        H, W = draw(seed, 9)
        rows = choose(H, W, 1, 4, 50)
        optimum = min(best(H, W, np.array(subset))[1] for subset in itertools.combinations(range(9), 4))
        ratios.append(best(H, W, rows)[1] / optimum)
    assert min(ratios) > 1 - 1e-6
    assert np.mean(np.array(ratios) < 1 + 1e-6) > 0.6
    assert max(ratios) < 1.5


def test_redundant_rows_go_without_a_trace():
    random = np.random.default_rng(0)
    X, W = random.standard_normal((200, 10)), random.standard_normal((10, 4))
    X = np.concatenate([X, X[:, :5], X[:, 5:] @ random.standard_normal((5, 3))], 1)  # doubles and mixtures
    W = np.concatenate([W, random.standard_normal((8, 4))])
    H = damp(X.T @ X, 1e-9)
    rows = choose(H, W, 1, 10, 10)
    np.testing.assert_allclose(X[:, rows] @ resolve(H, W, rows), X @ W, atol=1e-5)
    assert lost_share(H, W, rows, W[rows]) > 0.05


def test_many_go_in_rounds(monkeypatch):
    H, W = draw(1, 40)
    one_by_one = choose(H, W, 1, 10, 0)
    monkeypatch.setattr(least_squares, "ROUNDS", 8)
    in_rounds = choose(H, W, 1, 10, 0)
    assert len(in_rounds) == 10
    assert best(H, W, in_rounds)[1] >= best(H, W, one_by_one)[1] * 0.5  # other rows, of the same kind
    assert best(H, W, choose(H, W, 1, 10, 100))[1] <= best(H, W, one_by_one)[1]


def test_inputs_that_were_never_seen_are_no_division_by_zero():
    W = np.ones((4, 2))
    H = damp(np.zeros((4, 4)), 0.01)
    rows = choose(H, W, 1, 2, 5)
    assert np.isfinite(resolve(H, W, rows)).all()
    assert lost_share(np.zeros((4, 4)), W, rows, W[rows]) == 0
