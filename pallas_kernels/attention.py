"""Attention by `Segments`: softmax(q k^T / sqrt(D)) v over what each token sees.

`attention` is what models call. `attention_reference` is the definition, dense and for short rows only.
`attention_blockwise` is FlashAttention-2 (Dao 2023, arXiv 2307.08691) in plain XLA over a worklist: only the
(query block, key block) pairs in which something is visible are visited, forward and backward, and nothing of
size T x T exists.
"""

from __future__ import annotations

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from pallas_kernels.segments import PADDING, Segments, may_see, visible

MASKED = -1e30  # finite, so that a block without a visible key gives weights of zero and not NaN


def attention(
    q: Float[Array, "B T H D"], k: Float[Array, "B T K D"], v: Float[Array, "B T K D"], segments: Segments
) -> Float[Array, "B T H D"]:
    """Attention of rows over themselves; H is a multiple of K (grouped-query heads). Padding gets zeros."""
    return attention_blockwise(q, k, v, segments)


def attention_reference(
    q: Float[Array, "B T H D"], k: Float[Array, "B T K D"], v: Float[Array, "B T K D"], segments: Segments
) -> Float[Array, "B T H D"]:
    """The definition, in the dtype of `q`: memory grows with T^2."""
    B, T, H, D = q.shape
    K = k.shape[2]
    index = jnp.arange(T)
    mask = visible(segments, segments, index, index)[:, None, None]
    scores = jnp.einsum("btkgd,bskd->bkgts", q.reshape(B, T, K, H // K, D), k) / D**0.5
    weights = jax.nn.softmax(jnp.where(mask, scores, MASKED), axis=-1)
    weights = jnp.where(mask, weights, 0)  # a row that sees nothing sees everything in the softmax
    return jnp.einsum("bkgts,bskd->btkgd", weights, v).reshape(q.shape)


def attention_blockwise(
    q: Float[Array, "B T H D"],
    k: Float[Array, "B T K D"],
    v: Float[Array, "B T K D"],
    segments: Segments,
    block: int = 64,
) -> Float[Array, "B T H D"]:
    """As `attention_reference`, with softmax and accumulation in float32 and memory linear in T."""
    B, T, H, D = q.shape
    K = k.shape[2]
    block = min(block, T)
    segments = jax.tree.map(jnp.asarray, segments)
    # Whatever padding holds, a weight of zero times NaN included, reaches neither an output nor a gradient.
    real = (segments.example != PADDING)[..., None, None]
    q, k, v = (jnp.where(real, x, 0) for x in (q, k, v))
    pad = -T % block
    if pad:
        widths = ((0, 0), (0, pad))
        q, k, v = (jnp.pad(x, (*widths, (0, 0), (0, 0))) for x in (q, k, v))
        segments = Segments(*(jnp.pad(x, widths, constant_values=PADDING) for x in segments))
    N = (T + pad) // block
    # The query heads of a group are stacked, so that one matrix product serves them all.
    q = q.reshape(B * N, block, K, H // K, D).transpose(0, 2, 3, 1, 4).reshape(B * N, K, H // K * block, D)
    k, v = (x.reshape(B * N, block, K, D).transpose(0, 2, 1, 3) for x in (k, v))
    out = _flash(q, k, v, segments, block)
    out = out.reshape(B, N, K, H // K, block, D).transpose(0, 1, 4, 2, 3, 5).reshape(B, N * block, H, D)
    return jnp.where(real, out[:, :T], 0)


class Worklist(NamedTuple):
    """The visits: which query block meets which key block (blocks of all rows counted through), `length` of them."""

    q_block: Int[Array, " M"]
    kv_block: Int[Array, " M"]
    length: Int[Array, ""]


def worklist(segments: Segments, block: int) -> Worklist:
    """The pairs of blocks to visit, row by row, each query block's together; T divides by `block`."""
    pairs = may_see(segments, block)
    B, N, _ = pairs.shape
    visits = jnp.nonzero(pairs.reshape(-1), size=B * N * (N + 1) // 2, fill_value=0)[0]
    row, q_block, kv_block = visits // (N * N), visits // N % N, visits % N
    return Worklist(row * N + q_block, row * N + kv_block, jnp.sum(pairs))


@functools.partial(jax.custom_vjp, nondiff_argnums=(4,))
def _flash(
    q: Float[Array, "M K GQ D"], k: Float[Array, "M K S D"], v: Float[Array, "M K S D"], segments: Segments, block: int
) -> Float[Array, "M K GQ D"]:
    return _forward(q, k, v, segments, block)[0]


def _forward(q: Array, k: Array, v: Array, segments: Segments, block: int) -> tuple[Array, tuple]:
    visits = worklist(segments, block)

    def visit(i: Array, state: tuple[Array, Array, Array]) -> tuple[Array, Array, Array]:
        a, b = visits.q_block[i], visits.kv_block[i]
        out, top, total = state  # unnormalised output, running maximum, running sum
        scores = _scores(q[a], k[b], segments, a, b, block)
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
    out = (out / jnp.maximum(total, 1e-30)[..., None]).astype(q.dtype)
    log_sum = top + jnp.log(jnp.maximum(total, 1e-30))
    return out, (q, k, v, segments, out, log_sum)


def _backward(block: int, residuals: tuple, d_out: Array) -> tuple[Array, Array, Array, None]:
    q, k, v, segments, out, log_sum = residuals
    visits = worklist(segments, block)
    scale = q.shape[-1] ** -0.5
    d_out = d_out.astype(jnp.float32)
    correction = jnp.sum(d_out * out.astype(jnp.float32), -1)

    def visit(i: Array, grads: tuple[Array, Array, Array]) -> tuple[Array, Array, Array]:
        a, b = visits.q_block[i], visits.kv_block[i]
        dq, dk, dv = grads
        weights = jnp.exp(_scores(q[a], k[b], segments, a, b, block) - log_sum[a][:, None])
        d_weights = jnp.einsum("kqd,ksd->ksq", d_out[a], v[b], preferred_element_type=jnp.float32)
        d_scores = weights * (d_weights - correction[a][:, None]) * scale
        return (
            dq.at[a].add(jnp.einsum("ksq,ksd->kqd", d_scores, k[b], preferred_element_type=jnp.float32)),
            dk.at[b].add(jnp.einsum("ksq,kqd->ksd", d_scores, q[a], preferred_element_type=jnp.float32)),
            dv.at[b].add(jnp.einsum("ksq,kqd->ksd", weights, d_out[a], preferred_element_type=jnp.float32)),
        )

    zeros = tuple(jnp.zeros(x.shape, jnp.float32) for x in (q, k, v))
    dq, dk, dv = jax.lax.fori_loop(0, visits.length, visit, zeros)
    return dq.astype(q.dtype), dk.astype(k.dtype), dv.astype(v.dtype), None


_flash.defvjp(_forward, _backward)


def _scores(q: Array, k: Array, segments: Segments, a: Array, b: Array, block: int) -> Float[Array, "K S GQ"]:
    """Scaled float32 scores of query block `a` on key block `b`, `MASKED` where a query does not see a key.

    Keys by queries: reductions over keys then run on whole vectors of queries, where a CPU compiler would do a
    reduction over the last axis one number at a time to keep its order.
    """
    scores = jnp.einsum("kqd,ksd->ksq", q, k, preferred_element_type=jnp.float32) * q.shape[-1] ** -0.5
    labels = Segments(*(x.reshape(-1, block) for x in segments))
    here = jnp.arange(block)
    q_labels, kv_labels = (Segments(*(x[at] for x in labels)) for at in (a, b))
    mask = visible(q_labels, kv_labels, a * block + here, b * block + here)
    return jnp.where(jnp.tile(mask.T, (1, scores.shape[2] // block)), scores, MASKED)
