"""OSSCAR: which rows of a matrix to remove, and new values of the others, such that its products change least.

Meng et al. 2024 (arXiv 2403.12983): with calibration inputs X, keep a set S of the rows of W, and re-solve them:

    min over S, U of ||X W - X_S U||^2,  that is  tr((W - U)^T H (W - U)) with H = X^T X and U zero outside of S.

Rows are kept or removed in groups: one neuron, or the outputs of a KV head's query heads. H is damped: a share of its
mean diagonal is added to its diagonal, which pulls U towards W. Computed on the host, in float64.

Axis letters: N rows of a matrix, D its columns, G groups, S rows that are kept, M groups that move (docs/glossary.md,
"Axis letters").
"""

from __future__ import annotations

import numpy as np
import scipy.linalg
from jaxtyping import Bool, Float, Int

ROUNDS = 256  # of removals, at most: if more groups must go, several are removed in each round


def damp(gram: Float[np.ndarray, "N N"], damping: float) -> Float[np.ndarray, "N N"]:
    """H = X^T X plus `damping` times its mean diagonal, in float64: positive definite."""
    H = np.array(gram, np.float64)
    H[np.diag_indices_from(H)] += damping * (np.mean(np.diag(H)) or 1.0)
    return H


def group_rows(groups: Int[np.ndarray, " S"], size: int) -> Int[np.ndarray, " S*size"]:
    """The rows of groups of `size` rows each."""
    return (groups[:, None] * size + np.arange(size)).reshape(-1)


def choose(
    H: Float[np.ndarray, "N N"], weight: Float[np.ndarray, "N D"], size: int, keep: int, swaps: int
) -> Int[np.ndarray, " keep"]:
    """Chooses the groups to keep, by greedy removals and then exchanges.

    An exchange takes back the removed group that lowers the objective most, and removes the group that then costs
    least: the objective never rises.

    Args:
      H: X^T X, damped.
      weight: the matrix.
      size: rows of a group.
      keep: groups to keep.
      swaps: limit of exchanges.

    Returns:
      The groups to keep, in order.
    """
    subset = Subset(H, weight, size)
    excess = len(subset.is_kept) - keep
    per_round = -(-excess // ROUNDS)
    while (excess := int(subset.is_kept.sum()) - keep) > 0:
        costs = np.where(subset.is_kept, subset.scores(), np.inf)
        subset.move(np.argsort(costs, kind="stable")[: min(per_round, excess)])
    removed = _rank_removed(subset)
    for _ in range(swaps):
        if not removed:
            break
        returned = removed.pop(0)
        subset.move(np.array([returned]))
        worst = int(np.argmin(np.where(subset.is_kept, subset.scores(), np.inf)))
        subset.move(np.array([worst]))
        if worst != returned:
            removed = _rank_removed(subset)
    return np.flatnonzero(subset.is_kept)


def _rank_removed(subset: Subset) -> list[int]:
    """The removed groups, those that would lower the objective most first."""
    gains = np.where(subset.is_kept, -np.inf, subset.scores())
    return np.argsort(-gains, kind="stable")[: int(np.sum(~subset.is_kept))].tolist()


def resolve(
    H: Float[np.ndarray, "N N"], weight: Float[np.ndarray, "N D"], rows: Int[np.ndarray, " S"]
) -> Float[np.ndarray, "S D"]:
    """New values of the kept rows, such that the products change least."""
    return scipy.linalg.solve(H[np.ix_(rows, rows)], H[rows] @ weight, assume_a="pos")


def lost_share(
    H: Float[np.ndarray, "N N"],
    weight: Float[np.ndarray, "N D"],
    rows: Int[np.ndarray, " S"],
    remaining: Float[np.ndarray, "S D"],
) -> float:
    """The share of the squared products that is lost: tr((W - U)^T H (W - U)) / tr(W^T H W)."""
    change = np.array(weight, np.float64)
    change[rows] -= remaining
    total = np.vdot(weight, H @ weight)
    return float(np.vdot(change, H @ change) / total) if total else 0.0


class Subset:
    """A subset of the groups, at first all, and how the objective would change if a group changed sides.

    The state is H swept on the kept rows S (Goodnight 1979), and H W with it; R are the removed rows:

        pivots = [[-P, P H_SR], [H_RS P, H_RR - H_RS P H_SR]] with P the inverse of H_SS,  rest = [U, H_R (W - U)].

    Moving a group is then one update of low rank, to either side.
    """

    def __init__(self, H: Float[np.ndarray, "N N"], weight: Float[np.ndarray, "N D"], size: int):
        self.size = size
        self.is_kept: Bool[np.ndarray, " G"] = np.ones(len(H) // size, bool)
        self.pivots = -scipy.linalg.cho_solve(scipy.linalg.cho_factor(H), np.eye(len(H)))
        self.rest = np.array(weight, np.float64)

    def scores(self) -> Float[np.ndarray, " G"]:
        """The rise of the objective without each kept group, and its fall with each removed group."""
        G, b = len(self.is_kept), self.size
        each = np.arange(G)
        blocks = self.pivots.reshape(G, b, G, b)[each, :, each] * np.where(self.is_kept, -1, 1)[:, None, None]
        rest = self.rest.reshape(G, b, -1)
        solved = rest / blocks if b == 1 else np.linalg.solve(blocks, rest)
        return np.einsum("gbd,gbd->g", rest, solved)

    def move(self, groups: Int[np.ndarray, " M"]) -> None:
        """Removes groups that are all kept, or takes back groups that are all removed."""
        rows, sign = group_rows(groups, self.size), -1 if self.is_kept[groups[0]] else 1
        inverse = np.linalg.inv(self.pivots[np.ix_(rows, rows)])
        across = self.pivots[rows]
        solved, solved_rest = inverse @ across, inverse @ self.rest[rows]
        self.pivots -= across.T @ solved
        self.rest -= across.T @ solved_rest
        self.pivots[rows], self.pivots[:, rows] = sign * solved, sign * solved.T
        self.pivots[np.ix_(rows, rows)] = -inverse
        self.rest[rows] = sign * solved_rest
        self.is_kept[groups] = sign > 0
