"""Fused cross-entropy of a linear head: the [N, V] logits never exist, and tokens without a target cost nothing.

On a TPU, kernels compute bfloat16 inputs: `log_sum_exp_tpu` the loss, `head_gradients_tpu` its gradients. Elsewhere,
and for float32, a loop of XLA's does both: see `linear_loss`.

Axis letters: N tokens, D model dimension, V vocabulary (docs/glossary.md, "Axis letters").
"""

from __future__ import annotations

import functools
from collections.abc import Sequence

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from pallas_kernels import head_gradients_tpu
from pallas_kernels.distillation import SparseTeacher, forward_kl
from pallas_kernels.linear_loss import (
    MASKED,
    LossPlan,
    compact,
    default_chunk,
    fused_linear_loss,
    fused_linear_losses,
)
from pallas_kernels.log_sum_exp_tpu import choose_implementation, log_sum_exp


def linear_cross_entropy(
    hidden: Float[Array, "N D"],
    head: Float[Array, "V D"],
    targets: Int[Array, " N"],
    weights: Float[Array, " N"] | None = None,
    chunk: int | None = None,
    block: int = 8192,
    implementation: str | None = None,
) -> tuple[Float[Array, ""], Float[Array, ""]]:
    """Weighted cross-entropy, summed over tokens; differentiable in `hidden` and `head`, in their dtypes.

    Args:
      hidden: hidden states.
      head: the output matrix.
      targets: token ids; negative for no target. A target outside the vocabulary makes the loss NaN.
      weights: of the targets; by default 1.
      chunk, block: tokens (by default `default_chunk`) and words whose logits are in memory at a time, in XLA.
      implementation: "xla", "tpu" or "tpu-interpreted"; by default the fastest for the platform and these shapes.

    Returns:
      float32: sum of -weight x log softmax(head @ hidden)[target] over tokens with a target, and the sum of weights.
    """
    weights = jnp.where(targets >= 0, 1.0 if weights is None else weights, 0).astype(jnp.float32)
    implementation = implementation or _choose(hidden, head)
    if implementation != "xla":
        weights = jax.lax.stop_gradient(weights)
        losses = _token_losses(implementation == "tpu-interpreted", hidden, head, targets, weights != 0)
        return jnp.sum(weights * losses), jnp.sum(weights)
    plan = LossPlan(SparseTeacher(forward_kl), 1.0, chunk or default_chunk(), block)
    return fused_linear_loss(plan, (hidden, head), [], _one_hot_teacher(targets), weights)


def linear_log_probs(
    hidden: Float[Array, "N D"],
    head: Float[Array, "V D"],
    targets: Int[Array, " N"],
    chunk: int | None = None,
    block: int = 8192,
    implementation: str | None = None,
) -> Float[Array, " N"]:
    """log softmax(head @ hidden)[target] of each token, for losses that are no weighted sum over tokens.

    Differentiable like `linear_cross_entropy`.

    Args:
      hidden: hidden states.
      head: the output matrix.
      targets: token ids; negative for no target.
      chunk: tokens whose logits are in memory at a time, in XLA; by default `default_chunk`.
      block: words whose logits are in memory at a time, in XLA.
      implementation: as of `linear_cross_entropy`.

    Returns:
      float32 [N]; 0 for tokens without a target.
    """
    implementation = implementation or _choose(hidden, head)
    if implementation != "xla":
        return -_token_losses(implementation == "tpu-interpreted", hidden, head, targets, targets >= 0)
    plan = LossPlan(SparseTeacher(forward_kl), 1.0, chunk or default_chunk(), block)
    return -fused_linear_losses(plan, (hidden, head), [], _one_hot_teacher(targets), targets >= 0)


def _choose(hidden: Float[Array, "N D"], head: Float[Array, "V D"]) -> str:
    both_bfloat16 = hidden.dtype == head.dtype == jnp.bfloat16
    return choose_implementation(hidden, head) if both_bfloat16 else "xla"


def _one_hot_teacher(targets: Int[Array, " N"]) -> tuple[Int[Array, "N 1"], Float[Array, "N 2"]]:
    """A `SparseTeacher`'s input with all probability on the target: the forward KL from it is the cross-entropy."""
    return targets[:, None], jnp.broadcast_to(jnp.array([0, MASKED], jnp.float32), (len(targets), 2))


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _token_losses(
    interpret: bool,
    hidden: Float[Array, "N D"],
    head: Float[Array, "V D"],
    targets: Int[Array, " N"],
    counts: Bool[Array, " N"],
) -> Float[Array, " N"]:
    """The cross-entropy of each token that counts, by the TPU's kernels; 0 for the others, whatever they hold."""
    return _forward(interpret, hidden, head, targets, counts)[0]


def _forward(
    interpret: bool, hidden: Array, head: Array, targets: Array, counts: Array
) -> tuple[Array, tuple[Array, ...]]:
    gather, put_back = compact(counts)
    lse, logits = log_sum_exp(gather(hidden), head, gather(targets), jnp.sum(counts), interpret=interpret)
    losses = jnp.where(gather(targets) < len(head), lse - logits, jnp.nan)
    return put_back(losses), (hidden, head, targets, counts, put_back(lse))


def _backward(interpret: bool, saved: tuple[Array, ...], d_losses: Array) -> tuple[Array, Array, None, None]:
    hidden, head, targets, counts, lse = saved
    gather, put_back = compact(counts)
    rows = [gather(x) for x in (lse, targets, d_losses)]
    d_hidden, d_head, _ = head_gradients_tpu.gradients(
        [(gather(hidden), head)], rows, logits_gradient, jnp.sum(counts), interpret=interpret
    )
    return put_back(d_hidden).astype(hidden.dtype), d_head, None, None


_token_losses.defvjp(_forward, _backward)


def logits_gradient(logits: Sequence[Array], ids: Array, rows: Sequence[Array]) -> tuple[Array, None]:
    """The cross-entropy as a `head_gradients_tpu.TileGradient`: a token's rows are its log-sum, target and weight."""
    lse, target, weight = rows
    return (jnp.exp(logits[0] - lse) - jnp.where(ids == target, 1.0, 0.0)) * weight, None
