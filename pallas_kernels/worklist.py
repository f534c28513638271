"""Which blocks of queries must be computed against which blocks of keys, from summaries of each block's labels.

Axis letters: NQ and NK tiles of queries and keys, M visits (docs/glossary.md, "Axis letters").
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Int

from pallas_kernels.token_labels import ALL, PADDING, QUESTIONS, SELF, TokenLabels


class BlockVisibility(NamedTuple):
    """For each pair of a query tile and a key tile: may any, and may all, of the queries attend to the keys.

    Padding queries are ignored: their outputs are undefined. Both fields are conservative: `any` may be true needlessly
    and `all` false needlessly, never the reverse. They are exact where examples and pieces are contiguous.

    Attributes:
      any: some query may attend to some key.
      all: every query attends to every key, so that no mask is needed.
    """

    any: Bool[Array, "B NQ NK"]
    all: Bool[Array, "B NQ NK"]


class Worklist(NamedTuple):
    """The pairs of blocks that a kernel computes, as a grid of visits.

    Attributes:
      q_block, kv_block: indices of the blocks, numbered through all rows.
      kind: what the kernel does in the visit; `FULL_BLOCK` where no mask is needed.
      length: how many of the M entries are visits; the rest repeat valid ones and are not run.
    """

    q_block: Int[Array, " M"]
    kv_block: Int[Array, " M"]
    kind: Int[Array, " M"]
    length: Int[Array, ""]


FULL_BLOCK = -1  # the kind of a visit in which every query attends to every key


def block_visibility(
    q: TokenLabels, kv: TokenLabels, q_start: Int[Array, ""] | int, q_tile: int, kv_tile: int, q_repeats: int = 1
) -> BlockVisibility:
    """Which tiles of T queries attend to which tiles of S keys, in O(tokens + tiles^2).

    Args:
      q, kv: labels [B, T] and [B, S].
      q_start: index of query 0 in the row of the keys.
      q_tile, kv_tile: tokens in a tile; they divide T and S.
      q_repeats: how many times in succession each query stands in `q`: once for each head of a group, for example.

    Returns:
      bool [B, T / q_tile, S / kv_tile], twice.
    """
    q_tiles = jax.tree.map(lambda x: x[..., :, None], _summarize_tiles(q, q_tile, q_start, q_repeats))
    kv_tiles = jax.tree.map(lambda x: x[..., None, :], _summarize_tiles(kv, kv_tile, 0))
    any_visible, all_visible = (
        (kv_visibility == ALL) | ((kv_visibility == QUESTIONS) & (q_visibility == SELF))
        for q_visibility, kv_visibility in (
            (q_tiles.visibility.low, kv_tiles.visibility.high),
            (q_tiles.visibility.high, kv_tiles.visibility.low),
        )
    )
    any_visible = (
        q_tiles.example_id.overlaps(kv_tiles.example_id)
        & (kv_tiles.first <= q_tiles.last)
        & (q_tiles.piece_id.overlaps(kv_tiles.piece_id) | any_visible)
    )
    all_visible = (
        q_tiles.example_id.same_constant(kv_tiles.example_id)
        & (kv_tiles.last <= q_tiles.first)
        & (q_tiles.piece_id.same_constant(kv_tiles.piece_id) | all_visible)
        & kv_tiles.no_padding
    )
    return BlockVisibility(any_visible, all_visible)


class Bounds(NamedTuple):
    """The least and the greatest label among each tile's real tokens; `low` > `high` if a tile is all padding."""

    low: Int[Array, "*B N"]
    high: Int[Array, "*B N"]

    def overlaps(self, bounds: Bounds) -> Bool[Array, "*B NQ NK"]:
        """Whether two tiles may have a label in common."""
        return (self.low <= bounds.high) & (bounds.low <= self.high)

    def same_constant(self, bounds: Bounds) -> Bool[Array, "*B NQ NK"]:
        """Whether both tiles have one and the same label throughout."""
        return (self.low == self.high) & (bounds.low == bounds.high) & (self.low == bounds.low)


class _TileSummary(NamedTuple):
    """For each tile: bounds of its labels, whether it has no padding, the first and the last index in the row."""

    example_id: Bounds
    piece_id: Bounds
    visibility: Bounds
    no_padding: Bool[Array, "*B N"]
    first: Int[Array, " N"]
    last: Int[Array, " N"]


def _summarize_tiles(token_labels: TokenLabels, tile: int, start: Array | int, repeats: int = 1) -> _TileSummary:
    tiled = [jnp.asarray(x).reshape(*x.shape[:-1], -1, tile) for x in token_labels]
    real = tiled[0] != PADDING
    largest = jnp.iinfo(jnp.int32).max
    example_id, piece_id, visibility = (
        Bounds(jnp.where(real, x, largest).min(-1), jnp.where(real, x, -1).max(-1)) for x in tiled
    )
    first = jnp.arange(real.shape[-2]) * tile
    first, last = (start + n // repeats for n in (first, first + tile - 1))
    return _TileSummary(example_id, piece_id, visibility, real.all(-1), first, last)


def worklist(kind: Int[Array, "B NQ NK"] | Bool[Array, "B NQ NK"], max_visits: int, by_key: bool = False) -> Worklist:
    """The visits of the pairs of blocks whose `kind` is not 0.

    Args:
      kind: of each pair; 0 where there is nothing to compute.
      max_visits: an upper limit of how many are not 0; the length M of the arrays.
      by_key: visits of one key block follow each other, instead of those of one query block.
    """
    _, NQ, NK = kind.shape
    if by_key:
        kind = kind.transpose(0, 2, 1)
    across = kind.shape[2]
    flat = kind.reshape(-1)
    # A sort, because a scatter of every pair would be done one by one on a TPU.
    visits = jax.lax.sort(jnp.where(flat != 0, jnp.arange(flat.size), flat.size))[:max_visits]
    visits = jnp.minimum(visits, flat.size - 1)  # beyond `length`: anything that is there
    outer, inner = visits // across, visits // (NQ * NK) * across + visits % across
    q_block, kv_block = (inner, outer) if by_key else (outer, inner)
    return Worklist(q_block, kv_block, flat[visits], jnp.sum(flat != 0))


class BlockTable(NamedTuple):
    """For each query block, the key blocks of its row to compute; or for each key block, the query blocks.

    Attributes:
      indices: first the `num_full` blocks that need no mask, then those that do, up to `num_active`; then the rest of
        the row, which is not computed.
      num_full, num_active: how many of each.
    """

    indices: Int[Array, "B N M"]
    num_full: Int[Array, "B N"]
    num_active: Int[Array, "B N"]


def block_table(blocks: BlockVisibility, by_key: bool = False) -> BlockTable:
    """A table for kernels that loop over the visits of a block themselves, where a `worklist` is their grid.

    Args:
      blocks: of pairs of blocks.
      by_key: a table of query blocks for each key block.
    """
    any_visible, all_visible = (x.mT for x in blocks) if by_key else blocks
    count = any_visible.shape[2]
    rank = jnp.where(all_visible, 0, jnp.where(any_visible, 1, 2))
    order = jax.lax.sort(rank * count + jnp.arange(count)) % count
    return BlockTable(order, all_visible.sum(-1, dtype=jnp.int32), any_visible.sum(-1, dtype=jnp.int32))
