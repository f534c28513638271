"""Vectors of members and items by time, which another model made: what the fact `similarity` multiplies.

A Parquet file of the dataset's folder has a row for each vector: `side` ("member" or "item"), `id`, `time` from which
on the vector is known, `encoder`, whose vectors alone may be compared, and `vector`, all of one size.
"""

from __future__ import annotations

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from brewjax.config import ConfigError
from brewjax.data.tables.dataset import Dataset
from brewjax.data.tables.reading import TEXT, UnreadableError, open_table, plain
from brewjax.data.tables.union import included_folders
from brewjax.data.tables.union_tables import with_name

SCHEMA = {"side": TEXT, "id": TEXT, "time": pa.timestamp("us"), "encoder": TEXT}
MEMBER, ITEM = "member", "item"
VECTORS = "vectors.parquet"  # where `brewjax retrieve vectors` writes them
BLOCK_ROWS = 1 << 15  # products computed at a time


class Similarities:
    """Inner products of members' and items' vectors, each the latest that was known at a time.

    Args:
      dataset: the tables.
      file: in its folder; of a union, in that of a dataset whose name is in front.

    Raises:
      ConfigError: the file is unreadable, a column is missing or of another type, or vectors differ in size.
    """

    def __init__(self, dataset: Dataset, file: str):
        folder, origin = dataset.path, ""
        if "" not in dataset.card.origins:
            origin, _, file = file.partition(".")
            folder = included_folders(folder)[origin]
        path = folder / file
        try:
            table, _ = open_table(folder, file)
        except UnreadableError as error:
            raise ConfigError(f"{path}: {error}; `brewjax retrieve vectors` writes it") from None
        if missing := [name for name in (*SCHEMA, "vector") if name not in table.column_names]:
            raise ConfigError(f"{path}: no column {', '.join(missing)}; there are: {', '.join(table.column_names)}")
        try:
            columns = {name: plain(table[name]).cast(type_).combine_chunks() for name, type_ in SCHEMA.items()}
        except pa.ArrowInvalid as error:
            raise ConfigError(f"{path}: {error}") from None
        sizes = pc.list_value_length(table["vector"])
        if len(table) and (sizes.null_count or pc.min(sizes) != pc.max(sizes)):
            raise ConfigError(f"{path}: its vectors are not all of one size")
        vectors = pc.list_flatten(table["vector"]).cast(pa.float32()).to_numpy()
        self._vectors = vectors.reshape(len(table), sizes[0].as_py() if len(table) else 0)
        self._encoder = columns["encoder"].dictionary_encode().indices.to_numpy()
        side, time = columns["side"], columns["time"].cast(pa.int64()).to_numpy()
        self._members = _Latest(pc.equal(side, MEMBER), columns["id"], time, dataset.members[dataset.card.members.id])
        item_ids = with_name(origin, columns["id"]) if origin else columns["id"]
        self._items = _Latest(pc.equal(side, ITEM), item_ids, time, dataset.items[dataset.card.items.id])

    def products(self, members: np.ndarray, items: np.ndarray, times: np.ndarray) -> np.ndarray:
        """Multiplies the vectors of pairs.

        Args:
          members: int [rows], rows of the members table.
          items: int [rows], rows of the items table.
          times: int64 [rows], microseconds since 1970.

        Returns:
          float64 [rows]; NaN where one of the two has no vector yet, or their latest are of two encoders.
        """
        member, item = self._members.rows(members, times), self._items.rows(items, times)
        known = np.flatnonzero((member >= 0) & (item >= 0))
        known = known[self._encoder[member[known]] == self._encoder[item[known]]]
        products = np.full(len(times), np.nan)
        for start in range(0, len(known), BLOCK_ROWS):
            rows = known[start : start + BLOCK_ROWS]
            left, right = (self._vectors[side[rows]].astype(np.float64) for side in (member, item))
            products[rows] = (left * right).sum(1)  # each row by itself: the same bits in any company
        return products


class _Latest:
    """The latest row of a table for each member, or each item, as of a time."""

    def __init__(self, chosen: pa.Array, ids: pa.Array, time: np.ndarray, entities: pa.ChunkedArray):
        entity = pc.index_in(ids, plain(entities).cast(TEXT).combine_chunks())
        rows = np.flatnonzero(pc.and_(chosen, entity.is_valid()).to_numpy(zero_copy_only=False))
        entity, time = pc.fill_null(entity, -1).to_numpy()[rows], time[rows]
        self._moments = np.unique(time)
        key = self._key(entity, np.searchsorted(self._moments, time) + 1)
        order = np.argsort(key, kind="stable")  # of two vectors of one time, the one that is further down counts
        self._rows, self._keys = np.append(rows[order], -1), key[order]

    def _key(self, entity: np.ndarray, number: np.ndarray | int) -> np.ndarray:
        """Entity, and the number of moments until a time, as one ascending number."""
        return entity.astype(np.int64) * (len(self._moments) + 1) + number

    def rows(self, entities: np.ndarray, times: np.ndarray) -> np.ndarray:
        """int64 [n], rows of the table; -1 where there is none yet."""
        key = self._key(entities, np.searchsorted(self._moments, times, side="right"))
        at = np.searchsorted(self._keys, key, side="right") - 1
        is_own = (at >= 0) & (self._keys[at] >= self._key(entities, 0)) if len(self._keys) else np.zeros(len(at), bool)
        return np.where(is_own, self._rows[at], -1)
