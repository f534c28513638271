"""Losses of softmax(head @ hidden), fused: nothing of size tokens x vocabulary exists, forward or backward.

One mechanism serves cross-entropy and distillation. The tokens that count are gathered in chunks, and the vocabulary
is streamed past each chunk in blocks: once or twice for what the loss sums over the words (log-sum-exp first), and once
more for the gradients. Every visit computes the logits of [chunk, block] anew and keeps sums only. Which sums, a `Loss`
tells.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, Protocol

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

MASKED = -1e30  # the logit, or log-probability, of what is not there: finite, so that zero times it is zero, not NaN

State = Any  # pytree of sums [n, ..] over the words seen so far
Logits = tuple[Array, ...]  # float32 [n, block] of each head, the student's first, divided by the temperature
Visit = Callable[[Logits, Int[Array, " block"], Any, State], State]  # (logits, words, per token, state) -> state
Gather = Callable[[Array], Array]  # [N, ..] -> [n, ..]
HiddenAndHead = tuple[
    Float[Array, "N D"], Float[Array, "V D"]
]  # hidden states, and the head that turns them into logits


class Loss(Protocol):
    """A loss per token as sums over the vocabulary; `per_token` is what the caller gave, of the n tokens of a chunk.

    `words` numbers the columns of the logits; a negative number is no word, and the logits there are MASKED.
    """

    def start(self, per_token: Any, n: int, pick: Callable[[Int[Array, "n k"]], Float[Array, "n k"]]) -> State:
        """The sums before any block was seen; `pick` gives the student's logits of a few words."""

    def visits(self, gradients: bool) -> Sequence[Visit]:
        """What to sum, each over the whole vocabulary, one after the other; gradients follow or not."""

    def gradient(self, logits: Logits, words: Array, per_token: Any, state: State) -> tuple[Array, State]:
        """d loss / d student's logits [n, block], zero where there is no word; and the state, which may still grow."""

    def value(self, per_token: Any, state: State) -> Float[Array, " n"]:
        """The loss; finite, too, where all logits and all in `per_token` are zero."""


class LossPlan(NamedTuple):
    """How a fused loss runs. `chunk` tokens and `block` words at a time: both bound memory, neither changes results."""

    loss: Loss
    temperature: float
    chunk: int
    block: int


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def fused_linear_loss(
    plan: LossPlan,
    student: HiddenAndHead,
    teachers: Sequence[HiddenAndHead],
    per_token: Any,
    weights: Float[Array, " N"],
) -> tuple[Float[Array, ""], Float[Array, ""]]:
    """temperature^2 x sum over tokens of weight x loss, and the sum of the weights; float32.

    The square keeps the size of the gradients where the temperature changes (Hinton et al. 2015, arXiv 1503.02531,
    section 2). A token of weight zero costs nothing and gives nothing, whatever it holds. Products are in the dtype of
    the inputs, sums in float32. Differentiable in `student` only.
    """
    losses, _ = _run(plan, student, teachers, per_token, weights, gradients=False)
    return _sums(losses, weights)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def fused_linear_losses(
    plan: LossPlan, student: HiddenAndHead, teachers: Sequence[HiddenAndHead], per_token: Any, counts: Bool[Array, " N"]
) -> Float[Array, " N"]:
    """temperature^2 x the loss of each token that counts, and zero for the others; float32.

    As `linear_loss`, for what is no weighted sum of the tokens' losses: the backward pass computes the logits again.
    """
    return _run(plan, student, teachers, per_token, counts.astype(jnp.float32), gradients=False)[0]


def over_vocabulary(V: int, block: int, visit: Callable[[Any, Array, State], State], state: State) -> State:
    """visit(start, words, state) for each block of words start, start + 1, ..; block <= V.

    The last block begins early enough to be whole: the words in it that were seen before are numbered -2.
    """
    if block == V:  # no loop, so that the compiler computes the logits of several visits once
        return visit(0, jnp.arange(V), state)

    def step(i: Array, state: State) -> State:
        start = jnp.minimum(i * block, V - block)
        words = start + jnp.arange(block)
        return visit(start, jnp.where(words >= i * block, words, -2), state)

    return jax.lax.fori_loop(0, -(-V // block), step, state)


def _run(
    plan: LossPlan,
    student: HiddenAndHead,
    teachers: Sequence[HiddenAndHead],
    per_token: Any,
    weights: Array,
    gradients: bool,
) -> tuple[Array, HiddenAndHead | None]:
    """temperature^2 x the loss of each token of weight, and the gradients of their weighted sum in float32."""

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
    """visit(rows, gather, state) for `chunk` of the tokens that count at a time: their places `rows`, and what takes
    their entries out of an array [N, ..]. Where the last chunk is not full, a row is N, and what is gathered zero."""
    N = len(counts)
    chunk = min(chunk, N)
    active = jnp.sum(counts)
    order = jnp.argsort(~counts, stable=True)  # tokens that count first
    order = jnp.concatenate([order, jnp.full(-N % chunk, N, order.dtype)])

    def step(i: Array, state: State) -> State:
        real = i * chunk + jnp.arange(chunk) < active
        rows = jnp.where(real, jax.lax.dynamic_slice_in_dim(order, i * chunk, chunk), N)

        def gather(x: Array) -> Array:  # zeros for a token that does not count: zero times NaN would be NaN
            return jnp.where(real.reshape(-1, *[1] * (x.ndim - 1)), jnp.take(x, rows, 0, mode="clip"), 0)

        return visit(rows, gather, state)

    return jax.lax.fori_loop(0, (active + chunk - 1) // chunk, step, state)


def _sums(losses: Array, weights: Array) -> tuple[Array, Array]:
    return jnp.sum(weights.astype(jnp.float32) * losses), jnp.sum(weights, dtype=jnp.float32)


def _chunk(
    plan: LossPlan, models: Sequence[HiddenAndHead], per_token: Any, weight: Array, d_head: Array | None
) -> tuple[Array, HiddenAndHead | None]:
    """The loss [n] of one chunk and, when `d_head` is given, d_hidden and `d_head` with this chunk's part added."""
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
            rows = jnp.take(head, ids, 0, mode="fill", fill_value=jnp.nan)  # a word beyond the vocabulary shows
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
    """The gradients are computed with the loss: all that is left to the backward pass is to scale them."""
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
    _, grads = _run(plan, student, teachers, per_token, jnp.where(counts, cotangent, 0), gradients=True)
    assert grads is not None
    return jax.tree.map(lambda grad, x: grad.astype(x.dtype), grads, student), None, None, None


fused_linear_losses.defvjp(_forward_each, _backward_each)
