"""Attention by `TokenLabels` on a GPU: FlashAttention-2 (Dao 2023, arXiv 2307.08691) in Pallas, through Triton.

A program computes one query block and loops over its active key blocks: full blocks first, without a mask, then the
others. The backward pass visits the pairs of blocks twice: by query block for dq, by key block for dk and dv. So no two
programs add to the same output, and every run gives the same bits.

The heads of a group are rows of one matrix, [T x G, D]: the group's keys are read once for all of them, and a block
spans fewer tokens, so that fewer masked pairs are computed.

Axis letters as in `attention`, and R: rows (queries times heads of a group) (docs/glossary.md, "Axis letters").
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton
from jax.typing import DTypeLike
from jaxtyping import Array, Bool, Float, Int

from pallas_kernels.platform import precision
from pallas_kernels.token_labels import INITIAL_MAX, MASKED, TokenLabels, attends
from pallas_kernels.worklist import BlockTable, block_table, block_visibility

LOG2E = math.log2(math.e)
SMALLEST = 16  # least side of a matrix product
NUM_STAGES = 3  # of the software pipeline of a loop: the block's index, its loads, its products


class Blocks(NamedTuple):
    """Sizes of a kernel: rows (queries times heads of a group) and keys in a block, warps of a program."""

    rows: int
    keys: int
    warps: int


# By head size: the largest that the compiler fits into the registers and the shared memory of an H100 without spills
# and with Hopper's own matrix instruction, which wants 64 rows of its output (benchmarks/attention_h100.py shows both).
BLOCKS = {
    "forward": {64: Blocks(128, 64, 4), 128: Blocks(128, 64, 8), 256: Blocks(128, 64, 8)},
    "dq": {64: Blocks(64, 64, 4), 128: Blocks(128, 64, 8), 256: Blocks(64, 32, 8)},
    "dk_dv": {64: Blocks(64, 64, 4), 128: Blocks(64, 128, 8), 256: Blocks(32, 64, 8)},
}
# True float32 products have no matrix instruction, and more of them would not fit.
FLOAT32_BLOCKS = {64: Blocks(64, 32, 8), 128: Blocks(32, 32, 8), 256: Blocks(16, 32, 8)}


def choose_blocks(kernel: str, D: int, dtype: DTypeLike) -> Blocks:
    """The block sizes of a kernel ("forward", "dq", "dk_dv") for heads of size `D`, a power of two up to 256."""
    return (FLOAT32_BLOCKS if dtype == jnp.float32 else BLOCKS[kernel])[max(D, 64)]


def forward(
    q: Float[Array, "B T H D"],
    k: Float[Array, "B S K D"],
    v: Float[Array, "B S K D"],
    q_token_labels: TokenLabels,
    kv_token_labels: TokenLabels,
    q_start: Int[Array, ""],
    interpret: bool = False,
) -> tuple[Float[Array, "B T H D"], Float[Array, "B T H"]]:
    """As `attention`: the output, and the float32 log-sum-exp; both are undefined for padding."""
    call = _Call(("forward",), q, k, q_token_labels, kv_token_labels, q_start, interpret)
    rows, keys = [call.to_rows(q)], [call.to_keys(x) for x in (k, v)]
    outputs = [(rows[0].shape, q.dtype), (rows[0].shape[:-1], jnp.float32)]
    out, lse = call("forward", _forward_kernel, rows, keys, outputs)
    return call.from_rows(out), call.from_rows(lse)


def _forward_kernel(
    blocks: Blocks, scale: float, table, q_labels, kv_labels, q, k, v,  # read
    out, lse,  # written
) -> None:  # fmt: skip
    queries = q[...]

    def visit(n: Array, state: tuple[Array, Array, Array], masked: bool) -> tuple[Array, Array, Array]:
        acc, row_max, row_sum = state  # unnormalised output, running maximum, running sum of weights
        block = pl.ds(table.indices[n] * blocks.keys, blocks.keys)
        scores = _dot(queries, k[block, :].T) * (scale * LOG2E)
        if masked:
            scores = jnp.where(_mask(q_labels, slice(None), kv_labels, block, rows_axis=0), scores, MASKED)
        new_max = jnp.maximum(row_max, scores.max(1))
        weights = jnp.exp2(scores - new_max[:, None])
        rescale = jnp.exp2(row_max - new_max)
        acc = acc * rescale[:, None] + _dot(weights.astype(v.dtype), v[block, :])
        return acc, new_max, row_sum * rescale + weights.sum(1)

    rows = q.shape[:1]
    initial = (jnp.zeros(q.shape, jnp.float32), jnp.full(rows, INITIAL_MAX, jnp.float32), jnp.zeros(rows, jnp.float32))
    acc, row_max, row_sum = _visit_all(table, visit, initial)
    row_sum = jnp.maximum(row_sum, 1e-30)
    out[...] = (acc / row_sum[:, None]).astype(out.dtype)
    lse[...] = row_max / LOG2E + jnp.log(row_sum)


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
    interpret: bool = False,
) -> tuple[Float[Array, "B T H D"], Float[Array, "B S K D"], Float[Array, "B S K D"]]:
    """float32 gradients of q, k and v, given `delta` = sum(out * d_out, -1) - d_lse, float32 like `lse`."""
    call = _Call(("dq", "dk_dv"), q, k, q_token_labels, kv_token_labels, q_start, interpret)
    rows = [call.to_rows(x) for x in (q, d_out.astype(q.dtype), lse * LOG2E, delta)]
    keys = [call.to_keys(x) for x in (k, v)]
    (dq,) = call("dq", _dq_kernel, rows, keys, [(rows[0].shape, jnp.float32)])
    dk, dv = call("dk_dv", _dk_dv_kernel, rows, keys, [(keys[0].shape, jnp.float32)] * 2, by_key=True)
    return call.from_rows(dq), call.from_keys(dk), call.from_keys(dv)


def _dq_kernel(
    blocks: Blocks, scale: float, table, q_labels, kv_labels, q, d_out, lse, delta, k, v,  # read
    dq,  # written
) -> None:  # fmt: skip
    queries, d_outs, lses, deltas = q[...], d_out[...], lse[...][:, None], delta[...][:, None]

    def visit(n: Array, sums: Array, masked: bool) -> Array:
        block = pl.ds(table.indices[n] * blocks.keys, blocks.keys)
        keys = k[block, :]
        scores = _dot(queries, keys.T) * (scale * LOG2E)
        if masked:
            scores = jnp.where(_mask(q_labels, slice(None), kv_labels, block, rows_axis=0), scores, MASKED)
        d_scores = jnp.exp2(scores - lses) * (_dot(d_outs, v[block, :].T) - deltas)
        return sums + _dot(d_scores.astype(k.dtype), keys)

    dq[...] = _visit_all(table, visit, jnp.zeros(q.shape, jnp.float32)) * scale


def _dk_dv_kernel(
    blocks: Blocks, scale: float, table, q_labels, kv_labels, q, d_out, lse, delta, k, v,  # read
    dk, dv,  # written
) -> None:  # fmt: skip
    keys, values = k[...], v[...]

    def visit(n: Array, state: tuple[Array, Array], masked: bool) -> tuple[Array, Array]:
        dk_sums, dv_sums = state
        block = pl.ds(table.indices[n] * blocks.rows, blocks.rows)
        queries, d_outs = q[block, :], d_out[block, :]
        # Keys by queries: weights are then multiplied with `d_outs` as they are, not transposed.
        scores = _dot(keys, queries.T) * (scale * LOG2E)
        if masked:
            scores = jnp.where(_mask(q_labels, block, kv_labels, slice(None), rows_axis=1), scores, MASKED)
        weights = jnp.exp2(scores - lse[block][None, :])
        dv_sums += _dot(weights.astype(d_out.dtype), d_outs)
        d_scores = weights * (_dot(values, d_outs.T) - delta[block][None, :])
        return dk_sums + _dot(d_scores.astype(q.dtype), queries), dv_sums

    zeros = jnp.zeros(k.shape, jnp.float32)
    dk_sums, dv_sums = _visit_all(table, visit, (zeros, zeros))
    dk[...] = dk_sums * scale
    dv[...] = dv_sums


# What the kernels are made of.


def _visit_all(table: BlockTable, visit: Callable, state: Any) -> Any:
    num_full, num_active = table.num_full[...], table.num_active[...]
    state = jax.lax.fori_loop(0, num_full, functools.partial(visit, masked=False), state)
    return jax.lax.fori_loop(num_full, num_active, functools.partial(visit, masked=True), state)


def _mask(q_labels: Any, rows: Any, kv_labels: Any, keys: Any, rows_axis: int) -> Bool[Array, "_ _"]:
    """Whether the queries in some rows attend to some keys."""
    q = [jnp.expand_dims(q_labels[n, rows], 1 - rows_axis) for n in range(4)]
    kv = [jnp.expand_dims(kv_labels[n, keys], rows_axis) for n in range(4)]
    return attends(TokenLabels(*q[:3]), TokenLabels(*kv[:3]), q[3], kv[3])


def _dot(a: Array, b: Array) -> Array:
    """a @ b with float32 sums; float32 inputs get a true float32 product."""
    return jnp.dot(a, b, precision=precision(a.dtype), preferred_element_type=jnp.float32)


class _Call:
    """The shapes of one call of some kernels; it lays arrays out for them, and back.

    R rows are the queries, each with the heads of a group in succession. Rows and the S keys are padded to whole blocks
    of every kernel, heads to a power of two.
    """

    def __init__(
        self,
        kernels: Sequence[str],
        q: Float[Array, "B T H D"],
        k: Float[Array, "B S K D"],
        q_token_labels: TokenLabels,
        kv_token_labels: TokenLabels,
        q_start: Int[Array, ""],
        interpret: bool,
    ):
        self.B, self.T, self.H, self.D = q.shape
        self.S, self.K = k.shape[1:3]
        self.G, self.q_start, self.interpret = self.H // self.K, q_start, interpret
        self.head = _power_of_2(self.D)
        self.blocks = {}
        for name in kernels:
            blocks = choose_blocks(name, self.head, q.dtype)
            rows, keys = min(blocks.rows, _power_of_2(self.T * self.G)), min(blocks.keys, _power_of_2(self.S))
            self.blocks[name] = blocks._replace(rows=rows, keys=keys)
        q_labels = jnp.stack([*q_token_labels, jnp.broadcast_to(q_start + jnp.arange(self.T), (self.B, self.T))], 1)
        kv_labels = jnp.stack([*kv_token_labels, jnp.broadcast_to(jnp.arange(self.S), (self.B, self.S))], 1)
        self.q_labels = self._pad_to_blocks(jnp.repeat(q_labels, self.G, 2), 2, "rows")
        self.kv_labels = self._pad_to_blocks(kv_labels, 2, "keys")

    def __call__(
        self,
        name: str,
        kernel: Callable,
        rows: Sequence[Array],
        keys: Sequence[Array],
        outputs: Sequence[tuple[tuple[int, ...], DTypeLike]],
        by_key: bool = False,
    ) -> list[Array]:
        """Runs a kernel, one program for each block of rows, or of keys if `by_key`; its outputs are laid out alike."""
        blocks = self.blocks[name]
        q_token_labels, kv_token_labels = (
            TokenLabels(*(x[:, n] for n in range(3))) for x in (self.q_labels, self.kv_labels)
        )
        visibility = block_visibility(q_token_labels, kv_token_labels, self.q_start, blocks.rows, blocks.keys, self.G)
        table = block_table(visibility, by_key)
        R, S = self.q_labels.shape[2], self.kv_labels.shape[2]

        def row_spec(*head: int) -> pl.BlockSpec:
            size = R if by_key else blocks.rows
            return pl.BlockSpec((None, None, size, *head), lambda i, h, b: (b, h, 0 if by_key else i, *[0] * len(head)))

        key_spec = pl.BlockSpec(
            (None, blocks.keys if by_key else S, None, self.head), lambda i, h, b: (b, i if by_key else 0, h, 0)
        )
        label_specs = [
            pl.BlockSpec((None, 4, R if by_key else blocks.rows), lambda i, h, b: (b, 0, 0 if by_key else i)),
            pl.BlockSpec((None, 4, blocks.keys if by_key else S), lambda i, h, b: (b, 0, i if by_key else 0)),
        ]
        count_spec = pl.BlockSpec((None, None), lambda i, h, b: (b, i))
        table_specs: Any = [
            pl.BlockSpec((None, None, table.indices.shape[2]), lambda i, h, b: (b, i, 0)),
            count_spec,
            count_spec,
        ]
        return pl.pallas_call(
            functools.partial(kernel, blocks, self.D**-0.5),
            name=f"token_label_attention_{name}",
            grid=(table.indices.shape[1], self.K, self.B),
            in_specs=[
                BlockTable(*table_specs),
                *label_specs,
                *(row_spec(*x.shape[3:]) for x in rows),
                *[key_spec] * len(keys),
            ],
            out_specs=[key_spec if by_key else row_spec(*shape[3:]) for shape, _ in outputs],
            out_shape=[jax.ShapeDtypeStruct(*output) for output in outputs],
            compiler_params=triton.CompilerParams(num_warps=blocks.warps, num_stages=NUM_STAGES),
            interpret=self.interpret,
        )(table, self.q_labels, self.kv_labels, *rows, *keys)

    def _pad_to_blocks(self, x: Array, axis: int, side: str) -> Array:
        multiple = max(getattr(blocks, side) for blocks in self.blocks.values())  # a multiple of all: powers of two
        widths = [(0, 0)] * x.ndim
        widths[axis] = (0, -x.shape[axis] % multiple)
        if x.ndim == 4:
            widths[3] = (0, self.head - self.D)
        return jnp.pad(x, widths)

    def to_rows(self, x: Float[Array, "B T H *D"]) -> Float[Array, "B K R *D"]:
        x = jnp.moveaxis(x.reshape(self.B, self.T, self.K, self.G, *x.shape[3:]), 2, 1)
        return self._pad_to_blocks(x.reshape(self.B, self.K, self.T * self.G, *x.shape[4:]), 2, "rows")

    def from_rows(self, x: Float[Array, "B K R *D"]) -> Float[Array, "B T H *D"]:
        x = x[:, :, : self.T * self.G, ..., : self.D] if x.ndim == 4 else x[:, :, : self.T * self.G]
        x = jnp.moveaxis(x.reshape(self.B, self.K, self.T, self.G, *x.shape[3:]), 1, 2)
        return x.reshape(self.B, self.T, self.H, *x.shape[4:])

    def to_keys(self, x: Float[Array, "B S K D"]) -> Float[Array, "B S K D"]:
        return self._pad_to_blocks(x, 1, "keys")

    def from_keys(self, x: Float[Array, "B S K D"]) -> Float[Array, "B S K D"]:
        return x[:, : self.S, :, : self.D]


def _power_of_2(size: int) -> int:
    return max(SMALLEST, pl.next_power_of_2(size))
