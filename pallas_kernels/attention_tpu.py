"""Attention by `TokenLabels` on a TPU: FlashAttention-2 (Dao 2023, arXiv 2307.08691) over a worklist, in Pallas.

Scores lie keys by queries, [S, T]: the softmax then reduces over sublanes (cheap vector maxima and sums), not over
lanes, and a query's running maximum and sum are one number on its lane, as is all that the backward pass needs of it.
Hence queries and outputs are passed transposed, [D, T].

A *chunk* is one head's queries as wide as the matrix unit; a query block is up to `CHUNKS` of them for every head of a
group. A visit goes through its chunks in straight-line code with two in flight: the weights of one, the weighted sum of
the previous one; so the matrix unit and the vector unit work at the same time.

In a block that is not full, a visit goes through the diagonals of its 128 x 128 tiles and skips those without a visible
pair of tokens. The tiles of a diagonal have different queries and different keys: independent work again.

In full blocks the forward pass subtracts an *estimate* of the row maximum (the `reference` left by earlier visits, 0 at
first) instead of waiting for the true one, and stores no scores: softmax is a ratio, so any offset works that neither
over- nor underflows. If a row's sum shows that the estimate was bad, that row is computed again with its true maximum,
which becomes the new estimate.

Axis letters as in `attention_tpu_plan` (docs/glossary.md, "Axis letters").
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jaxtyping import Array, Float, Int

from pallas_kernels.attention_tpu_plan import (
    LABELS,
    TILE,
    AttentionPlan,
    key_spec,
    kinds_and_labels,
    label_specs,
    largest_divisor,
    query_spec,
    unpack_labels,
)
from pallas_kernels.platform import precision
from pallas_kernels.token_labels import INITIAL_MAX, MASKED, TokenLabels, attends
from pallas_kernels.worklist import FULL_BLOCK, worklist

UNROLL = 16  # chunks, or tiles, in straight-line code
LOG2E = math.log2(math.e)
# While a row's sum of weights is between these, no weight that matters to it underflows in float32, and its weighted
# sum of values below 2^28 does not overflow.
MIN_ROW_SUM, MAX_ROW_SUM = 2.0**-64, 2.0**100


def forward(
    q: Float[Array, "B T H D"],
    k: Float[Array, "B S K D"],
    v: Float[Array, "B S K D"],
    q_token_labels: TokenLabels,
    kv_token_labels: TokenLabels,
    q_start: Int[Array, ""],
    interpret: Any = False,
) -> tuple[Float[Array, "B T H D"], Float[Array, "B T H"]]:
    """As `attention`: the output, and the float32 log-sum-exp; both are undefined for padding."""
    plan = AttentionPlan.of(q, k, interpret)
    kind, labels = kinds_and_labels(plan, q_token_labels, kv_token_labels, q_start)
    visits = worklist(kind, plan.max_visits)
    q, k, v = plan.to_chunks(q), plan.to_keys(k), plan.to_keys(v).mT
    GC, D, C, S = plan.group * plan.chunks, plan.D, plan.chunk, plan.keys
    out, lse = pl.pallas_call(
        functools.partial(_forward_kernel, plan),
        name="token_label_attention_forward",
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=4,
            grid=(plan.K, visits.length),
            in_specs=[query_spec(GC, D, C), key_spec(S, D), key_spec(D, S), *label_specs(plan)],
            out_specs=[query_spec(GC, D, C), query_spec(GC, 1, C)],
            scratch_shapes=[
                pltpu.VMEM((GC, 1, C), jnp.float32),  # reference: the estimate that is subtracted from scores
                pltpu.VMEM((GC, 1, C), jnp.float32),  # running sum of weights
                pltpu.VMEM((GC, D, C), jnp.float32),  # unnormalised output
                pltpu.VMEM((2, S, C), jnp.float32),  # scores
                pltpu.VMEM((2, S, C), q.dtype),  # weights
                pltpu.VMEM((GC, 1, C), jnp.float32),  # MASKED for queries that are not computed again, else 0
                *_mask_scratch(plan),
            ],
        ),
        out_shape=[
            jax.ShapeDtypeStruct(q.shape, q.dtype),
            jax.ShapeDtypeStruct((*q.shape[:3], 1, C), jnp.float32),
        ],
        compiler_params=_COMPILER_PARAMS,
        interpret=interpret,
    )(q_start.reshape(1), *visits[:3], q, k, v, *labels)
    return plan.from_chunks(out), plan.from_chunks(lse)[..., 0]


def _forward_kernel(
    plan: AttentionPlan, start, q_block, kv_block, kind, q, k, v, q_labels, kv_labels,  # read
    out, lse,  # written
    reference, row_sum, acc, scores, weights, skip_mask, masks, columns,  # scratch
) -> None:  # fmt: skip
    i = pl.program_id(1)
    first, last = _edges(q_block, i)
    softmax = OnlineSoftmax(plan, q, k, v, reference, row_sum, acc, scores, weights, skip_mask)
    pl.when(first)(softmax.clear)
    tile_masks = Masks(plan, start[0], q_block[i], kv_block[i], q_labels, kv_labels, columns, masks)
    _visit(plan, kind[i], softmax.attend_full, softmax.attend_masked, tile_masks)

    @pl.when(last)
    def _() -> None:
        safe = jnp.maximum(row_sum[...], MIN_ROW_SUM)  # the sum of a query without keys is 0
        out[...] = (acc[...] / safe).astype(out.dtype)
        lse[...] = reference[...] / LOG2E + jnp.log(safe)


@dataclasses.dataclass(frozen=True)
class OnlineSoftmax:
    """The running softmax of a query block, to which a visit adds keys.

    Attributes:
      q, k, v: Refs of the visit's blocks.
      reference, row_sum, acc: Refs of the state: the offset subtracted from scores, the sum of weights, and the
        unnormalised output.
      scores, weights, skip_mask: scratch.
    """

    plan: AttentionPlan
    q: Any
    k: Any
    v: Any
    reference: Any
    row_sum: Any
    acc: Any
    scores: Any
    weights: Any
    skip_mask: Any

    @property
    def scale(self) -> float:
        """Of scores, for weights of 2^score."""
        return self.plan.scale * LOG2E

    def clear(self) -> None:
        """Begins a query block: no keys yet."""
        self.reference[...] = jnp.full_like(self.reference, INITIAL_MAX)
        self.row_sum[...] = jnp.zeros_like(self.row_sum)
        self.acc[...] = jnp.zeros_like(self.acc)

    def attend_full(self, sub_blocks: list[SubBlock]) -> None:
        """With the reference so far as offset, or 0; rows for which it was bad keep their state and run again."""
        accepted: dict[int, Array] = {}

        def compute_weights(n: int) -> None:
            accepted[n] = self._compute_estimated_weights(sub_blocks[n], n % 2)

        def accumulate(n: int) -> None:
            added = _dot(self.v[:, sub_blocks[n].rows], self.weights[n % 2, sub_blocks[n].rows])
            self.acc[sub_blocks[n].index] += jnp.where(accepted.pop(n), added, 0)

        _pipeline(len(sub_blocks), compute_weights, accumulate)
        any_rejected = (
            functools.reduce(jnp.maximum, [self.skip_mask[sub_block.index] for sub_block in sub_blocks]).max() == 0
        )
        pl.when(any_rejected)(functools.partial(_rerun, self.attend_masked, sub_blocks, self.skip_mask))

    def _compute_estimated_weights(self, sub_block: SubBlock, buffer: int) -> Array:
        """Writes the weights of a full sub-block into `weights[buffer]`; returns for which queries they may be used."""
        plan, index = self.plan, sub_block.index
        previous = self.reference[index]
        offset = jnp.where(previous == INITIAL_MAX, 0.0, previous)
        added = jnp.zeros((8, sub_block.width), jnp.float32)
        for row in range(0, plan.keys, plan.chunk):  # of 32 to 512 keys at a time, the fewest bundles
            rows = pl.Slice(row, min(plan.chunk, plan.keys - row))
            p = jnp.exp2(_dot(self.k[rows], self.q[index]) * self.scale - offset)
            self.weights[buffer, rows] = p.astype(self.weights.dtype)
            added += p.reshape(-1, 8, sub_block.width).sum(0)
        new_sum = self.row_sum[index] + added.sum(0, keepdims=True)
        accepted = (new_sum > MIN_ROW_SUM) & (new_sum < MAX_ROW_SUM)
        self.row_sum[index] = jnp.where(accepted, new_sum, self.row_sum[index])
        self.reference[index] = jnp.where(accepted, offset, previous)
        self.skip_mask[index] = jnp.where(accepted, MASKED, 0.0)
        return accepted

    def attend_masked(self, sub_blocks: list[SubBlock]) -> None:
        """With the true running maximum as offset."""
        block_maxima: dict[int, Array] = {}
        rescales: dict[int, Array] = {}

        def score(n: int) -> None:
            sub_block = sub_blocks[n]
            s = _dot(self.k[sub_block.rows], self.q[sub_block.index]) * self.scale + sub_block.mask[...]
            self.scores[n % 2, *sub_block.scratch] = s
            block_maxima[n] = s.reshape(-1, 8, sub_block.width).max(0)

        def compute_weights(n: int) -> None:
            sub_block, index = sub_blocks[n], sub_blocks[n].index
            previous = self.reference[index]
            row_max = jnp.maximum(previous, block_maxima.pop(n).max(0, keepdims=True))
            p = jnp.exp2(self.scores[n % 2, *sub_block.scratch] - row_max)
            self.weights[n % 2, *sub_block.scratch] = p.astype(self.weights.dtype)
            rescales[n] = jnp.exp2(previous - row_max)
            self.row_sum[index] = self.row_sum[index] * rescales[n] + p.sum(0, keepdims=True)
            self.reference[index] = row_max

        def accumulate(n: int) -> None:
            sub_block, index = sub_blocks[n], sub_blocks[n].index
            added = _dot(self.v[:, sub_block.rows], self.weights[n % 2, *sub_block.scratch])
            self.acc[index] = self.acc[index] * rescales.pop(n) + added

        _pipeline(len(sub_blocks), score, compute_weights, accumulate)


def backward(
    q: Float[Array, "B T H D"],
    k: Float[Array, "B S K D"],
    v: Float[Array, "B S K D"],
    q_token_labels: TokenLabels,
    kv_token_labels: TokenLabels,
    q_start: Int[Array, ""],
    lse: Float[Array, "B T H"],
    delta: Float[Array, "B T H"],
    d_out: Float[Array, "B T H D"],
    interpret: Any = False,
) -> tuple[Float[Array, "B T H D"], Float[Array, "B S K D"], Float[Array, "B S K D"]]:
    """float32 gradients of q, k and v, given `delta` = sum(out * d_out, -1) - d_lse, float32 like `lse`.

    One pass, each key block's visits in succession. Each visit reads the gradient of its query block, adds to it and
    writes it back, so that memory stays linear in T and the scores are computed once.
    """
    plan = AttentionPlan.of(q, k, interpret)
    kind, labels = kinds_and_labels(plan, q_token_labels, kv_token_labels, q_start)
    visits = worklist(kind, plan.max_visits, by_key=True)
    per_query = plan.to_chunks(jnp.stack([lse * LOG2E, delta], -1))
    q, d_out, k, v = plan.to_chunks(q), plan.to_chunks(d_out.astype(q.dtype)), plan.to_keys(k), plan.to_keys(v)
    GC, D, C, S = plan.group * plan.chunks, plan.D, plan.chunk, plan.keys
    anywhere = pl.BlockSpec(memory_space=pl.ANY)
    dq, dk, dv = pl.pallas_call(
        functools.partial(_backward_kernel, plan),
        name="token_label_attention_backward",
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=4,
            grid=(plan.K, visits.length),
            in_specs=[
                *[query_spec(GC, D, C)] * 2,
                query_spec(GC, 2, C),
                *[key_spec(S, D), key_spec(D, S), key_spec(S, D)],
                *label_specs(plan),
                anywhere,
            ],
            out_specs=[anywhere, key_spec(D, S), key_spec(D, S)],
            scratch_shapes=[
                pltpu.VMEM((D, S), jnp.float32),  # dk
                pltpu.VMEM((D, S), jnp.float32),  # dv
                pltpu.VMEM((GC, D, C), jnp.float32),  # dq of this visit
                pltpu.VMEM((2, GC, D, C), jnp.float32),  # dq so far
                pltpu.VMEM((2, S, C), q.dtype),  # weights
                pltpu.VMEM((2, S, C), q.dtype),  # d_scores
                *_mask_scratch(plan),
                pltpu.SemaphoreType.DMA((2,)),
                pltpu.SemaphoreType.DMA((2,)),
            ],
        ),
        out_shape=[
            jax.ShapeDtypeStruct(q.shape, jnp.float32),
            *[jax.ShapeDtypeStruct(k.mT.shape, jnp.float32)] * 2,
        ],
        input_output_aliases={12: 0},
        compiler_params=_COMPILER_PARAMS,
        interpret=interpret,
    )(q_start.reshape(1), *visits[:3], q, d_out, per_query, k, k.mT, v, *labels, jnp.zeros(q.shape, jnp.float32))
    # A key block without a visit was never written.
    visited = (kind != 0).any(1).reshape(-1)
    dk, dv = (jnp.where(visited[:, None, None], x, 0) for x in (dk, dv))
    return plan.from_chunks(dq), plan.from_keys(dk.mT), plan.from_keys(dv.mT)


def _backward_kernel(
    plan: AttentionPlan, start, q_block, kv_block, kind, q, d_out, per_query, k, k_t, v, q_labels, kv_labels,
    zeros,  # read
    dq, dk, dv,  # written
    dk_sums, dv_sums, dq_visit, dq_sums, weights, d_scores, masks, columns, fetched, written,  # scratch
) -> None:  # fmt: skip
    h, i = pl.program_id(0), pl.program_id(1)
    first, last = _edges(kv_block, i)
    scale = plan.scale * LOG2E

    def fetch() -> Any:
        return pltpu.make_async_copy(dq.at[h, q_block[i]], dq_sums.at[i % 2], fetched.at[i % 2])

    def write(visit: Array) -> Any:
        return pltpu.make_async_copy(dq_sums.at[visit % 2], dq.at[h, q_block[visit]], written.at[visit % 2])

    # A buffer is free, and a block may be fetched again, once it is written. Wait here for the visit before last, and
    # for the last one if it had the same queries (then its next wait is left out).
    def same_queries_as_before(visit: Array) -> Array:
        return (visit >= 1) & (q_block[visit] == q_block[jnp.maximum(visit - 1, 0)])

    pl.when((i >= 2) & ~same_queries_as_before(jnp.maximum(i - 1, 0)))(lambda: write(i - 2).wait())
    pl.when(same_queries_as_before(i))(lambda: write(i - 1).wait())
    fetch().start()

    @pl.when(first)
    def _() -> None:
        dk_sums[...] = jnp.zeros_like(dk_sums)
        dv_sums[...] = jnp.zeros_like(dv_sums)

    @pl.when(kind[i] != FULL_BLOCK)
    def _() -> None:
        dq_visit[...] = jnp.zeros_like(dq_visit)

    def run(sub_blocks: list[SubBlock]) -> None:
        def score(n: int) -> None:
            sub_block, index = sub_blocks[n], sub_blocks[n].index
            lse, delta = (per_query[sub_block.chunk, slice(m, m + 1), sub_block.queries] for m in range(2))
            s = _dot(k[sub_block.rows], q[index]) * scale
            if sub_block.mask is not None:
                s += sub_block.mask[...]
            p = jnp.exp2(s - lse)
            weights[n % 2, *sub_block.scratch] = p.astype(weights.dtype)
            d_p = _dot(v[sub_block.rows], d_out[index])
            d_scores[n % 2, *sub_block.scratch] = (p * (d_p - delta)).astype(d_scores.dtype)

        def accumulate(n: int) -> None:
            sub_block, index = sub_blocks[n], sub_blocks[n].index
            d_s = d_scores[n % 2, *sub_block.scratch]
            added = _dot(k_t[:, sub_block.rows], d_s)
            dq_visit[index] = added if sub_block.mask is None else dq_visit[index] + added
            dv_sums[:, sub_block.rows] += _dot(d_out[index], weights[n % 2, *sub_block.scratch], over_queries=True)
            dk_sums[:, sub_block.rows] += _dot(q[index], d_s, over_queries=True)

        _pipeline(len(sub_blocks), score, accumulate)

    tile_masks = Masks(plan, start[0], q_block[i], kv_block[i], q_labels, kv_labels, columns, masks)
    _visit(plan, kind[i], run, run, tile_masks)

    fetch().wait()
    dq_sums[i % 2] += dq_visit[...] * plan.scale
    write(i).start()

    @pl.when(last)
    def _() -> None:
        dk[...] = dk_sums[...] * plan.scale
        dv[...] = dv_sums[...]

    @pl.when(i == pl.num_programs(1) - 1)
    def _() -> None:
        pl.when((i >= 1) & ~same_queries_as_before(i))(lambda: write(i - 1).wait())
        write(i).wait()


# Parts of both kernels.


@dataclasses.dataclass(frozen=True)
class SubBlock:
    """Work within a visit: some queries of one chunk against some keys of the block.

    Attributes:
      chunk: index of the chunk; may be traced, as may the start of `rows`.
      queries: of the chunk.
      rows: keys of the block.
      mask: a Ref that is added to the scores, 0 or `MASKED`; None for no mask.
    """

    chunk: Any
    queries: slice
    rows: pl.Slice
    mask: Any = None

    @property
    def index(self) -> tuple[Any, slice, slice]:
        """Index of its queries in arrays by chunk."""
        return self.chunk, slice(None), self.queries

    @property
    def width(self) -> int:
        """The number of its queries."""
        return self.queries.stop - self.queries.start

    @property
    def scratch(self) -> tuple[slice, slice]:
        """Index of its scores and weights in buffers that hold a whole chunk's."""
        return slice(0, self.rows.size), slice(0, self.width)


def _pipeline(count: int, *stages: Callable[[int], None]) -> None:
    """Straight-line code in which each stage runs one item ahead of the next stage."""
    for step in range(count + len(stages) - 1):
        for lag, stage in enumerate(stages):
            if 0 <= step - lag < count:
                stage(step - lag)


Run = Callable[[list[SubBlock]], None]


def _visit(plan: AttentionPlan, kind: Array, run_full: Run, run_masked: Run, masks: Masks) -> None:
    """Runs one visit: whole chunks in a full block, otherwise lines of tiles."""
    pl.when(kind == FULL_BLOCK)(functools.partial(_run_full_block, plan, run_full))

    @pl.when(kind != FULL_BLOCK)
    def _() -> None:
        masks.prepare()
        for bit, line in enumerate(plan.diagonals):
            pl.when((kind >> bit) & 1 == 1)(functools.partial(_run_line, plan, run_masked, masks, line))

        @pl.when((kind >> len(plan.diagonals)) != 0)
        def _() -> None:
            def row(n: Array, _: None) -> None:  # a loop over rows, not straight-line code: half as much to compile
                line = [(q_tile, n) for q_tile, _ in plan.rows[0]]
                visible = (kind >> len(plan.diagonals) + n) & 1 == 1
                pl.when(visible)(functools.partial(_run_line, plan, run_masked, masks, line))

            jax.lax.fori_loop(0, len(plan.rows), row, None)


def _run_full_block(plan: AttentionPlan, run: Run) -> None:
    def piece(n: Array, size: int) -> None:
        run([SubBlock(n * size + m, slice(0, plan.chunk), pl.Slice(0, plan.keys)) for m in range(size)])

    _loop_unrolled(plan.group * plan.chunks, UNROLL, piece)


def _loop_unrolled(num_items: int, limit: int, piece: Callable[[Array, int], None]) -> None:
    """Loops over `num_items` items in equal pieces of straight-line code, as large as `limit` allows."""
    size = largest_divisor(num_items, limit)
    jax.lax.fori_loop(0, num_items // size, lambda n, _: piece(n, size), None)


def _rerun(run: Run, sub_blocks: list[SubBlock], mask: Any) -> None:
    """Runs consecutive chunks again, one by one, for the queries that the mask does not exclude."""

    def rerun_chunk(n: Array, _: None) -> None:
        chunk = sub_blocks[0].chunk + n
        run([dataclasses.replace(sub_blocks[0], chunk=chunk, mask=mask.at[chunk])])

    jax.lax.fori_loop(0, len(sub_blocks), rerun_chunk, None)


def _run_line(plan: AttentionPlan, run: Run, masks: Masks, line: Sequence[tuple[int, Any]]) -> None:
    for n, tiles in enumerate(line):
        masks.make(n, *tiles)  # once for all heads

    def heads(g: Array, size: int) -> None:
        sub_blocks = []
        for head, (n, (q_tile, kv_tile)) in itertools.product(range(size), enumerate(line)):
            chunk, start = divmod(q_tile * TILE, plan.chunk)
            chunk += (g * size + head) * plan.chunks
            sub_blocks.append(
                SubBlock(chunk, slice(start, start + TILE), pl.Slice(_tile_start(kv_tile), TILE), masks.masks.at[n])
            )
        run(sub_blocks)

    _loop_unrolled(plan.group, UNROLL // len(line), heads)


def _tile_start(tile: Any) -> Any:
    """The first token of a tile."""
    return pl.multiple_of(tile * TILE, TILE) if isinstance(tile, jax.Array) else tile * TILE


@dataclasses.dataclass(frozen=True)
class Masks:
    """Makes the masks of a visit's tiles: 0 where the query attends to the key, else `MASKED`; added to the scores.

    Attributes:
      columns: scratch for the labels of the keys, the same on all lanes.
      masks: scratch for the masks.
    """

    plan: AttentionPlan
    start: Array
    q_block: Array
    kv_block: Array
    q_labels: Any
    kv_labels: Any
    columns: Any
    masks: Any

    def prepare(self) -> None:
        """Transposes the keys' labels: it is expensive, and the same for all queries."""
        for row in range(0, self.plan.keys, TILE):
            for n in range(LABELS):
                labels = self.kv_labels[n : n + 1, pl.ds(row, TILE)]
                self.columns[n, pl.ds(row, TILE)] = jnp.broadcast_to(labels, (TILE, TILE)).T

    def make(self, n: int, q_tile: int, kv_tile: int) -> None:
        """Writes the `n`th mask, [keys, queries]."""
        shape, plan = (TILE, TILE), self.plan
        queries, keys = (pl.ds(_tile_start(tile), TILE) for tile in (q_tile, kv_tile))
        q = unpack_labels(*(jnp.broadcast_to(self.q_labels[m : m + 1, queries], shape) for m in range(LABELS)))
        kv = unpack_labels(*(self.columns[m, keys] for m in range(LABELS)))
        q_index = self.start + self.q_block % plan.q_blocks * plan.queries + q_tile * TILE
        kv_index = self.kv_block % plan.kv_blocks * plan.keys + kv_tile * TILE
        iota = functools.partial(jax.lax.broadcasted_iota, jnp.int32, shape)
        self.masks[n] = jnp.where(attends(q, kv, q_index + iota(1), kv_index + iota(0)), 0.0, MASKED)


def _edges(block: Any, i: Array) -> tuple[Array, Array]:
    """Whether a visit is the first, and whether it is the last, of its block."""
    end = pl.num_programs(1) - 1
    first = (i == 0) | (block[i] != block[jnp.maximum(i - 1, 0)])
    return first, (i == end) | (block[i] != block[jnp.minimum(i + 1, end)])


def _dot(a: Array, b: Array, over_queries: bool = False) -> Array:
    """a @ b, or a @ b.T to sum over queries; float32 sums, and float32 inputs get a true float32 product."""
    contract = ((1,), (1,)) if over_queries else ((1,), (0,))
    return jax.lax.dot_general(
        a, b, (contract, ((), ())), precision=precision(a.dtype), preferred_element_type=jnp.float32
    )


_COMPILER_PARAMS = pltpu.CompilerParams(
    dimension_semantics=("parallel", "arbitrary"), vmem_limit_bytes=64 << 20, disable_bounds_checks=True
)


def _mask_scratch(plan: AttentionPlan) -> list[Any]:
    """Scratch for `Masks`: the masks of the longest line, and columns."""
    return [
        pltpu.VMEM((plan.queries // TILE, TILE, TILE), jnp.float32),
        pltpu.VMEM((LABELS, plan.keys, TILE), jnp.int32),
    ]
