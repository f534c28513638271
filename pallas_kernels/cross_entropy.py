"""Cross-entropy of a linear head, fused: the [N, V] logits never exist, and tokens without a target cost nothing."""

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
    """Sum over the N tokens with targets >= 0 of -weight x log softmax(head @ hidden)[target], and of the weights.

    Without `weights` each weighs 1, and the second sum is how many there are. Sums are float32. Differentiable in
    `hidden` and `head`, in their dtypes. `chunk` tokens and `block` words are held at a time. A target that is no word
    of the head makes the loss NaN.
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
    """log softmax(head @ hidden)[target] of each token with a target >= 0, and zero for the others; float32.

    For losses that are no sum over tokens. Differentiable in `hidden` and `head`, as `linear_cross_entropy`.
    """
    plan = LossPlan(SparseTeacher(forward_kl), 1.0, chunk, block)
    return -fused_linear_losses(plan, (hidden, head), [], _one_hot_teacher(targets), targets >= 0)


def _one_hot_teacher(targets: Int[Array, " N"]) -> tuple[Int[Array, "N 1"], Float[Array, "N 2"]]:
    """A teacher who is sure of one word: its own entropy is zero, and the forward KL from it the cross-entropy."""
    return targets[:, None], jnp.broadcast_to(jnp.array([0, MASKED], jnp.float32), (len(targets), 2))
