"""`embed`: members or items as vectors, as a table and as a map of two dimensions."""

from __future__ import annotations

import dataclasses
import html
from typing import TYPE_CHECKING

import numpy as np
import pyarrow as pa
from jaxtyping import Float

from brewjax.config import suggest

if TYPE_CHECKING:
    import pandas as pd

    from brewjax.explore.plots import Plot

MAX_CATEGORIES = 8  # with a colour of their own; the rarer ones share one
RARE, UNKNOWN = "(rarer ones)", "(unknown)"


@dataclasses.dataclass(frozen=True, repr=False)
class Embeddings:
    """Vectors of members or of items, in the order in which they were named.

    Attributes:
      ids: of the members or items.
      names: of them, for people to read.
      vectors: float32 [N, D], of length 1: an inner product is a cosine.
      rows: their rows of the table, in the same order; its columns give a map its colours.
    """

    ids: tuple[str, ...]
    names: tuple[str, ...]
    vectors: Float[np.ndarray, "N D"]
    rows: pa.Table

    def __len__(self) -> int:
        return len(self.ids)

    def table(self) -> pd.DataFrame:
        """The vectors as a table: a row for each id, a column for each dimension."""
        import pandas as pd

        return pd.DataFrame(self.vectors, index=pd.Index(self.ids, name="id"))

    def project(self) -> tuple[Float[np.ndarray, "N 2"], float]:
        """Projects the vectors to their first two principal components.

        Returns:
          Centred coordinates, float64, and the share of the variance that they keep. The sign of a component is such
          that its largest coordinate is above 0, so that two runs give one map.
        """
        centred = self.vectors.astype(np.float64) - self.vectors.mean(0, dtype=np.float64)
        left, scale, _ = np.linalg.svd(centred, full_matrices=False)
        points = np.zeros((len(self), 2))
        components = left[:, :2] * scale[:2]
        points[:, : components.shape[1]] = components
        largest = points[np.abs(points).argmax(0), np.arange(2)]
        total = float((scale**2).sum())
        return points * np.where(largest < 0, -1, 1), float((scale[:2] ** 2).sum()) / total if total else 1.0

    def plot(self, colour: str | None = None) -> Plot:
        """Maps the vectors to two dimensions (principal components), with as many names as there is room for.

        Args:
          colour: a column of the table whose values colour the points; of a list, the first value.

        Raises:
          ValueError: the table has no such column.
        """
        from brewjax.explore.plots import plot_points

        points, share = self.project()
        title = f"{len(self)} embeddings; the two axes keep {share:.0%} of their variance"
        return plot_points(title, points, self.names, self._categories(colour) if colour else None)

    def _categories(self, column: str) -> list[str]:
        """The value of each row as text; those beyond the most frequent MAX_CATEGORIES are RARE."""
        if column not in self.rows.column_names:
            raise ValueError(f"no column '{column}'; {suggest(column, self.rows.column_names, listing='columns')}")
        first = [
            next(iter(value), None) if isinstance(value, list) else value for value in self.rows[column].to_pylist()
        ]
        texts = [UNKNOWN if value in (None, "") else str(value) for value in first]
        names, counts = np.unique(texts, return_counts=True)
        frequent = {*names[np.argsort(-counts, kind="stable")][:MAX_CATEGORIES].tolist()}
        return [text if text in frequent else RARE for text in texts]

    def __repr__(self) -> str:
        return f"Embeddings of {len(self)} in {self.vectors.shape[1]} dimensions\n{self.table().head()}"

    def _repr_html_(self) -> str:
        table = self.table().head()
        table.insert(0, "name", self.names[:5])
        text = f"{len(self)} embeddings in {self.vectors.shape[1]} dimensions"
        return f"<p>{html.escape(text)}</p>{table._repr_html_()}"  # type: ignore[operator]
