"""The plan of one call of the TPU attention kernels: chunks, blocks, tiles, visits, and the layout of arrays.

Axis letters as in `attention`, and M blocks of all rows, GC chunks of a group's heads, C queries in a chunk
(docs/glossary.md, "Axis letters").
"""

from __future__ import annotations

import dataclasses
from typing import Any

import jax.numpy as jnp
import numpy as np
from jax.experimental import pallas as pl
from jaxtyping import Array, Float, Int

from pallas_kernels.platform import tpu_info
from pallas_kernels.token_labels import TokenLabels
from pallas_kernels.worklist import FULL_BLOCK, block_visibility

CHUNKS = 4  # chunks of a head in a query block, at most
KEYS = 512  # keys in a block
TILE = 128  # tokens on a side of a tile
LABELS = 2  # int32 labels of a token: example_id and visibility packed into one, piece_id
VISIT_BYTES = 12  # scalars of a visit
SMEM_RESERVED = 8 << 10  # bytes of scalar memory that the compiler keeps for itself

Line = list[tuple[int, int]]
"""Some (query tile, key tile) pairs of a pair of blocks, no two with the same queries."""


@dataclasses.dataclass(frozen=True)
class AttentionPlan:
    """The shapes of one call.

    Attributes:
      B, K, D, T, S: rows, key-value heads, size of a head, queries and keys of a row.
      chunk: queries in a chunk.
      chunks: chunks of a head in a query block.
      group: query heads of one key-value head.
      keys: keys in a block.
    """

    B: int
    K: int
    D: int
    T: int
    S: int
    chunk: int
    chunks: int
    group: int
    keys: int

    @classmethod
    def of(cls, q: Array, k: Array, interpret: Any) -> AttentionPlan:
        """The plan for these shapes.

        Raises:
          ValueError: if the scalars of the visits may not fit the TPU's scalar memory.
        """
        B, T, H, D = q.shape
        S, K = k.shape[1:3]
        chunk = TILE if interpret else tpu_info().mxu_column_size
        chunks = pl.cdiv(T, chunk)
        chunks = pl.cdiv(chunks, pl.cdiv(chunks, CHUNKS))  # in as few blocks, with little of the last one empty
        plan = cls(B, K, D, T, S, chunk, chunks, H // K, min(KEYS, pl.cdiv(S, TILE) * TILE))
        size = plan.max_visits * VISIT_BYTES
        if not interpret and size > (space := tpu_info().smem_capacity_bytes - SMEM_RESERVED):
            raise ValueError(
                f"attention of {B} x {T:,} queries on {S:,} keys takes up to {plan.max_visits:,} visits of blocks of "
                f"{plan.queries} x {plan.keys}, {size:,} bytes of scalars, and this TPU holds {space:,}: "
                "shard the sequence, or give fewer rows at a time"
            )
        return plan

    @property
    def queries(self) -> int:
        """Queries of one head in a block."""
        return self.chunk * self.chunks

    @property
    def q_blocks(self) -> int:
        """Query blocks of a row."""
        return pl.cdiv(self.T, self.queries)

    @property
    def kv_blocks(self) -> int:
        """Key blocks of a row."""
        return pl.cdiv(self.S, self.keys)

    @property
    def max_visits(self) -> int:
        """An upper limit for all rows: a query block needs no keys behind its last query."""
        ends = (self.S - self.T + (n + 1) * self.queries for n in range(self.q_blocks))
        return self.B * sum(min(self.kv_blocks, pl.cdiv(end, self.keys)) for end in ends)

    @property
    def diagonals(self) -> list[Line]:
        """For each distance, the tiles whose key index is the query index plus that distance."""
        q_tiles, kv_tiles = range(self.queries // TILE), range(self.keys // TILE)
        return [
            [(a, a + distance) for a in q_tiles if a + distance in kv_tiles]
            for distance in range(1 - len(q_tiles), len(kv_tiles))
        ]

    @property
    def rows(self) -> list[Line]:
        """For each key tile, its pairs with all query tiles."""
        return [[(a, b) for a in range(self.queries // TILE)] for b in range(self.keys // TILE)]

    @property
    def lines(self) -> list[Line]:
        """Diagonals, then rows, in the order of the bits of a visit's kind."""
        return [*self.diagonals, *self.rows]

    @property
    def scale(self) -> float:
        """Factor on the scores."""
        return self.D**-0.5

    # The layout of arrays for the kernels, and back.

    def to_chunks(self, x: Float[Array, "B T H D"]) -> Float[Array, "K M GC D C"]:
        """Queries, transposed within chunks."""
        x = jnp.pad(x, ((0, 0), (0, self.q_blocks * self.queries - self.T), (0, 0), (0, 0)))
        x = x.reshape(self.B, self.q_blocks, self.chunks, self.chunk, self.K, self.group, -1)
        x = x.transpose(4, 0, 1, 5, 2, 6, 3)
        return x.reshape(self.K, self.B * self.q_blocks, self.group * self.chunks, -1, self.chunk)

    def from_chunks(self, x: Float[Array, "K M GC D C"]) -> Float[Array, "B T H D"]:
        """The inverse of `to_chunks`."""
        x = x.reshape(self.K, self.B, self.q_blocks, self.group, self.chunks, x.shape[-2], self.chunk)
        x = x.transpose(1, 2, 4, 6, 0, 3, 5)
        return x.reshape(self.B, self.q_blocks * self.queries, self.K * self.group, -1)[:, : self.T]

    def to_keys(self, x: Float[Array, "B S K D"]) -> Float[Array, "K M S D"]:
        """Keys or values, in M blocks of all rows."""
        x = jnp.pad(x, ((0, 0), (0, self.kv_blocks * self.keys - self.S), (0, 0), (0, 0)))
        x = x.reshape(self.B, self.kv_blocks, self.keys, self.K, self.D).transpose(3, 0, 1, 2, 4)
        return x.reshape(self.K, self.B * self.kv_blocks, self.keys, self.D)

    def from_keys(self, x: Float[Array, "K M S D"]) -> Float[Array, "B S K D"]:
        """The inverse of `to_keys`."""
        x = x.reshape(self.K, self.B, self.kv_blocks, self.keys, self.D).transpose(1, 2, 3, 0, 4)
        return x.reshape(self.B, self.kv_blocks * self.keys, self.K, self.D)[:, : self.S]


def kinds_and_labels(
    plan: AttentionPlan, q_token_labels: TokenLabels, kv_token_labels: TokenLabels, q_start: Array
) -> tuple[Int[Array, "B NQ NK"], tuple[Int[Array, "M 8 T"], Int[Array, "M 8 S"]]]:
    """The kinds of visits, and the labels as the kernels read them.

    Returns:
      The kind of each pair of blocks: `FULL_BLOCK`, or a bit for each of the plan's lines that has a visible pair of
      tokens. Either diagonals or rows have bits, whichever cover the block in fewer tiles; 0 means no visit.
      Labels of query and of key blocks, in the first `LABELS` of 8 rows (the height of a vector register).
    """
    q_token_labels, kv_token_labels = (
        TokenLabels(*(jnp.pad(x, ((0, 0), (0, length - x.shape[1]))) for x in token_labels))
        for token_labels, length in (
            (q_token_labels, plan.q_blocks * plan.queries),
            (kv_token_labels, plan.kv_blocks * plan.keys),
        )
    )
    tiles = block_visibility(q_token_labels, kv_token_labels, q_start, TILE, TILE)
    any_visible, all_visible = (
        x.reshape(plan.B, plan.q_blocks, plan.queries // TILE, plan.kv_blocks, plan.keys // TILE) for x in tiles
    )
    line_visible = jnp.stack([sum(any_visible[:, :, a, :, b] for a, b in line) > 0 for line in plan.lines], -1)
    num_tiles = line_visible * np.array([len(line) for line in plan.lines])
    diagonals = np.arange(len(plan.lines)) < len(plan.diagonals)
    fewer = jnp.sum(num_tiles, -1, where=diagonals) <= jnp.sum(num_tiles, -1, where=~diagonals)
    kind = jnp.sum((line_visible & (fewer[..., None] == diagonals)) << np.arange(len(plan.lines)), -1)
    all_visible |= ~any_visible.any((3, 4), keepdims=True)  # a query tile of padding: its outputs are undefined
    kind = jnp.where(all_visible.all((2, 4)) & any_visible.any((2, 4)), FULL_BLOCK, kind)

    def blocked(token_labels: TokenLabels, size: int) -> Int[Array, "M 8 N"]:
        packed = token_labels.example_id << 2 | token_labels.visibility, token_labels.piece_id
        return jnp.pad(jnp.stack([x.reshape(-1, size) for x in packed], 1), ((0, 0), (0, 8 - LABELS), (0, 0)))

    labels = blocked(q_token_labels, plan.queries), blocked(kv_token_labels, plan.keys)
    return kind, labels


def unpack_labels(example_and_visibility: Array, piece_id: Array) -> TokenLabels:
    """The inverse of the packing in `kinds_and_labels`."""
    return TokenLabels(example_and_visibility >> 2, piece_id, example_and_visibility & 3)


def largest_divisor(count: int, limit: int) -> int:
    """The largest divisor of `count` up to `limit`."""
    return max(n for n in range(1, limit + 1) if count % n == 0)


def query_spec(*shape: int) -> pl.BlockSpec:
    """The part of an array of query blocks that a visit reads or writes."""
    return pl.BlockSpec((None, None, *shape), lambda h, i, start, q_block, *_: (h, q_block[i], *[0] * len(shape)))


def key_spec(*shape: int) -> pl.BlockSpec:
    """The part of an array of key blocks that a visit reads or writes."""
    return pl.BlockSpec((None, None, *shape), lambda h, i, start, q_block, kv_block, _: (h, kv_block[i], 0, 0))


def label_specs(plan: AttentionPlan) -> list[pl.BlockSpec]:
    """The labels of a visit's queries and keys."""
    return [
        pl.BlockSpec((None, 8, plan.queries), lambda h, i, start, q_block, *_: (q_block[i], 0, 0)),
        pl.BlockSpec((None, 8, plan.keys), lambda h, i, start, q_block, kv_block, _: (kv_block[i], 0, 0)),
    ]
