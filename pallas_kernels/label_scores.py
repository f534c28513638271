"""Log-probabilities of a task's labels, in products that are float32 in truth.

A float32 product on a TPU is one pass of bfloat16 unless the highest precision is asked for: scores that differ in the
ninth bit become ties or change places. Here the few columns of the labels make true products nearly free.
"""

from __future__ import annotations

from typing import Any, Literal

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int

from pallas_kernels.linear_loss import MASKED, over_vocabulary


def label_log_probs(
    hidden: Float[Array, "N D"],
    head: Float[Array, "V D"],
    labels: Int[Array, "N L"] | Int[Array, " L"],
    normalize_over: Literal["vocabulary", "labels"],
    block: int = 4096,
    logits_dtype: DTypeLike = jnp.float32,
) -> Float[Array, "N _"]:
    """log softmax(head @ hidden)[label], float32 whatever the inputs.

    Args:
      labels: word ids, the same for all N or for each; -1 is no label and gets -inf, an id beyond the head NaN.
      against: what the softmax runs over: all V words, streamed `block` at a time, or the labels, which differ.
      logits_dtype: what logits are rounded to before the softmax: less than float32 is for measuring what it costs.
    """
    N = len(hidden)
    columns = jnp.take(head, labels, 0, mode="fill", fill_value=jnp.nan)
    logits = _product("nd,ld->nl" if labels.ndim == 1 else "nd,nld->nl", hidden, columns, logits_dtype)
    logits = jnp.where(labels >= 0, logits, -jnp.inf)
    if normalize_over == "labels":
        lse = jax.nn.logsumexp(logits, -1)
    else:
        block = min(block, len(head))

        def visit(start: Any, words: Array, lse: Array) -> Array:
            block_logits = _product("nd,vd->nv", hidden, jax.lax.dynamic_slice_in_dim(head, start, block), logits_dtype)
            return jnp.logaddexp(lse, jax.nn.logsumexp(jnp.where(words >= 0, block_logits, MASKED), -1))

        lse = over_vocabulary(len(head), block, visit, jnp.full(N, MASKED, jnp.float32))
    # A row without a label has no sum either: -inf less -inf would be NaN.
    return jnp.where(labels >= 0, logits - lse[:, None], -jnp.inf)


def _product(axes: str, a: Array, b: Array, dtype: DTypeLike) -> Float[Array, "N _"]:
    """float32 in truth: bfloat16 inputs multiply exactly in one pass, float32 inputs take the passes they need.

    Then rounded to `dtype`, and float32 all the same.
    """
    exact = jnp.einsum(axes, a, b, precision=jax.lax.Precision.HIGHEST, preferred_element_type=jnp.float32)
    return exact.astype(dtype).astype(jnp.float32)
