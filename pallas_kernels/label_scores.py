"""Log-probabilities of a task's labels, by true float32 products.

A float32 product on a TPU is one bfloat16 pass unless the highest precision is requested: scores that differ in the
ninth bit would become ties, or change order. A task has few labels, so true products are nearly free.

Axis letters: N tokens, L labels, D model dimension, V vocabulary (docs/glossary.md, "Axis letters").
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
    """log softmax(head @ hidden)[label] of each label.

    Args:
      hidden: hidden states of the tokens that predict a label.
      head: the output matrix.
      labels: token ids, one list for all tokens or one for each; -1 for no label.
      normalize_over: the softmax runs over the whole vocabulary, or over the labels, which must differ.
      block: words of the vocabulary whose logits are in memory at a time.
      logits_dtype: to round logits to before the softmax; less than float32 is for measuring what it costs.

    Returns:
      float32 [N, L], whatever the inputs; -inf where there is no label, NaN for an id outside the vocabulary.
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
    # The sum of a row without labels is -inf too, and -inf - -inf would be NaN.
    return jnp.where(labels >= 0, logits - lse[:, None], -jnp.inf)


def _product(axes: str, a: Array, b: Array, dtype: DTypeLike) -> Float[Array, "N _"]:
    """A true float32 product, rounded to `dtype` and returned as float32.

    bfloat16 inputs multiply exactly in one pass; float32 inputs take as many passes as they need.
    """
    exact = jnp.einsum(axes, a, b, precision=jax.lax.Precision.HIGHEST, preferred_element_type=jnp.float32)
    return exact.astype(dtype).astype(jnp.float32)
