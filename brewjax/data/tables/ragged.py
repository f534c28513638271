"""Columns of categories and lists as integer codes: the values of each row, ragged."""

from __future__ import annotations

import dataclasses

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from brewjax.data.tables.reading import TEXT


@dataclasses.dataclass(frozen=True)
class Ragged:
    """The values of each row of a table: row r has codes[offsets[r] : offsets[r + 1]].

    Attributes:
      offsets: int64 [rows + 1].
      codes: int64 [values], 0 for the most frequent value.
      names: the value of each code.
    """

    offsets: np.ndarray
    codes: np.ndarray
    names: list[str]

    @classmethod
    def read(cls, table: pa.Table, column: str) -> Ragged:
        """Reads the values of a category or list.

        Args:
          table: of members or items.
          column: of categories or lists; an unknown value is none.

        Returns:
          The values of each row, of a list in its order.
        """
        values = table[column].combine_chunks()
        if pa.types.is_list(values.type):
            parents, flat = pc.list_parent_indices(values), pc.list_flatten(values)
        else:
            parents, flat = pa.array(np.arange(len(values))), values
        known = pc.is_valid(flat)
        parents, flat = parents.filter(known).to_numpy(), flat.filter(known).cast(TEXT).to_numpy(False)
        names, codes, counts = np.unique(flat.astype(str), return_inverse=True, return_counts=True)
        frequency_order = np.argsort(-counts, kind="stable")
        rank = np.empty(len(names), np.int64)
        rank[frequency_order] = np.arange(len(names))
        offsets = np.searchsorted(parents, np.arange(len(values) + 1))
        return cls(offsets, rank[codes], names[frequency_order].tolist())

    def expand(self, rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Lists the values of some rows.

        Args:
          rows: int [n], in any order, also twice.

        Returns:
          Two int64 arrays with an entry for each value of each row: the index into `rows`, and the value's code.
        """
        sizes = self.offsets[rows + 1] - self.offsets[rows]
        index = np.repeat(np.arange(len(rows)), sizes)
        within = np.arange(len(index)) - np.repeat(np.cumsum(sizes) - sizes, sizes)
        return index, self.codes[self.offsets[rows][index] + within]

    def rows_by_code(self) -> tuple[np.ndarray, np.ndarray]:
        """Sorts the rows by value.

        Returns:
          `rows`, int64 [values], and `starts`, int64 [codes + 1]: the rows with a value are
          rows[starts[code] : starts[code + 1]], in ascending order.
        """
        rows = np.repeat(np.arange(len(self.offsets) - 1), np.diff(self.offsets))
        order = np.argsort(self.codes, kind="stable")
        return rows[order], np.searchsorted(self.codes[order], np.arange(len(self.names) + 1))
