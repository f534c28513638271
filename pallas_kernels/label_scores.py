"""Log-probabilities of a task's labels, by true float32 products.

A float32 product on a TPU is one bfloat16 pass unless the highest precision is requested: scores that differ in the
ninth bit would become ties, or change order. A task has few labels, so true products of their columns are nearly free.
The log-sum over the vocabulary is the same for all labels of a token: it may be off by a unit of the last place, which
moves all of them alike, but not by thousands. On a TPU and on a GPU a kernel sums it, see `log_sum_exp_tpu` and
`log_sum_exp_gpu`; elsewhere a loop of XLA's, which is also what the kernels are held to.

Axis letters: B batch dimensions, N tokens, L labels, D model dimension, V vocabulary (docs/glossary.md, "Axis
letters").
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any, Literal

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int

from pallas_kernels import log_sum_exp_gpu, log_sum_exp_tpu
from pallas_kernels.head_choice import choose_implementation
from pallas_kernels.linear_loss import MASKED, over_vocabulary


def label_log_probs(
    hidden: Float[Array, "*B N D"],
    head: Float[Array, "V D"],
    labels: Int[Array, "*B L"],
    normalize_over: Literal["vocabulary", "labels"],
    block: int = 4096,
    logits_dtype: DTypeLike = jnp.float32,
    vocabulary_over: Sequence[str] = (),
    parts: Literal[1, 2, 3] = 2,
    implementation: str | None = None,
) -> Float[Array, "*B N L"]:
    """log softmax(head @ hidden)[label] of each label.

    Args:
      hidden: hidden states of the tokens that predict a label.
      head: the output matrix, or this device's words of it.
      labels: token ids, a list for the N tokens of each batch entry; -1 for no label.
      normalize_over: the softmax runs over the whole vocabulary, or over the labels, which must differ.
      block: words of the vocabulary whose logits are in memory at a time, in XLA.
      logits_dtype: to round logits to before the softmax; less than float32 is for measuring what it costs.
      vocabulary_over: mesh axes that V is sharded over, inside `jax.shard_map`. One gather of L + 1 numbers for each
        token joins the devices' results; all get the same bits.
      parts: bfloat16 parts that the kernel splits float32 inputs into, for the log-sum over the vocabulary only: see
        `log_sum_exp_tpu.log_sum_exp`. One is for measuring what it costs.
      implementation: of the log-sum: "xla", "tpu" or "gpu", or one of these kernels "-interpreted"; by default
        `choose_implementation`.

    Returns:
      float32, whatever the inputs; -inf where there is no label, NaN for an id outside the vocabulary.

    Raises:
      ValueError: if the batch dimensions of `labels` are not those of `hidden`.
    """
    if labels.shape[:-1] != hidden.shape[:-2]:
        raise ValueError(f"labels {labels.shape} are not one list for each batch entry of hidden {hidden.shape}")
    V, axes = len(head), tuple(vocabulary_over)
    first, num_words = (jax.lax.axis_index(axes) * V, jax.lax.psum(1, axes) * V) if axes else (0, V)
    held = (labels >= first) & (labels < first + V)
    columns = jnp.take(head, jnp.where(held, labels - first, 0), 0)
    logits = jnp.where(held[..., None, :], _product("...nd,...ld->...nl", hidden, columns, logits_dtype), 0)
    if not implementation:
        exact = jnp.dtype(logits_dtype) == jnp.float32
        implementation = choose_implementation(hidden, head) if exact else "xla"
    lse = None
    if normalize_over == "vocabulary":
        tokens = hidden.reshape(-1, hidden.shape[-1])  # one matrix: the head is read once for all of them
        kernel, interpret = implementation.removesuffix("-interpreted"), implementation.endswith("-interpreted")
        if kernel == "tpu":
            lse, _ = log_sum_exp_tpu.log_sum_exp(tokens, head, parts=parts, interpret=interpret)
        elif kernel == "gpu":
            lse = log_sum_exp_gpu.log_sum_exp(tokens, head, parts=parts, interpret=interpret)
        else:
            lse = _log_sum_exp(tokens, head, block, logits_dtype)
        lse = lse.reshape(hidden.shape[:-1])
    if axes:
        logits, lse = _join_shards(logits, lse, axes)
    logits = jnp.where((labels < num_words)[..., None, :], logits, jnp.nan)
    logits = jnp.where((labels >= 0)[..., None, :], logits, -jnp.inf)
    if lse is None:
        lse = jax.nn.logsumexp(logits, -1)
    # The sum of a row without labels is -inf too, and -inf - -inf would be NaN.
    return jnp.where((labels >= 0)[..., None, :], logits - lse[..., None], -jnp.inf)


def _log_sum_exp(
    hidden: Float[Array, "N D"], head: Float[Array, "V D"], block: int, logits_dtype: DTypeLike
) -> Float[Array, " N"]:
    block = min(block, len(head))

    def visit(start: Any, words: Array, lse: Array) -> Array:
        block_head = jax.lax.dynamic_slice_in_dim(head, start, block)
        logits = _product("nd,vd->nv", hidden, block_head, logits_dtype)
        return jnp.logaddexp(lse, jax.nn.logsumexp(jnp.where(words >= 0, logits, MASKED), -1))

    return over_vocabulary(len(head), block, visit, jnp.full(len(hidden), MASKED, jnp.float32))


def _join_shards(
    logits: Float[Array, "*B N L"], lse: Float[Array, "*B N"] | None, axes: tuple[str, ...]
) -> tuple[Float[Array, "*B N L"], Float[Array, "*B N"] | None]:
    """The labels' logits, each of which is on one device and 0 on the others, and the log-sum of all devices' words."""
    gather = functools.partial(jax.lax.all_gather, axis_name=axes)
    if lse is None:
        return gather(logits).sum(0), None
    shards = gather(jnp.concatenate([logits, lse[..., None]], -1))
    return shards[..., :-1].sum(0), jax.nn.logsumexp(shards[..., -1], 0)


def _product(axes: str, a: Array, b: Array, dtype: DTypeLike) -> Float[Array, "N _"]:
    """A true float32 product, rounded to `dtype` and returned as float32.

    bfloat16 inputs multiply exactly in one pass; float32 inputs take as many passes as they need.
    """
    exact = jnp.einsum(axes, a, b, precision=jax.lax.Precision.HIGHEST, preferred_element_type=jnp.float32)
    return exact.astype(dtype).astype(jnp.float32)
