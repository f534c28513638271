"""Cross-entropy of a linear head, fused: the [N, V] logits never exist, and tokens without a target cost nothing."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int


@functools.partial(jax.custom_vjp, nondiff_argnums=(3,))
def linear_cross_entropy(
    hidden: Float[Array, "N D"], head: Float[Array, "V D"], targets: Int[Array, " N"], chunk: int = 512
) -> tuple[Float[Array, ""], Float[Array, ""]]:
    """Sum over the N tokens with targets >= 0 of -log softmax(head @ hidden)[target], and how many there are.

    Logits and sums are float32. Only the loss is differentiable; gradients come in the dtypes of the inputs.
    """
    loss, count, _ = _run(hidden, head, targets, chunk, gradients=False)
    return loss, count


def _run(hidden: Array, head: Array, targets: Array, chunk: int, gradients: bool) -> tuple[Array, Array, tuple]:
    N = hidden.shape[0]
    chunk = min(chunk, N)
    count = jnp.sum(targets >= 0)
    order = jnp.argsort(targets < 0, stable=True)  # tokens with a target first
    order = jnp.concatenate([order, jnp.full(-N % chunk, N, order.dtype)])  # index N: nobody, dropped by scatter

    def step(i: Array, state: tuple[Array, tuple]) -> tuple[Array, tuple]:
        loss, grads = state
        rows = jax.lax.dynamic_slice_in_dim(order, i * chunk, chunk)
        target = jnp.where(i * chunk + jnp.arange(chunk) < count, targets.at[rows].get(mode="clip"), -1)
        h = jnp.where(target[:, None] >= 0, hidden.at[rows].get(mode="clip"), 0)  # zero times NaN would be NaN
        logits = jnp.einsum("nd,vd->nv", h, head, preferred_element_type=jnp.float32)
        log_sum = jax.nn.logsumexp(logits, -1)
        picked = jnp.take_along_axis(logits, jnp.maximum(target, 0)[:, None], 1)[:, 0]
        loss += jnp.sum(jnp.where(target >= 0, log_sum - picked, 0))
        if gradients:
            d_logits = jnp.exp(logits - log_sum[:, None]).at[jnp.arange(chunk), jnp.maximum(target, 0)].add(-1)
            d_logits = jnp.where(target[:, None] >= 0, d_logits, 0)
            d_hidden, d_head = grads
            into_hidden = jnp.einsum("nv,vd->nd", d_logits, head, preferred_element_type=jnp.float32)
            into_head = jnp.einsum("nv,nd->vd", d_logits, h, preferred_element_type=jnp.float32)
            grads = d_hidden.at[rows].set(into_hidden, mode="drop"), d_head + into_head
        return loss, grads

    zeros = (jnp.zeros(hidden.shape, jnp.float32), jnp.zeros(head.shape, jnp.float32)) if gradients else ()
    loss, grads = jax.lax.fori_loop(0, (count + chunk - 1) // chunk, step, (jnp.zeros((), jnp.float32), zeros))
    return loss, count.astype(jnp.float32), grads


def _forward(hidden: Array, head: Array, targets: Array, chunk: int) -> tuple[tuple[Array, Array], tuple]:
    loss, count, (d_hidden, d_head) = _run(hidden, head, targets, chunk, gradients=True)
    return (loss, count), (d_hidden.astype(hidden.dtype), d_head.astype(head.dtype))


def _backward(chunk: int, grads: tuple[Array, Array], cotangents: tuple[Array, Array]) -> tuple[Array, Array, None]:
    d_loss, _ = cotangents
    d_hidden, d_head = grads
    return (d_loss * d_hidden).astype(d_hidden.dtype), (d_loss * d_head).astype(d_head.dtype), None


linear_cross_entropy.defvjp(_forward, _backward)
