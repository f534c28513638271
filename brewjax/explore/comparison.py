"""`compare`: two rankings of the same items, by two notes, styles, models or members. What moved, and by how much?"""

from __future__ import annotations

import dataclasses
import html
from typing import TYPE_CHECKING

import numpy as np
import scipy.stats

from brewjax.explore.context import Context

if TYPE_CHECKING:
    import pandas as pd

TOP = 10


@dataclasses.dataclass(frozen=True, repr=False)
class RankingChange:
    """Two rankings of the items that both rank.

    Attributes:
      items, titles: of the items, in the order of the second ranking.
      before, after: int64 [items], ranks from 1 among these items.
      log_odds_before, log_odds_after: float64 [items], of the label of the highest value.
    """

    items: list[str]
    titles: list[str]
    before: np.ndarray
    after: np.ndarray
    log_odds_before: np.ndarray
    log_odds_after: np.ndarray

    @property
    def correlation(self) -> float:
        """Spearman's rank correlation; NaN for one item."""
        if len(self.items) < 2:
            return float("nan")
        return float(scipy.stats.spearmanr(self.before, self.after).statistic)

    @property
    def overlap(self) -> int:
        """How many of the first ten items are among the first ten of both."""
        return int(((self.before <= TOP) & (self.after <= TOP)).sum())

    def table(self) -> pd.DataFrame:
        """The items as a table, those first that moved most: ranks, places moved up, log-odds and their change."""
        import pandas as pd

        up = self.before - self.after
        table = pd.DataFrame(
            {
                "item": self.items,
                "title": self.titles,
                "before": self.before,
                "after": self.after,
                "up": up,
                "log_odds": self.log_odds_after,
                "change": self.log_odds_after - self.log_odds_before,
            }
        )
        return table.iloc[np.argsort(-np.abs(up), kind="stable")].reset_index(drop=True)

    def summary(self) -> str:
        """The rank correlation, the overlap of the first ten, and the mean change of the log-odds."""
        top = min(TOP, len(self.items))
        change = self.log_odds_after - self.log_odds_before
        return (
            f"{len(self.items)} items: rank correlation {self.correlation:.3f}, {self.overlap} of the first {top} stay "
            f"among the first {top}, log-odds change by {change.mean():+.3f} on average "
            f"(standard deviation {change.std():.3f})"
        )

    def __repr__(self) -> str:
        return f"{self.summary()}\n{self.table().head(TOP)}"

    def _repr_html_(self) -> str:
        return f"<p>{html.escape(self.summary())}</p>{self.table().head(TOP)._repr_html_()}"  # type: ignore[operator]


def compare(before: Context, after: Context) -> RankingChange:
    """Compares the rankings of the items that are candidates of both.

    Args:
      before, after: of one dataset, or of two that share ids; they may differ in model, member, task, note or style.

    Raises:
      ValueError: no item is a candidate of both.
    """
    shared = [item for item in after.item_ids if item in set(before.item_ids)]
    if not shared:
        raise ValueError("no item is a candidate of both rankings")
    old, new = (_select(context, shared) for context in (before, after))
    order = np.argsort(new[0], kind="stable")
    return RankingChange(
        [shared[index] for index in order],
        [after.titles[after.find(shared[index])] for index in order],
        old[0][order],
        new[0][order],
        old[1][order],
        new[1][order],
    )


def _select(context: Context, items: list[str]) -> tuple[np.ndarray, np.ndarray]:
    """The rank from 1 among these items, and the log-odds, of each of them."""
    places = {item: place for place, item in enumerate(context.item_ids)}
    indices = np.array([places[item] for item in items])
    place_in_order = np.empty(len(context.order), np.int64)
    place_in_order[context.order] = np.arange(len(context.order))
    ranks = np.argsort(np.argsort(place_in_order[indices])) + 1
    return ranks, context.log_odds[indices]
