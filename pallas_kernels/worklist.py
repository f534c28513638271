"""Worklists: which blocks of queries meet which blocks of keys, from a few facts about each block."""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Int

from pallas_kernels.segments import ALL, PADDING, QUESTIONS, SELF, Segments


class Sight(NamedTuple):
    """Of each pair of a query tile and a key tile: whether a query sees a key, and whether every query sees every key.

    Padding among the queries does not count: nobody asks what it sees. `some` is never false where there is one,
    `every` never true where there is not; both are tight where examples and segments are contiguous.
    """

    some: Bool[Array, "B NQ NK"]
    every: Bool[Array, "B NQ NK"]


class Worklist(NamedTuple):
    """The visits, `length` of them: which query block meets which key block, blocks of all rows counted through.

    Attributes:
      kind: what a kernel does there; `EVERY` where every query sees every key.
    """

    q_block: Int[Array, " M"]
    kv_block: Int[Array, " M"]
    kind: Int[Array, " M"]
    length: Int[Array, ""]


EVERY = -1


def sight(
    q: Segments, kv: Segments, q_start: Int[Array, ""] | int, q_tile: int, kv_tile: int, q_repeats: int = 1
) -> Sight:
    """What tiles of T queries see of tiles of S keys; query 0 stands at place `q_start` of the keys' row.

    T divides by `q_tile`, S by `kv_tile`. Costs O(tokens) for the facts and O(tiles^2) for the answer.

    Args:
      q_repeats: how often each query stands in `q`, one after the other: once for each head of a group, say.
    """
    q_facts = jax.tree.map(lambda x: x[..., :, None], _facts(q, q_tile, q_start, q_repeats))
    kv_facts = jax.tree.map(lambda x: x[..., None, :], _facts(kv, kv_tile, 0))
    some, every = (
        (kv_reach == ALL) | ((kv_reach == QUESTIONS) & (q_reach == SELF))
        for q_reach, kv_reach in (
            (q_facts.reach.low, kv_facts.reach.high),
            (q_facts.reach.high, kv_facts.reach.low),
        )
    )
    some = (
        q_facts.example.meets(kv_facts.example)
        & (kv_facts.first <= q_facts.last)
        & (q_facts.segment.meets(kv_facts.segment) | some)
    )
    every = (
        q_facts.example.is_one(kv_facts.example)
        & (kv_facts.last <= q_facts.first)
        & (q_facts.segment.is_one(kv_facts.segment) | every)
        & kv_facts.whole
    )
    return Sight(some, every)


class Bounds(NamedTuple):
    """The least and the greatest of a label among the real tokens of each tile; `low` > `high` where there is none."""

    low: Int[Array, "*B N"]
    high: Int[Array, "*B N"]

    def meets(self, other: Bounds) -> Bool[Array, "*B NQ NK"]:
        return (self.low <= other.high) & (other.low <= self.high)

    def is_one(self, other: Bounds) -> Bool[Array, "*B NQ NK"]:
        return (self.low == self.high) & (other.low == other.high) & (self.low == other.low)


class _Facts(NamedTuple):
    """Of each tile: bounds of its labels, whether it has no padding, its first and its last place in the row."""

    example: Bounds
    segment: Bounds
    reach: Bounds
    whole: Bool[Array, "*B N"]
    first: Int[Array, " N"]
    last: Int[Array, " N"]


def _facts(segments: Segments, tile: int, start: Array | int, repeats: int = 1) -> _Facts:
    tiled = [jnp.asarray(x).reshape(*x.shape[:-1], -1, tile) for x in segments]
    real = tiled[0] != PADDING
    most = jnp.iinfo(jnp.int32).max
    example, segment, reach = (Bounds(jnp.where(real, x, most).min(-1), jnp.where(real, x, -1).max(-1)) for x in tiled)
    first = jnp.arange(real.shape[-2]) * tile
    first, last = (start + n // repeats for n in (first, first + tile - 1))
    return _Facts(example, segment, reach, real.all(-1), first, last)


def worklist(kind: Int[Array, "B NQ NK"] | Bool[Array, "B NQ NK"], most: int, by_key: bool = False) -> Worklist:
    """The pairs of blocks with a `kind` other than 0, of which there are `most` at most.

    Each query block's are together, or each key block's.
    """
    _, NQ, NK = kind.shape
    if by_key:
        kind = kind.transpose(0, 2, 1)
    across = kind.shape[2]
    flat = kind.reshape(-1)
    # A sort, because a scatter of every pair would be done one by one on a TPU.
    visits = jax.lax.sort(jnp.where(flat != 0, jnp.arange(flat.size), flat.size))[:most]
    visits = jnp.minimum(visits, flat.size - 1)  # beyond `length`: anything that is there
    outer, inner = visits // across, visits // (NQ * NK) * across + visits % across
    q_block, kv_block = (inner, outer) if by_key else (outer, inner)
    return Worklist(q_block, kv_block, flat[visits], jnp.sum(flat != 0))


class Meetings(NamedTuple):
    """Of each block of queries, which blocks of keys of its row it meets; or of each block of keys, which of queries.

    Attributes:
      blocks: `whole` of them in which every query sees every key, then those with some, `met` in all; then others.
    """

    blocks: Int[Array, "B N M"]
    whole: Int[Array, "B N"]
    met: Int[Array, "B N"]


def meetings(blocks: Sight, by_key: bool = False) -> Meetings:
    """For kernels that go through the visits of a block in a loop of their own, where a `worklist` is a grid."""
    some, every = (x.mT for x in blocks) if by_key else blocks
    count = some.shape[2]
    rank = jnp.where(every, 0, jnp.where(some, 1, 2))
    order = jax.lax.sort(rank * count + jnp.arange(count)) % count
    return Meetings(order, every.sum(-1, dtype=jnp.int32), some.sum(-1, dtype=jnp.int32))
