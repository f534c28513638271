"""Worklists: which blocks of queries meet which blocks of keys, from a few facts about each block."""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Int

from pallas_kernels.token_labels import ALL, PADDING, QUESTIONS, SELF, TokenLabels


class BlockVisibility(NamedTuple):
    """Of each pair of a query tile and a key tile: whether a query sees a key, and whether every query sees every key.

    Padding among the queries does not count: nobody asks what it sees. `some` is never false where there is one,
    `every` never true where there is not; both are tight where examples and pieces are contiguous.
    """

    any: Bool[Array, "B NQ NK"]
    all: Bool[Array, "B NQ NK"]


class Worklist(NamedTuple):
    """The visits, `length` of them: which query block meets which key block, blocks of all rows counted through.

    Attributes:
      kind: what a kernel does there; `EVERY` where every query sees every key.
    """

    q_block: Int[Array, " M"]
    kv_block: Int[Array, " M"]
    kind: Int[Array, " M"]
    length: Int[Array, ""]


FULL_BLOCK = -1


def block_visibility(
    q: TokenLabels, kv: TokenLabels, q_start: Int[Array, ""] | int, q_tile: int, kv_tile: int, q_repeats: int = 1
) -> BlockVisibility:
    """What tiles of T queries see of tiles of S keys; query 0 stands at place `q_start` of the keys' row.

    T divides by `q_tile`, S by `kv_tile`. Costs O(tokens) for the facts and O(tiles^2) for the answer.

    Args:
      q_repeats: how often each query stands in `q`, one after the other: once for each head of a group, say.
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
    """The least and the greatest of a label among the real tokens of each tile; `low` > `high` where there is none."""

    low: Int[Array, "*B N"]
    high: Int[Array, "*B N"]

    def overlaps(self, bounds: Bounds) -> Bool[Array, "*B NQ NK"]:
        return (self.low <= bounds.high) & (bounds.low <= self.high)

    def same_constant(self, bounds: Bounds) -> Bool[Array, "*B NQ NK"]:
        return (self.low == self.high) & (bounds.low == bounds.high) & (self.low == bounds.low)


class _TileSummary(NamedTuple):
    """Of each tile: bounds of its labels, whether it has no padding, its first and its last place in the row."""

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
    """The pairs of blocks with a `kind` other than 0, of which there are `most` at most.

    Each query block's are together, or each key block's.
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
    """Of each block of queries, which blocks of keys of its row it meets; or of each block of keys, which of queries.

    Attributes:
      blocks: `whole` of them in which every query sees every key, then those with some, `met` in all; then others.
    """

    indices: Int[Array, "B N M"]
    num_full: Int[Array, "B N"]
    num_active: Int[Array, "B N"]


def block_table(blocks: BlockVisibility, by_key: bool = False) -> BlockTable:
    """For kernels that go through the visits of a block in a loop of their own, where a `worklist` is a grid."""
    any_visible, all_visible = (x.mT for x in blocks) if by_key else blocks
    count = any_visible.shape[2]
    rank = jnp.where(all_visible, 0, jnp.where(any_visible, 1, 2))
    order = jax.lax.sort(rank * count + jnp.arange(count)) % count
    return BlockTable(order, all_visible.sum(-1, dtype=jnp.int32), any_visible.sum(-1, dtype=jnp.int32))
