"""On-policy distillation: a student's samples instead of the true answers (GKD, Agarwal et al., arXiv 2306.13649).

Axis letters: B rows, T tokens (docs/glossary.md, "Axis letters").
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from brewjax.data.records.loader import NO_TARGET, TokenBatch
from brewjax.model.decoder import Decoder
from brewjax.train.objectives import per_token
from pallas_kernels.distillation import linear_top_k
from pallas_kernels.token_labels import SELF


class _Answers(NamedTuple):
    """Fields of a batch while its sampled answers grow, one token at a time."""

    tokens: Int[Array, "B T"]
    targets: Int[Array, "B T"]
    weights: Float[Array, "B T"]


def replace_with_student_samples(
    decoder: Decoder, batch: TokenBatch, share: float, top_k: int
) -> tuple[TokenBatch, Bool[Array, "B T"]]:
    """Replaces a share of a batch's free-text answers by samples of the decoder.

    Each token is sampled from the `top_k` likeliest at temperature 1, given the tokens sampled before it. If a sample
    ends before the true answer, the targets behind its end get weight 0; if it is longer, it is truncated. Only
    free-text answers are resampled. A label word is a target but never an input token, so replacing it would change
    nothing: it is kept. The random numbers depend on the batch alone, so a resumed run samples the same.

    It costs a forward pass for each token of the longest answer but the last.

    Args:
      decoder: the student.
      batch: rows [B, T].
      share: of the answers to replace, from 0 to 1.
      top_k: words to sample from.

    Returns:
      The batch with samples, and bool [B, T]: which targets are samples.
    """
    sharding = decoder.sharding
    fields = (batch.tokens, batch.targets, batch.weights, *map(jnp.asarray, batch.token_labels))
    tokens, targets, weights, example_id, piece_id, visibility = (sharding.reshard(x, "batch", None) for x in fields)
    T = tokens.shape[1]
    key = jax.random.key(jnp.sum(tokens * jnp.arange(1, T + 1)))  # differs between batches

    def draws(index: int | Array) -> Float[Array, "B T"]:
        return sharding.reshard(jax.random.uniform(jax.random.fold_in(key, index), tokens.shape), "batch", None)

    # A target whose answer goes on: the next token belongs to the same answer.
    is_answer = (targets != NO_TARGET) & (visibility == SELF)
    goes_on = is_answer & _before((example_id[:, 1:] == example_id[:, :-1]) & (piece_id[:, 1:] == piece_id[:, :-1]))
    first = jax.lax.cummax(jnp.where(goes_on & ~_behind(goes_on), jnp.arange(T), 0), axis=1)
    goes_on &= jnp.take_along_axis(draws(0), first, 1) < share
    is_sample = goes_on | (is_answer & _behind(goes_on))
    offset = jnp.arange(T) - first  # index of the token within its answer
    end = jnp.max(jnp.where(is_sample & ~goes_on, targets, NO_TARGET))  # the token that every answer ends with

    def draw(hidden: Array, head: Array, current: Array, uniform: Array) -> Int[Array, " n"]:
        words, log_probs = linear_top_k(hidden, head, current, top_k)
        cumulative = jnp.cumsum(jnp.exp(log_probs), -1)
        chosen = jnp.sum(cumulative < uniform[:, None] * cumulative[:, -1:], -1, keepdims=True)
        return jnp.take_along_axis(words, jnp.minimum(chosen, top_k - 1), 1)[:, 0]

    def sample_step(n: Array, answers: _Answers) -> _Answers:
        current = goes_on & (offset == n)
        hidden = decoder(answers.tokens, batch.positions, batch.token_labels)
        sampled = per_token(sharding, draw, [(hidden, decoder.lm_head)], current, draws(n + 1))
        sampled = sharding.reshard(sampled, "batch", None)
        ended = current & ((sampled == end) | (answers.weights == 0))
        return _Answers(
            jnp.where(_behind(current), _behind(sampled), answers.tokens),
            jnp.where(current, sampled, answers.targets),
            jnp.where(_behind(ended), 0, answers.weights),
        )

    longest = jnp.max(jnp.where(goes_on, offset + 1, 0))
    answers = jax.lax.fori_loop(0, longest, sample_step, _Answers(tokens, targets, weights))
    return batch._replace(**answers._asdict()), is_sample


def _behind(x: Array) -> Array:
    """At each token, the value of the previous token; 0 at the first."""
    return jnp.pad(x[:, :-1], ((0, 0), (1, 0)))


def _before(x: Array) -> Array:
    """Values [B, T - 1] of pairs of neighbours, at the first token of each pair; 0 at the last token."""
    return jnp.pad(x, ((0, 0), (0, 1)))
