"""Fused losses of softmax(head @ hidden): nothing of size tokens x vocabulary exists, forward or backward.

One mechanism serves cross-entropy and distillation. The tokens with a weight are gathered in chunks, and each chunk
loops over blocks of the vocabulary: once or twice for the sums over words that the loss needs (log-sum-exp first), and
once more for the gradients. Every visit computes the logits [chunk, block] anew and keeps sums only; a `Loss` defines
which sums.

Axis letters: N tokens, n of a chunk, D model dimension, V vocabulary (docs/glossary.md, "Axis letters").
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, Protocol

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from pallas_kernels.platform import platform

MASKED = -1e30  # logit, or log-probability, of no word: finite, so that zero times it is zero and not NaN

State = Any  # pytree of sums [n, ..] over the words seen so far
Logits = tuple[Array, ...]  # float32 [n, block] of each head, the student's first, divided by the temperature
Visit = Callable[[Logits, Int[Array, " block"], Any, State], State]  # (logits, words, per token, state) -> state
Gather = Callable[[Array], Array]  # [N, ..] -> [n, ..]
HiddenAndHead = tuple[Float[Array, "N D"], Float[Array, "V D"]]  # hidden states, and the head that makes them logits


class Loss(Protocol):
    """A loss per token, computed from sums over the vocabulary.

    Its methods get `per_token`, the caller's arrays for the n tokens of a chunk, and `words`, the token ids of the
    columns of the logits: a negative id is no word, and its logits are `MASKED`.
    """

    def start(self, per_token: Any, n: int, pick: Callable[[Int[Array, "n k"]], Float[Array, "n k"]]) -> State:
        """The sums before the first block; `pick` computes the student's logits of a few words."""

    def visits(self, gradients: bool) -> Sequence[Visit]:
        """The passes over the vocabulary, in order; `gradients`: a pass for gradients follows them."""

    def gradient(self, logits: Logits, words: Array, per_token: Any, state: State) -> tuple[Array, State]:
        """d loss / d student's logits [n, block], zero where there is no word; and the updated state."""

    def value(self, per_token: Any, state: State) -> Float[Array, " n"]:
        """The loss; it must be finite where all logits and all of `per_token` are zero (padding of a chunk)."""


class LossPlan(NamedTuple):
    """How a fused loss runs: `chunk` tokens and `block` words at a time bound memory and do not change results."""

    loss: Loss
    temperature: float
    chunk: int
    block: int


def default_chunk() -> int:
    """Tokens whose logits are in memory at a time, unless the caller says otherwise.

    Each chunk reads and writes the head's float32 gradient. A TPU or a GPU multiplies 512 tokens faster than that
    passes through its memory; the slower the products, the more the tokens cost that fill up the last chunk.
    """
    return 128 if platform() == "cpu" else 2048


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def fused_linear_loss(
    plan: LossPlan,
    student: HiddenAndHead,
    teachers: Sequence[HiddenAndHead],
    per_token: Any,
    weights: Float[Array, " N"],
) -> tuple[Float[Array, ""], Float[Array, ""]]:
    """A weighted sum of the tokens' losses; differentiable in `student` only.

    Products are in the dtype of the inputs, sums in float32. A token of weight zero costs nothing and, whatever it
    holds, changes nothing.

    Args:
      plan: the loss, and how it runs.
      student: hidden states [N, D] and head [V, D].
      teachers: the same of other models, whose logits the loss gets after the student's.
      per_token: a pytree of arrays [N, ..] for the loss.
      weights: of the tokens.

    Returns:
      float32: temperature^2 x sum of weight x loss (the square keeps the size of gradients when the temperature
      changes: Hinton et al. 2015, arXiv 1503.02531, section 2), and the sum of the weights.
    """
    losses, _ = _run(plan, student, teachers, per_token, weights, gradients=False)
    return _sums(losses, weights)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def fused_linear_losses(
    plan: LossPlan, student: HiddenAndHead, teachers: Sequence[HiddenAndHead], per_token: Any, counts: Bool[Array, " N"]
) -> Float[Array, " N"]:
    """The loss of each token, for objectives that are no weighted sum of them.

    Args as `fused_linear_loss`; `counts` are the tokens to compute. The backward pass computes the logits again.

    Returns:
      float32 [N]: temperature^2 x loss, and 0 for tokens that do not count.
    """
    return _run(plan, student, teachers, per_token, counts.astype(jnp.float32), gradients=False)[0]


def over_vocabulary(V: int, block: int, visit: Callable[[Any, Array, State], State], state: State) -> State:
    """Folds visit(start, words, state) over the blocks of the vocabulary; block <= V.

    `words` are the ids start, start + 1, ... The last block starts early enough to be whole; ids in it that an earlier
    block had are -2.
    """
    if block == V:  # no loop, so that the compiler computes the logits of several visits once
        return visit(0, jnp.arange(V), state)

    def step(i: Array, state: State) -> State:
        start = jnp.minimum(i * block, V - block)
        words = start + jnp.arange(block)
        return visit(start, jnp.where(words >= i * block, words, -2), state)

    return jax.lax.fori_loop(0, -(-V // block), step, state)


def linear_loss_gradients(
    plan: LossPlan,
    student: HiddenAndHead,
    teachers: Sequence[HiddenAndHead],
    per_token: Any,
    weights: Float[Array, " N"],
) -> HiddenAndHead:
    """The gradients of `fused_linear_loss` by the student's hidden states and head, in their dtypes."""
    _, grads = _run(plan, student, teachers, per_token, weights, gradients=True)
    assert grads is not None
    return grads[0].astype(student[0].dtype), grads[1].astype(student[1].dtype)


def _run(
    plan: LossPlan,
    student: HiddenAndHead,
    teachers: Sequence[HiddenAndHead],
    per_token: Any,
    weights: Array,
    gradients: bool,
) -> tuple[Array, HiddenAndHead | None]:
    """temperature^2 x loss of each token with a weight, and the float32 gradients of the weighted sum (or None)."""

    def step(
        rows: Array, gather: Gather, carry: tuple[Array, HiddenAndHead | None]
    ) -> tuple[Array, HiddenAndHead | None]:
        losses, grads = carry
        models = [(gather(hidden), head) for hidden, head in (student, *teachers)]
        weight = gather(weights).astype(jnp.float32)
        loss, updates = _chunk(plan, models, jax.tree.map(gather, per_token), weight, grads[1] if grads else None)
        if grads and updates:
            grads = grads[0].at[rows].set(updates[0], mode="drop"), updates[1]
        return losses.at[rows].set(plan.temperature**2 * loss, mode="drop"), grads

    zeros = (jnp.zeros(student[0].shape, jnp.float32), jnp.zeros(student[1].shape, jnp.float32)) if gradients else None
    return over_tokens(weights != 0, plan.chunk, step, (jnp.zeros(len(weights), jnp.float32), zeros))


def over_tokens(
    counts: Bool[Array, " N"], chunk: int, visit: Callable[[Array, Gather, State], State], state: State
) -> State:
    """Folds visit(rows, gather, state) over chunks of the tokens that count.

    `rows` are the tokens' indices, `gather` takes their entries out of an array [N, ..]. In the last chunk indices may
    be N, for which `gather` gives zeros.
    """
    N = len(counts)
    chunk = min(chunk, N)
    active = jnp.sum(counts)
    order = jnp.argsort(~counts, stable=True)  # tokens that count first
    order = jnp.concatenate([order, jnp.full(-N % chunk, N, order.dtype)])

    def step(i: Array, state: State) -> State:
        real = i * chunk + jnp.arange(chunk) < active
        rows = jnp.where(real, jax.lax.dynamic_slice_in_dim(order, i * chunk, chunk), N)

        def gather(x: Array) -> Array:  # zeros, not anything times zero: zero times NaN would be NaN
            return jnp.where(real.reshape(-1, *[1] * (x.ndim - 1)), jnp.take(x, rows, 0, mode="clip"), 0)

        return visit(rows, gather, state)

    return jax.lax.fori_loop(0, (active + chunk - 1) // chunk, step, state)


def compact(counts: Bool[Array, " N"]) -> tuple[Gather, Gather]:
    """Functions of arrays [N, ..]: to put the tokens that count first, with zeros behind them; and the inverse."""
    order = jnp.argsort(~counts, stable=True)
    rank = jnp.cumsum(counts) - 1
    is_real = jnp.arange(len(counts)) < jnp.sum(counts)

    def select(mask: Array, index: Array, x: Array) -> Array:  # zeros, not anything times zero: it may be NaN
        return jnp.where(mask.reshape(-1, *[1] * (x.ndim - 1)), jnp.take(x, index, 0, mode="clip"), 0)

    return functools.partial(select, is_real, order), functools.partial(select, counts, rank)


def _sums(losses: Array, weights: Array) -> tuple[Array, Array]:
    return jnp.sum(weights.astype(jnp.float32) * losses), jnp.sum(weights, dtype=jnp.float32)


def _chunk(
    plan: LossPlan, models: Sequence[HiddenAndHead], per_token: Any, weight: Array, d_head: Array | None
) -> tuple[Array, HiddenAndHead | None]:
    """The losses [n] of a chunk; with `d_head`, also d_hidden, and `d_head` plus the gradient of this chunk."""
    hidden, head = models[0]
    block = min(plan.block, head.shape[0])

    def part(x: Array, start: Array) -> Float[Array, "block D"]:
        return jax.lax.dynamic_slice_in_dim(x, start, block)

    def logits(start: Array, words: Array) -> Logits:
        products = (
            jnp.einsum("nd,vd->nv", hidden, part(head, start), preferred_element_type=jnp.float32)
            for hidden, head in models
        )
        return tuple(jnp.where(words >= 0, product / plan.temperature, MASKED) for product in products)

    def pick(ids: Int[Array, "n k"]) -> Float[Array, "n k"]:
        def pick_column(ids: Int[Array, " n"]) -> Float[Array, " n"]:
            rows = jnp.take(head, ids, 0, mode="fill", fill_value=jnp.nan)  # an id outside the vocabulary shows
            return jnp.einsum("nd,nd->n", hidden, rows, preferred_element_type=jnp.float32) / plan.temperature

        return jax.lax.map(pick_column, ids.T).T  # one after the other: [n, k, D] may be larger than a block of logits

    def run_visit(visit: Visit, start: Array, words: Array, state: State) -> State:
        return visit(logits(start, words), words, per_token, state)

    def add_gradients(start: Array, words: Array, carry: tuple[State, Array, Array]) -> tuple[State, Array, Array]:
        state, d_hidden, d_head = carry
        d_logits, state = plan.loss.gradient(logits(start, words), words, per_token, state)
        d_logits = d_logits * (weight * plan.temperature)[:, None]  # its square over the one inside the logits
        d_logits = d_logits.astype(hidden.dtype)
        d_hidden_block = jnp.einsum("nv,vd->nd", d_logits, part(head, start), preferred_element_type=jnp.float32)
        d_head_block = jnp.einsum("nv,nd->vd", d_logits, hidden, preferred_element_type=jnp.float32)
        d_head = jax.lax.dynamic_update_slice_in_dim(d_head, part(d_head, start) + d_head_block, start, 0)
        return state, d_hidden + d_hidden_block, d_head

    state = plan.loss.start(per_token, len(hidden), pick)
    for visit in plan.loss.visits(gradients=d_head is not None):
        state = over_vocabulary(len(head), block, functools.partial(run_visit, visit), state)
    if d_head is None:
        return plan.loss.value(per_token, state), None
    initial = (state, jnp.zeros(hidden.shape, jnp.float32), d_head)
    state, d_hidden, d_head = over_vocabulary(len(head), block, add_gradients, initial)
    return plan.loss.value(per_token, state), (d_hidden, d_head)


def _forward(
    plan: LossPlan, student: HiddenAndHead, teachers: Sequence[HiddenAndHead], per_token: Any, weights: Array
) -> tuple[tuple[Array, Array], HiddenAndHead]:
    """Computes the gradients with the loss; the backward pass only scales them."""
    losses, grads = _run(plan, student, teachers, per_token, weights, gradients=True)
    return _sums(losses, weights), jax.tree.map(lambda grad, x: grad.astype(x.dtype), grads, student)


def _backward(
    plan: LossPlan, grads: HiddenAndHead, cotangents: tuple[Array, Array]
) -> tuple[HiddenAndHead, None, None, None]:
    d_total, _ = cotangents
    return jax.tree.map(lambda grad: (d_total * grad).astype(grad.dtype), grads), None, None, None


fused_linear_loss.defvjp(_forward, _backward)


def _forward_each(
    plan: LossPlan, student: HiddenAndHead, teachers: Sequence[HiddenAndHead], per_token: Any, counts: Array
) -> tuple[Array, tuple[HiddenAndHead, Sequence[HiddenAndHead], Any, Array]]:
    losses = fused_linear_losses(plan, student, teachers, per_token, counts)
    return losses, (student, teachers, per_token, counts)


def _backward_each(
    plan: LossPlan, inputs: tuple[HiddenAndHead, Sequence[HiddenAndHead], Any, Array], cotangent: Array
) -> tuple[HiddenAndHead, None, None, None]:
    student, teachers, per_token, counts = inputs
    weights = jnp.where(counts, cotangent, 0)
    return linear_loss_gradients(plan, student, teachers, per_token, weights), None, None, None


fused_linear_losses.defvjp(_forward_each, _backward_each)
