"""Attention by `TokenLabels`: softmax(q k^T / sqrt(D)) v over the keys that each query attends to.

`attention` is what models call: it runs the kernel of the platform that it is traced for. `attention_reference` is
the definition, dense and for short rows only.

Axis letters: B rows, T queries, S keys, H query heads, K key-value heads, D size of a head (docs/glossary.md, "Axis
letters").
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from pallas_kernels import attention_gpu, attention_tpu, attention_xla
from pallas_kernels.platform import platform
from pallas_kernels.token_labels import MASKED, PADDING, TokenLabels, dense_mask


def attention(
    q: Float[Array, "B T H D"],
    k: Float[Array, "B S K D"],
    v: Float[Array, "B S K D"],
    token_labels: TokenLabels,
    q_start: Int[Array, ""] | int | None = None,
    implementation: str | None = None,
) -> tuple[Float[Array, "B T H D"], Float[Array, "B T H"]]:
    """Attention of T queries over S keys, differentiable in q, k and v; memory is linear in T and S.

    Softmax and sums are float32. Products of bfloat16 inputs are bfloat16, products of float32 inputs true float32.
    Padding queries get zeros; padding keys, whatever they hold, affect neither outputs nor gradients.

    Args:
      q: queries of H heads, a multiple of K; T may be less than S.
      k: keys of K heads, for example of a cached prefix and then of the candidates behind it.
      v: their values.
      token_labels: labels [B, S] of the keys.
      q_start: index of the first query in the row of the keys; by default the queries are the last T tokens.
      implementation: "xla", "tpu", "gpu", "tpu-interpreted" or "gpu-interpreted"; by default the platform's fastest.

    Returns:
      The output [B, T, H, D] in the dtype of `q`, and the float32 log-sum-exp [B, T, H] of each query's scaled scores,
      which is undefined for padding.

    Examples:
      An example of four tokens (two of a prefix, two questions of one token each) and one token of padding. Equal
      queries and keys make a token's output the mean of the values that it attends to: a question attends to the
      prefix and to itself, not to the other question.

      >>> import jax.numpy as jnp
      >>> from pallas_kernels.attention import attention
      >>> from pallas_kernels.token_labels import ALL, SELF, TokenLabels
      >>> labels = TokenLabels(
      ...     example_id=jnp.array([[1, 1, 1, 1, 0]]),
      ...     piece_id=jnp.array([[0, 0, 1, 2, 0]]),
      ...     visibility=jnp.array([[ALL, ALL, SELF, SELF, 0]]),
      ... )
      >>> q = k = jnp.ones((1, 5, 1, 8))
      >>> v = jnp.array([3.0, 5.0, 10.0, 1.0, 9.0]).reshape(1, 5, 1, 1) * jnp.ones(8)
      >>> out, lse = attention(q, k, v, labels)
      >>> [round(value) for value in out[0, :, 0, 0].tolist()]
      [3, 4, 6, 3, 0]
      >>> lse.shape
      (1, 5, 1)
    """
    T, S = q.shape[1], k.shape[1]
    start = jnp.asarray(S - T if q_start is None else q_start, jnp.int32)
    kv_labels = TokenLabels(*(jnp.asarray(x) for x in token_labels))
    q_labels = TokenLabels(*(jax.lax.dynamic_slice_in_dim(x, start, T, 1) for x in kv_labels))
    # Whatever padding holds, a weight of zero times NaN included, reaches neither an output nor a gradient.
    q_real, kv_real = ((x.example_id != PADDING)[..., None, None] for x in (q_labels, kv_labels))
    q, k, v = jnp.where(q_real, q, 0), jnp.where(kv_real, k, 0), jnp.where(kv_real, v, 0)
    out, lse = _attend(q, k, v, q_labels, kv_labels, start, implementation or _default(T))
    return jnp.where(q_real, out, 0), lse


def attention_reference(
    q: Float[Array, "B T H D"],
    k: Float[Array, "B S K D"],
    v: Float[Array, "B S K D"],
    token_labels: TokenLabels,
    q_start: int | None = None,
) -> tuple[Float[Array, "B T H D"], Float[Array, "B T H"]]:
    """The definition of `attention`, computed in the dtype of `q`; memory grows with T x S.

    Args and returns as `attention`; outputs of padding are undefined.
    """
    B, T, H, D = q.shape
    S, K = k.shape[1:3]
    index = np.arange(T) + (S - T if q_start is None else q_start)
    mask = dense_mask(TokenLabels(*(x[:, index] for x in token_labels)), token_labels, index, np.arange(S))[
        :, None, None
    ]
    scores = jnp.einsum("btkgd,bskd->bkgts", q.reshape(B, T, K, H // K, D), k) / D**0.5
    scores = jnp.where(mask, scores, MASKED)
    weights = jnp.where(mask, jax.nn.softmax(scores, axis=-1), 0)  # the softmax of a fully masked row is uniform
    lse = jax.nn.logsumexp(scores, -1).transpose(0, 3, 1, 2).reshape(B, T, H)
    return jnp.einsum("bkgts,bskd->btkgd", weights, v).reshape(q.shape), lse


def _default(num_queries: int) -> str:
    """The platform's kernel; XLA for one query on a GPU, where the kernel would loop over all keys in one program."""
    native = platform()
    return native if native == "tpu" or (native == "gpu" and num_queries > 1) else "xla"


def _choose(implementation: str, direction: str) -> Callable:
    """The function "forward" or "backward" of an implementation."""
    name, _, interpreted = implementation.partition("-")
    function = getattr({"xla": attention_xla, "tpu": attention_tpu, "gpu": attention_gpu}[name], direction)
    return functools.partial(function, interpret=True) if interpreted else function


@functools.partial(jax.custom_vjp, nondiff_argnums=(6,))
def _attend(
    q: Array,
    k: Array,
    v: Array,
    q_labels: TokenLabels,
    kv_labels: TokenLabels,
    start: Array,
    implementation: str,
) -> tuple[Array, Array]:
    return _choose(implementation, "forward")(q, k, v, q_labels, kv_labels, start)


def _forward(*args: Any) -> tuple[tuple[Array, Array], tuple]:
    out, lse = _attend(*args)
    return (out, lse), (*args[:6], out, lse)


def _backward(implementation: str, residuals: tuple, cotangents: tuple[Array, Array]) -> tuple:
    q, k, v, q_labels, kv_labels, start, out, lse = residuals
    d_out, d_lse = cotangents
    # A kernel may compute padding against keys that the forward pass skipped: its weights are multiplied with zeros,
    # so they must be finite.
    lse = jnp.where((q_labels.example_id != PADDING)[..., None], lse, 0)
    # The row term D of FlashAttention-2, section 3.1.2; d lse / d scores = weights, so d_lse enters with it.
    delta = jnp.sum(d_out.astype(jnp.float32) * out.astype(jnp.float32), -1) - d_lse
    function = _choose(implementation, "backward")
    grads = function(q, k, v, q_labels, kv_labels, start, lse, delta, d_out)
    return *(grad.astype(x.dtype) for grad, x in zip(grads, (q, k, v), strict=True)), None, None, None


_attend.defvjp(_forward, _backward)
