"""Attention by `TokenLabels` in plain XLA, for CPU: FlashAttention-2 (Dao 2023, arXiv 2307.08691) over block tables.

Each query block loops over its active key blocks, so nothing of size T x S exists, and the sums of one block stay in
the processor's cache. Masks are computed only for blocks that are not full. A single query, on a GPU as well, is a
dense product.

What is computed for each score has the heads of a group and their queries as two axes: along a single axis of both, the
labels of the queries start anew at each head, and XLA's CPU compiler makes such a loop, exponentials included, of one
number at a time: a masked block then takes four times as long as a full one.

Axis letters as in `attention`, and G: heads of a group; Q: queries of a block; BN and BM: query and key blocks of all
rows (docs/glossary.md, "Axis letters").
"""

from __future__ import annotations

import functools
import re
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from pallas_kernels.platform import precision, product_dtype
from pallas_kernels.token_labels import INITIAL_MAX, MASKED, TokenLabels, dense_mask
from pallas_kernels.worklist import BlockTable, block_table, block_visibility

BLOCK = 64


def forward(
    q: Float[Array, "B T H D"],
    k: Float[Array, "B S K D"],
    v: Float[Array, "B S K D"],
    q_token_labels: TokenLabels,
    kv_token_labels: TokenLabels,
    q_start: Int[Array, ""],
) -> tuple[Float[Array, "B T H D"], Float[Array, "B T H"]]:
    """As `attention`: the output, and the float32 log-sum-exp; both are undefined for padding."""
    if q.shape[1] == 1:
        return _attend_one_query(q, k, v, q_token_labels, kv_token_labels, q_start)
    blocks = _Blocks(q.shape, k.shape, q_token_labels, kv_token_labels, q_start)
    table = block_table(blocks.visibility)  # outside the loop, in which XLA would compute it anew for every block
    q_blocks, k = blocks.split_queries(_rounded(q)), blocks.split_keys(_rounded(k))
    v_transposed = blocks.split_keys(_rounded(v)).mT

    def attend_block(a: Array) -> tuple[Array, Array]:
        def visit(b: Array, masked: bool, state: tuple[Array, Array, Array]) -> tuple[Array, Array, Array]:
            out, row_max, row_sum = state  # unnormalised output, running maximum, running sum of weights
            scores = blocks.scores(q_blocks[a], k[b], a, b, masked)
            new_max = jnp.maximum(row_max, scores.max(1))
            weights = jnp.exp(scores - new_max[:, None])
            rescale = jnp.exp(row_max - new_max)
            added = _product("kds,ksgq->kdgq", v_transposed[b], weights)
            return out * rescale[:, None] + added, new_max, row_sum * rescale + weights.sum(1)

        K, G, Q, D = q_blocks.shape[1:]
        start = (jnp.zeros((K, D, G, Q)), jnp.full((K, G, Q), INITIAL_MAX), jnp.zeros((K, G, Q)))
        out, row_max, row_sum = blocks.visit(table, a, visit, start)
        row_sum = jnp.maximum(row_sum, 1e-30)
        out = jnp.moveaxis(out / row_sum[:, None], 1, -1)
        return out.astype(q.dtype), row_max + jnp.log(row_sum)

    out, lse = jax.lax.map(attend_block, jnp.arange(len(q_blocks)))
    return blocks.join_queries(out), blocks.join_queries(lse[..., None])[..., 0]


def _attend_one_query(
    q: Array, k: Array, v: Array, q_token_labels: TokenLabels, kv_token_labels: TokenLabels, q_start: Array
) -> tuple[Array, Array]:
    """The dense product for decoding: the scores of one query are few, and a block would be nearly all padding."""
    B, _, H, D = q.shape
    S, K = k.shape[1:3]
    product = functools.partial(jnp.einsum, preferred_element_type=jnp.float32, precision=precision(q.dtype))
    mask = dense_mask(q_token_labels, kv_token_labels, q_start[None], jnp.arange(S))[:, None]
    scores = product("bkgd,bskd->bkgs", q.reshape(B, K, H // K, D), k)
    scores = jnp.where(mask, scores * D**-0.5, MASKED)
    lse = jax.nn.logsumexp(scores, -1, keepdims=True)
    out = product("bkgs,bskd->bkgd", jnp.exp(scores - lse).astype(v.dtype), v)
    return out.reshape(q.shape).astype(q.dtype), lse.reshape(B, 1, H)


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
) -> tuple[Float[Array, "B T H D"], Float[Array, "B S K D"], Float[Array, "B S K D"]]:
    """float32 gradients of q, k and v, given `delta` = sum(out * d_out, -1) - d_lse, float32 like `lse`."""
    blocks = _Blocks(q.shape, k.shape, q_token_labels, kv_token_labels, q_start)
    table = block_table(blocks.visibility, by_key=True)
    q, d_out = (blocks.split_queries(_rounded(x)) for x in (q, d_out))
    k, v = (blocks.split_keys(_rounded(x)) for x in (k, v))
    k_transposed = k.mT
    lse, delta = (blocks.split_queries(x[..., None])[..., 0] for x in (lse, delta))
    scale = q.shape[-1] ** -0.5

    def backprop_block(dq: Array, b: Array) -> tuple[Array, tuple[Array, Array]]:
        def visit(a: Array, masked: bool, grads: tuple[Array, Array, Array]) -> tuple[Array, Array, Array]:
            dq, dk, dv = grads
            weights = jnp.exp(blocks.scores(q[a], k[b], a, b, masked) - lse[a][:, None])
            d_weights = _product("kgqd,ksd->ksgq", d_out[a], v[b])
            d_scores = weights * (d_weights - delta[a][:, None]) * scale
            return (
                dq.at[a].add(_product("kds,ksgq->kdgq", k_transposed[b], d_scores)),
                dk + _product("ksgq,kgqd->ksd", d_scores, q[a]),
                dv + _product("ksgq,kgqd->ksd", weights, d_out[a]),
            )

        zeros = jnp.zeros(k.shape[1:])
        dq, dk, dv = blocks.visit(table, b, visit, (dq, zeros, zeros))
        return dq, (dk, dv)

    BN, K, G, Q, D = q.shape
    dq, (dk, dv) = jax.lax.scan(backprop_block, jnp.zeros((BN, K, D, G, Q)), jnp.arange(len(k)))
    return blocks.join_queries(jnp.moveaxis(dq, 2, -1)), blocks.join_keys(dk), blocks.join_keys(dv)


def _product(equation: str, x: Array, y: Array) -> Array:
    """An einsum with float32 sums in which the adjacent axes g and q are one: XLA's products over two are slower.

    Of a batch of products, XLA's CPU library computes those that sum over the first one's last axis; others take twice
    as long, and are never bfloat16's.
    """
    x, y = _rounded(x), _rounded(y)
    x_axes, y_axes, out_axes = re.split(",|->", equation)
    sizes = dict(zip(x_axes + y_axes, x.shape + y.shape, strict=True))
    sizes["n"] = sizes["g"] * sizes["q"]
    x, y = (
        array.reshape([sizes[axis] for axis in axes.replace("gq", "n")]) for axes, array in ((x_axes, x), (y_axes, y))
    )
    out = jnp.einsum(equation.replace("gq", "n"), x, y, preferred_element_type=jnp.float32)
    return out.reshape([sizes[axis] for axis in out_axes])


def _rounded(x: Array) -> Array:
    return x.astype(product_dtype(x.dtype))


class _Blocks:
    """The shapes of one call: splits rows into blocks, joins them again, and knows which blocks are active."""

    def __init__(
        self,
        q_shape: tuple[int, ...],
        k_shape: tuple[int, ...],
        q_token_labels: TokenLabels,
        kv_token_labels: TokenLabels,
        q_start: Array,
    ):
        self.B, self.T, self.H, _ = q_shape
        self.S, self.K = k_shape[1:3]
        self.block, self.start = min(BLOCK, self.S), q_start
        self.q_token_labels, self.kv_token_labels = (
            TokenLabels(*(self._pad(jnp.asarray(y)) for y in x)) for x in (q_token_labels, kv_token_labels)
        )
        self.N, self.M = (x.example_id.shape[1] // self.block for x in (self.q_token_labels, self.kv_token_labels))
        self.visibility = block_visibility(self.q_token_labels, self.kv_token_labels, q_start, self.block, self.block)

    def _pad(self, x: Array) -> Array:
        return jnp.pad(x, [(0, -x.shape[n] % self.block if n == 1 else 0) for n in range(x.ndim)])

    def split_queries(self, x: Float[Array, "B T H D"]) -> Float[Array, "BN K G Q D"]:
        """Blocks of queries; the heads of a group are together, so that one matrix product serves them all."""
        x = self._pad(x).reshape(self.B, self.N, self.block, self.K, self.H // self.K, -1)
        return x.transpose(0, 1, 3, 4, 2, 5).reshape(self.B * self.N, *x.shape[3:5], self.block, -1)

    def join_queries(self, x: Float[Array, "BN K G Q D"]) -> Float[Array, "B T H D"]:
        x = x.reshape(self.B, self.N, *x.shape[1:]).transpose(0, 1, 4, 2, 3, 5)
        return x.reshape(self.B, self.N * self.block, self.H, -1)[:, : self.T]

    def split_keys(self, x: Float[Array, "B S K D"]) -> Float[Array, "BM K S D"]:
        return self._pad(x).reshape(self.B * self.M, self.block, self.K, -1).transpose(0, 2, 1, 3)

    def join_keys(self, x: Float[Array, "BM K S D"]) -> Float[Array, "B S K D"]:
        x = x.reshape(self.B, self.M, self.K, self.block, -1).transpose(0, 1, 3, 2, 4)
        return x.reshape(self.B, self.M * self.block, self.K, -1)[:, : self.S]

    def visit(self, table: BlockTable, block: Array, visit: Callable[[Array, bool, Any], Any], state: Any) -> Any:
        """Folds `visit(other block, masked, state)` over the active blocks of one block, numbered through all rows."""
        blocks_per_row, others_per_row = table.indices.shape[1:]
        row, index = block // blocks_per_row, block % blocks_per_row
        other_block = lambda i: row * others_per_row + table.indices[row, index, i]  # noqa: E731
        num_full, num_active = table.num_full[row, index], table.num_active[row, index]
        state = jax.lax.fori_loop(0, num_full, lambda i, state: visit(other_block(i), False, state), state)
        return jax.lax.fori_loop(num_full, num_active, lambda i, state: visit(other_block(i), True, state), state)

    def scores(self, q: Array, k: Array, a: Array, b: Array, masked: bool) -> Float[Array, "K S G Q"]:
        """Scaled float32 scores of query block `a` on key block `b`, `MASKED` where a query does not attend to a key.

        They lie keys by queries: reductions over keys then run on vectors of queries, where a CPU compiler would reduce
        a last axis one number at a time, to keep the order of its sums.
        """
        scores = _product("kgqd,ksd->ksgq", q, k) * q.shape[-1] ** -0.5
        if not masked:
            return scores
        q_labels = TokenLabels(*(x.reshape(-1, self.block)[a] for x in self.q_token_labels))
        kv_labels = TokenLabels(*(x.reshape(-1, self.block)[b] for x in self.kv_token_labels))
        offsets = jnp.arange(self.block)
        q_index = self.start + a % self.N * self.block + offsets
        mask = dense_mask(q_labels, kv_labels, q_index, b % self.M * self.block + offsets)
        return jnp.where(mask.T[:, None], scores, MASKED)
