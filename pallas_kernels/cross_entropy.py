"""Fused cross-entropy of a linear head: the [N, V] logits never exist, and tokens without a target cost nothing.

Axis letters: N tokens, D model dimension, V vocabulary (docs/glossary.md, "Axis letters").
"""

from __future__ import annotations

import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from pallas_kernels.distillation import SparseTeacher, forward_kl
from pallas_kernels.linear_loss import MASKED, LossPlan, fused_linear_loss, fused_linear_losses


def linear_cross_entropy(
    hidden: Float[Array, "N D"],
    head: Float[Array, "V D"],
    targets: Int[Array, " N"],
    weights: Float[Array, " N"] | None = None,
    chunk: int = 512,
    block: int = 8192,
) -> tuple[Float[Array, ""], Float[Array, ""]]:
    """Weighted cross-entropy, summed over tokens; differentiable in `hidden` and `head`, in their dtypes.

    Args:
      hidden: hidden states.
      head: the output matrix.
      targets: token ids; negative for no target. A target outside the vocabulary makes the loss NaN.
      weights: of the targets; by default 1.
      chunk, block: tokens and words whose logits are in memory at a time.

    Returns:
      float32: sum of -weight x log softmax(head @ hidden)[target] over tokens with a target, and the sum of weights.
    """
    weights = jnp.where(targets >= 0, 1.0 if weights is None else weights, 0)
    plan = LossPlan(SparseTeacher(forward_kl), 1.0, chunk, block)
    return fused_linear_loss(plan, (hidden, head), [], _one_hot_teacher(targets), weights)


def linear_log_probs(
    hidden: Float[Array, "N D"],
    head: Float[Array, "V D"],
    targets: Int[Array, " N"],
    chunk: int = 512,
    block: int = 8192,
) -> Float[Array, " N"]:
    """log softmax(head @ hidden)[target] of each token, for losses that are no weighted sum over tokens.

    Args as `linear_cross_entropy`, and differentiable like it.

    Returns:
      float32 [N]; 0 for tokens without a target.
    """
    plan = LossPlan(SparseTeacher(forward_kl), 1.0, chunk, block)
    return -fused_linear_losses(plan, (hidden, head), [], _one_hot_teacher(targets), targets >= 0)


def _one_hot_teacher(targets: Int[Array, " N"]) -> tuple[Int[Array, "N 1"], Float[Array, "N 2"]]:
    """A `SparseTeacher`'s input with all probability on the target: the forward KL from it is the cross-entropy."""
    return targets[:, None], jnp.broadcast_to(jnp.array([0, MASKED], jnp.float32), (len(targets), 2))
