"""Fused cross-entropy of a linear head: the [N, V] logits never exist, and tokens without a target cost nothing.

Of bfloat16 inputs kernels compute the loss, `log_sum_exp_tpu` or `log_sum_exp_gpu`, and on a TPU its gradients,
`head_gradients_tpu`. The rest is a loop of XLA's: see `linear_loss`.

Axis letters: N tokens, D model dimension, V vocabulary (docs/glossary.md, "Axis letters").
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from pallas_kernels import head_gradients_tpu, log_sum_exp_gpu, log_sum_exp_tpu
from pallas_kernels.distillation import SparseTeacher, forward_kl
from pallas_kernels.head_choice import choose_implementation
from pallas_kernels.linear_loss import (
    MASKED,
    Logits,
    LossPlan,
    Visit,
    compact,
    default_chunk,
    fused_linear_loss,
    fused_linear_losses,
    linear_loss_gradients,
)


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
      implementation: "xla", "tpu" or "gpu", or one of these kernels "-interpreted"; by default the fastest for the
        platform and these shapes.

    Returns:
      float32: sum of -weight x log softmax(head @ hidden)[target] over tokens with a target, and the sum of weights.
    """
    weights = jnp.where(targets >= 0, 1.0 if weights is None else weights, 0).astype(jnp.float32)
    implementation = implementation or choose_implementation(hidden, head, gradients=True)
    chunk = chunk or default_chunk()
    if implementation != "xla":
        weights = jax.lax.stop_gradient(weights)
        losses = _token_losses(implementation, chunk, block, hidden, head, targets, weights != 0)
        return jnp.sum(weights * losses), jnp.sum(weights)
    plan = LossPlan(SparseTeacher(forward_kl), 1.0, chunk, block)
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
    implementation = implementation or choose_implementation(hidden, head, gradients=True)
    chunk = chunk or default_chunk()
    if implementation != "xla":
        return -_token_losses(implementation, chunk, block, hidden, head, targets, targets >= 0)
    plan = LossPlan(SparseTeacher(forward_kl), 1.0, chunk, block)
    return -fused_linear_losses(plan, (hidden, head), [], _one_hot_teacher(targets), targets >= 0)


def _one_hot_teacher(targets: Int[Array, " N"]) -> tuple[Int[Array, "N 1"], Float[Array, "N 2"]]:
    """A `SparseTeacher`'s input with all probability on the target: the forward KL from it is the cross-entropy."""
    return targets[:, None], jnp.broadcast_to(jnp.array([0, MASKED], jnp.float32), (len(targets), 2))


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1, 2))
def _token_losses(
    implementation: str,
    chunk: int,
    block: int,
    hidden: Float[Array, "N D"],
    head: Float[Array, "V D"],
    targets: Int[Array, " N"],
    counts: Bool[Array, " N"],
) -> Float[Array, " N"]:
    """The cross-entropy of each token that counts, by kernels; 0 for the others, whatever they hold."""
    return _forward(implementation, chunk, block, hidden, head, targets, counts)[0]


def _forward(
    implementation: str, chunk: int, block: int, hidden: Array, head: Array, targets: Array, counts: Array
) -> tuple[Array, tuple[Array, ...]]:
    gather, put_back = compact(counts)
    tokens, words, num_tokens = gather(hidden), gather(targets), jnp.sum(counts)
    kernel, interpret = implementation.removesuffix("-interpreted"), implementation.endswith("-interpreted")
    if kernel == "tpu":
        lse, logits = log_sum_exp_tpu.log_sum_exp(tokens, head, words, num_tokens, interpret=interpret)
    else:
        lse = log_sum_exp_gpu.log_sum_exp(tokens, head, num_tokens, interpret=interpret)
        columns = jnp.take(head, words, 0, mode="clip")
        logits = jnp.einsum("nd,nd->n", tokens, columns, preferred_element_type=jnp.float32)
    losses = jnp.where(words < len(head), lse - logits, jnp.nan)
    return put_back(losses), (hidden, head, targets, counts, put_back(lse))


def _backward(
    implementation: str, chunk: int, block: int, saved: tuple[Array, ...], d_losses: Array
) -> tuple[Array, Array, None, None]:
    hidden, head, targets, counts, lse = saved
    if implementation.startswith("gpu"):
        plan = LossPlan(_KnownLogSum(), 1.0, chunk, block)
        weights = jnp.where(counts, d_losses, 0)
        return *linear_loss_gradients(plan, (hidden, head), [], (lse, targets), weights), None, None
    gather, put_back = compact(counts)
    rows = [gather(x) for x in (lse, targets, d_losses)]
    d_hidden, d_head, _ = head_gradients_tpu.gradients(
        [(gather(hidden), head)], rows, logits_gradient, jnp.sum(counts), interpret=implementation == "tpu-interpreted"
    )
    return put_back(d_hidden).astype(hidden.dtype), d_head, None, None


_token_losses.defvjp(_forward, _backward)


class _KnownLogSum(NamedTuple):
    """A `Loss`, for its gradients: the cross-entropy of tokens of which log-sums and targets, [n] each, are known."""

    def start(self, per_token: tuple[Array, Array], n: int, pick: Callable[[Array], Array]) -> tuple[()]:
        return ()

    def visits(self, gradients: bool) -> Sequence[Visit]:
        return []

    def gradient(
        self, logits: Logits, words: Array, per_token: tuple[Array, Array], state: tuple[()]
    ) -> tuple[Array, tuple[()]]:
        lse, targets = per_token
        return jnp.exp(logits[0] - lse[:, None]) - (words == targets[:, None]), state

    def value(self, per_token: tuple[Array, Array], state: tuple[()]) -> Float[Array, " n"]:
        return jnp.zeros_like(per_token[0])


def logits_gradient(logits: Sequence[Array], ids: Array, rows: Sequence[Array]) -> tuple[Array, None]:
    """The cross-entropy as a `head_gradients_tpu.TileGradient`: a token's rows are its log-sum, target and weight."""
    lse, target, weight = rows
    return (jnp.exp(logits[0] - lse) - jnp.where(ids == target, 1.0, 0.0)) * weight, None
