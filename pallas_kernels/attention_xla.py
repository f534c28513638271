"""Attention by `TokenLabels` in plain XLA, for CPU: FlashAttention-2 (Dao 2023, arXiv 2307.08691) over tables of
blocks.

Each block of queries goes through the blocks of keys that it meets, so nothing of size T x S exists, and the sums of
one block stay in the processor's cache. Masks are made only where a block is seen in part: on a CPU they cost more
than the products. One query, on a GPU as well, is a dense product.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from pallas_kernels.platform import precision
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
    """Output in the dtype of `q` and float32 log-sum-exp; what padding gets means nothing."""
    if q.shape[1] == 1:
        return _of_one_query(q, k, v, q_token_labels, kv_token_labels, q_start)
    blocks = _Blocks(q.shape, k.shape, q_token_labels, kv_token_labels, q_start)
    met = block_table(blocks.sight)  # not in the loop, where XLA would make it for every block anew
    q_blocks, k, v = blocks.queries(q), blocks.keys(k), blocks.keys(v)

    def of_queries(a: Array) -> tuple[Array, Array]:
        def visit(b: Array, masked: bool, state: tuple[Array, Array, Array]) -> tuple[Array, Array, Array]:
            out, top, total = state  # unnormalised output, running maximum, running sum
            scores = blocks.scores(q_blocks[a], k[b], a, b, masked)
            new_top = jnp.maximum(top, scores.max(1))
            weights = jnp.exp(scores - new_top[:, None])
            shrink = jnp.exp(top - new_top)
            added = jnp.einsum("ksd,ksq->kdq", v[b], weights, preferred_element_type=jnp.float32)
            return out * shrink[:, None] + added, new_top, total * shrink + weights.sum(1)

        K, GQ, D = q_blocks.shape[1:]
        start = (jnp.zeros((K, D, GQ)), jnp.full((K, GQ), INITIAL_MAX), jnp.zeros((K, GQ)))
        out, top, total = blocks.visit(met, a, visit, start)
        total = jnp.maximum(total, 1e-30)
        return (out / total[:, None]).mT.astype(q.dtype), top + jnp.log(total)

    out, log_sum = jax.lax.map(of_queries, jnp.arange(len(q_blocks)))
    return blocks.from_queries(out), blocks.from_queries(log_sum[..., None])[..., 0]


def _of_one_query(
    q: Array, k: Array, v: Array, q_token_labels: TokenLabels, kv_token_labels: TokenLabels, q_start: Array
) -> tuple[Array, Array]:
    """Decoding. Dense: scores are no more than the keys, and a block would be nearly all padding."""
    B, _, H, D = q.shape
    S, K = k.shape[1:3]
    product = functools.partial(jnp.einsum, preferred_element_type=jnp.float32, precision=precision(q.dtype))
    mask = dense_mask(q_token_labels, kv_token_labels, q_start[None], jnp.arange(S))[:, None]
    scores = product("bkgd,bskd->bkgs", q.reshape(B, K, H // K, D), k)
    scores = jnp.where(mask, scores * D**-0.5, MASKED)
    log_sum = jax.nn.logsumexp(scores, -1, keepdims=True)
    out = product("bkgs,bskd->bkgd", jnp.exp(scores - log_sum).astype(v.dtype), v)
    return out.reshape(q.shape).astype(q.dtype), log_sum.reshape(B, 1, H)


def backward(
    q: Float[Array, "B T H D"],
    k: Float[Array, "B S K D"],
    v: Float[Array, "B S K D"],
    q_token_labels: TokenLabels,
    kv_token_labels: TokenLabels,
    q_start: Int[Array, ""],
    log_sum: Float[Array, "B T H"],
    correction: Float[Array, "B T H"],
    d_out: Float[Array, "B T H D"],
) -> tuple[Float[Array, "B T H D"], Float[Array, "B S K D"], Float[Array, "B S K D"]]:
    """float32 gradients of q, k and v; `correction` is sum(out * d_out) less the cotangent of the log-sum-exp."""
    blocks = _Blocks(q.shape, k.shape, q_token_labels, kv_token_labels, q_start)
    met = block_table(blocks.sight, by_key=True)
    q, k, v, d_out = blocks.queries(q), blocks.keys(k), blocks.keys(v), blocks.queries(d_out.astype(jnp.float32))
    log_sum, correction = (blocks.queries(x[..., None])[..., 0] for x in (log_sum, correction))
    scale = q.shape[-1] ** -0.5

    def of_keys(dq: Array, b: Array) -> tuple[Array, tuple[Array, Array]]:
        def visit(a: Array, masked: bool, grads: tuple[Array, Array, Array]) -> tuple[Array, Array, Array]:
            dq, dk, dv = grads
            weights = jnp.exp(blocks.scores(q[a], k[b], a, b, masked) - log_sum[a][:, None])
            d_weights = jnp.einsum("kqd,ksd->ksq", d_out[a], v[b], preferred_element_type=jnp.float32)
            d_scores = weights * (d_weights - correction[a][:, None]) * scale
            return (
                dq.at[a].add(jnp.einsum("ksq,ksd->kqd", d_scores, k[b], preferred_element_type=jnp.float32)),
                dk + jnp.einsum("ksq,kqd->ksd", d_scores, q[a], preferred_element_type=jnp.float32),
                dv + jnp.einsum("ksq,kqd->ksd", weights, d_out[a], preferred_element_type=jnp.float32),
            )

        zeros = jnp.zeros(k.shape[1:])
        dq, dk, dv = blocks.visit(met, b, visit, (dq, zeros, zeros))
        return dq, (dk, dv)

    dq, (dk, dv) = jax.lax.scan(of_keys, jnp.zeros(q.shape), jnp.arange(len(k)))
    return blocks.from_queries(dq), blocks.from_keys(dk), blocks.from_keys(dv)


class _Blocks:
    """The shapes of one call: how rows are cut into blocks and put together again; who meets whom."""

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
        self.sight = block_visibility(self.q_token_labels, self.kv_token_labels, q_start, self.block, self.block)

    def _pad(self, x: Array) -> Array:
        return jnp.pad(x, [(0, -x.shape[n] % self.block if n == 1 else 0) for n in range(x.ndim)])

    def queries(self, x: Float[Array, "B T H D"]) -> Float[Array, "BN K GQ D"]:
        """The query heads of a group are stacked, so that one matrix product serves them all."""
        G = self.H // self.K
        x = self._pad(x).reshape(self.B * self.N, self.block, self.K, G, -1)
        return x.transpose(0, 2, 3, 1, 4).reshape(self.B * self.N, self.K, G * self.block, -1)

    def from_queries(self, x: Float[Array, "BN K GQ D"]) -> Float[Array, "B T H D"]:
        x = x.reshape(self.B, self.N, self.K, self.H // self.K, self.block, -1).transpose(0, 1, 4, 2, 3, 5)
        return x.reshape(self.B, self.N * self.block, self.H, -1)[:, : self.T]

    def keys(self, x: Float[Array, "B S K D"]) -> Float[Array, "BM K S D"]:
        return self._pad(x).reshape(self.B * self.M, self.block, self.K, -1).transpose(0, 2, 1, 3)

    def from_keys(self, x: Float[Array, "BM K S D"]) -> Float[Array, "B S K D"]:
        x = x.reshape(self.B, self.M, self.K, self.block, -1).transpose(0, 1, 3, 2, 4)
        return x.reshape(self.B, self.M * self.block, self.K, -1)[:, : self.S]

    def visit(self, met: BlockTable, block: Array, visit: Callable[[Array, bool, Any], Any], state: Any) -> Any:
        """Folds `visit(other block, masked, state)` over the blocks that one meets; blocks count through all rows."""
        own, others = met.indices.shape[1:]
        row, place = block // own, block % own
        number = lambda i: row * others + met.indices[row, place, i]  # noqa: E731
        whole, all_met = met.num_full[row, place], met.num_active[row, place]
        state = jax.lax.fori_loop(0, whole, lambda i, state: visit(number(i), False, state), state)
        return jax.lax.fori_loop(whole, all_met, lambda i, state: visit(number(i), True, state), state)

    def scores(self, q: Array, k: Array, a: Array, b: Array, masked: bool) -> Float[Array, "K S GQ"]:
        """Scaled float32 scores of query block `a` on key block `b`, `MASKED` where a query does not see a key.

        Keys by queries: reductions over keys then run on whole vectors of queries, where a CPU compiler would do a
        reduction over the last axis one number at a time to keep its order.
        """
        scores = jnp.einsum("kqd,ksd->ksq", q, k, preferred_element_type=jnp.float32) * q.shape[-1] ** -0.5
        if not masked:
            return scores
        q_labels = TokenLabels(*(x.reshape(-1, self.block)[a] for x in self.q_token_labels))
        kv_labels = TokenLabels(*(x.reshape(-1, self.block)[b] for x in self.kv_token_labels))
        here = jnp.arange(self.block)
        q_index = self.start + a % self.N * self.block + here
        mask = dense_mask(q_labels, kv_labels, q_index, b % self.M * self.block + here)
        K, S, GQ = scores.shape
        return jnp.where(mask.T[:, None], scores.reshape(K, S, -1, self.block), MASKED).reshape(K, S, GQ)
