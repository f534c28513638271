"""Attention by `Segments` in plain XLA, for CPU: FlashAttention-2 (Dao 2023, arXiv 2307.08691) over a worklist.

Only the (query block, key block) pairs in which something is visible are visited, forward and backward, and nothing
of size T x S exists.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from pallas_kernels.segments import MASKED, Segments, visible
from pallas_kernels.worklist import Worklist, sight, worklist

BLOCK = 64


def forward(
    q: Float[Array, "B T H D"],
    k: Float[Array, "B S K D"],
    v: Float[Array, "B S K D"],
    q_segments: Segments,
    kv_segments: Segments,
    q_start: Int[Array, ""],
) -> tuple[Float[Array, "B T H D"], Float[Array, "B T H"]]:
    """Output in the dtype of `q` and float32 log-sum-exp; what padding gets means nothing."""
    blocks = _Blocks(q.shape, k.shape, q_segments, kv_segments, q_start)
    q, k, v = blocks.queries(q), blocks.keys(k), blocks.keys(v)
    visits = blocks.visits()

    def visit(i: Array, state: tuple[Array, Array, Array]) -> tuple[Array, Array, Array]:
        a, b = visits.q_block[i], visits.kv_block[i]
        out, top, total = state  # unnormalised output, running maximum, running sum
        scores = blocks.scores(q[a], k[b], a, b)
        new_top = jnp.maximum(top[a], scores.max(1))
        weights = jnp.exp(scores - new_top[:, None])
        shrink = jnp.exp(top[a] - new_top)
        added = jnp.einsum("ksq,ksd->kqd", weights, v[b], preferred_element_type=jnp.float32)
        return (
            out.at[a].set(out[a] * shrink[..., None] + added),
            top.at[a].set(new_top),
            total.at[a].set(total[a] * shrink + weights.sum(1)),
        )

    # The running maximum starts above MASKED, so that a masked score has the weight exp(MASKED - top) = 0.
    rows = q.shape[:-1]
    start = (jnp.zeros(q.shape, jnp.float32), jnp.full(rows, MASKED / 2, jnp.float32), jnp.zeros(rows, jnp.float32))
    out, top, total = jax.lax.fori_loop(0, visits.length, visit, start)
    total = jnp.maximum(total, 1e-30)
    out = blocks.from_queries((out / total[..., None]).astype(q.dtype))
    return out, blocks.from_queries((top + jnp.log(total))[..., None])[..., 0]


def backward(
    q: Float[Array, "B T H D"],
    k: Float[Array, "B S K D"],
    v: Float[Array, "B S K D"],
    q_segments: Segments,
    kv_segments: Segments,
    q_start: Int[Array, ""],
    log_sum: Float[Array, "B T H"],
    correction: Float[Array, "B T H"],
    d_out: Float[Array, "B T H D"],
) -> tuple[Float[Array, "B T H D"], Float[Array, "B S K D"], Float[Array, "B S K D"]]:
    """float32 gradients of q, k and v; `correction` is sum(out * d_out) less the cotangent of the log-sum-exp."""
    blocks = _Blocks(q.shape, k.shape, q_segments, kv_segments, q_start)
    q, k, v, d_out = blocks.queries(q), blocks.keys(k), blocks.keys(v), blocks.queries(d_out.astype(jnp.float32))
    log_sum, correction = (blocks.queries(x[..., None])[..., 0] for x in (log_sum, correction))
    visits, scale = blocks.visits(), q.shape[-1] ** -0.5

    def visit(i: Array, grads: tuple[Array, Array, Array]) -> tuple[Array, Array, Array]:
        a, b = visits.q_block[i], visits.kv_block[i]
        dq, dk, dv = grads
        weights = jnp.exp(blocks.scores(q[a], k[b], a, b) - log_sum[a][:, None])
        d_weights = jnp.einsum("kqd,ksd->ksq", d_out[a], v[b], preferred_element_type=jnp.float32)
        d_scores = weights * (d_weights - correction[a][:, None]) * scale
        return (
            dq.at[a].add(jnp.einsum("ksq,ksd->kqd", d_scores, k[b], preferred_element_type=jnp.float32)),
            dk.at[b].add(jnp.einsum("ksq,kqd->ksd", d_scores, q[a], preferred_element_type=jnp.float32)),
            dv.at[b].add(jnp.einsum("ksq,kqd->ksd", weights, d_out[a], preferred_element_type=jnp.float32)),
        )

    zeros = tuple(jnp.zeros(x.shape, jnp.float32) for x in (q, k, v))
    dq, dk, dv = jax.lax.fori_loop(0, visits.length, visit, zeros)
    return blocks.from_queries(dq), blocks.from_keys(dk), blocks.from_keys(dv)


class _Blocks:
    """The shapes of one call: how rows are cut into blocks and put together again."""

    def __init__(
        self,
        q_shape: tuple[int, ...],
        k_shape: tuple[int, ...],
        q_segments: Segments,
        kv_segments: Segments,
        q_start: Array,
    ):
        self.B, self.T, self.H, _ = q_shape
        self.S, self.K = k_shape[1:3]
        self.block, self.start = min(BLOCK, self.S), q_start
        self.q_segments, self.kv_segments = (
            Segments(*(self._pad(jnp.asarray(y)) for y in x)) for x in (q_segments, kv_segments)
        )
        self.N, self.M = (x.example.shape[1] // self.block for x in (self.q_segments, self.kv_segments))

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

    def visits(self) -> Worklist:
        return worklist(sight(self.q_segments, self.kv_segments, self.start, self.block, self.block).some)

    def scores(self, q: Array, k: Array, a: Array, b: Array) -> Float[Array, "K S GQ"]:
        """Scaled float32 scores of query block `a` on key block `b`, `MASKED` where a query does not see a key.

        Keys by queries: reductions over keys then run on whole vectors of queries, where a CPU compiler would do a
        reduction over the last axis one number at a time to keep its order.
        """
        scores = jnp.einsum("kqd,ksd->ksq", q, k, preferred_element_type=jnp.float32) * q.shape[-1] ** -0.5
        q_labels = Segments(*(x.reshape(-1, self.block)[a] for x in self.q_segments))
        kv_labels = Segments(*(x.reshape(-1, self.block)[b] for x in self.kv_segments))
        here = jnp.arange(self.block)
        q_index = self.start + a % self.N * self.block + here
        mask = visible(q_labels, kv_labels, q_index, b % self.M * self.block + here)
        return jnp.where(jnp.tile(mask.T, (1, scores.shape[2] // self.block)), scores, MASKED)
