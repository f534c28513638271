"""Fused distillation of a linear head: the divergence of a student's distribution over the vocabulary from a teacher's.

The teacher is a second head, whose logits are computed block by block with the student's, or a list of its k likeliest
words for each token. Either way [N, V] never exists and tokens of weight zero cost nothing: see `linear_loss`.

Axis letters: N tokens, n of a chunk, D and E model dimensions of student and teacher, V vocabulary, k words of a
teacher (docs/glossary.md, "Axis letters").
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from pallas_kernels.distillation_tpu import distill
from pallas_kernels.head_choice import choose_implementation
from pallas_kernels.linear_loss import (
    MASKED,
    Gather,
    Logits,
    LossPlan,
    Visit,
    default_chunk,
    fused_linear_loss,
    over_tokens,
)


class Divergence(NamedTuple):
    """A divergence of a student q from a teacher p that is a sum over words.

    Attributes:
      terms: (log p, log q) -> each word's term, and the term's derivative in the word's log q.
      slope: the sum of those derivatives if it is the same for all p and q, which saves a pass over the vocabulary.
    """

    terms: Callable[[Array, Array], tuple[Array, Array]]
    slope: float | None = None


def _forward_kl(log_p: Array, log_q: Array) -> tuple[Array, Array]:
    p = jnp.exp(log_p)
    return p * (log_p - log_q), -p


def _reverse_kl(log_p: Array, log_q: Array) -> tuple[Array, Array]:
    q = jnp.exp(log_q)
    return q * (log_q - log_p), q * (log_q - log_p + 1)


def _skewed_kl(alpha: float, log_p: Array, log_q: Array) -> tuple[Array, Array]:
    p, log_skewed_q = jnp.exp(log_p), math.log1p(-alpha) + log_q
    log_m = jnp.logaddexp(math.log(alpha) + log_p, log_skewed_q)
    return p * (log_p - log_m), -p * jnp.exp(log_skewed_q - log_m)


def _jensen_shannon(beta: float, log_p: Array, log_q: Array) -> tuple[Array, Array]:
    log_m = jnp.logaddexp(math.log(beta) + log_p, math.log1p(-beta) + log_q)
    q_term = (1 - beta) * jnp.exp(log_q) * (log_q - log_m)
    return beta * jnp.exp(log_p) * (log_p - log_m) + q_term, q_term


# KL(p || q), mode-covering (Hinton et al. 2015, arXiv 1503.02531).
forward_kl = Divergence(_forward_kl, slope=-1.0)
# KL(q || p), mode-seeking (MiniLLM, Gu et al. 2024, arXiv 2306.08543).
reverse_kl = Divergence(_reverse_kl)


def jensen_shannon(beta: float) -> Divergence:
    """beta KL(p || m) + (1 - beta) KL(q || m) with m = beta p + (1 - beta) q.

    GKD (Agarwal et al. 2024, arXiv 2306.13649, eq. 1). It is bounded. Near beta = 0 it is about beta times the forward
    KL, near 1 about (1 - beta) times the reverse KL.

    Raises:
      ValueError: if beta is not between 0 and 1.
    """
    if not 0 < beta < 1:
        raise ValueError(f"beta of the Jensen-Shannon divergence is {beta}; it must lie between 0 and 1")
    return Divergence(functools.partial(_jensen_shannon, beta))


def skewed_kl(alpha: float) -> Divergence:
    """KL(p || alpha p + (1 - alpha) q) (DistiLLM, Ko et al. 2024, arXiv 2402.03898, section 3.1).

    The forward KL without its large gradients where the student's probability is near 0: it is at most log(1 / alpha).

    Raises:
      ValueError: if alpha is not between 0 and 1.
    """
    if not 0 < alpha < 1:
        raise ValueError(f"alpha of the skewed KL is {alpha}; it must lie between 0 and 1")
    return Divergence(functools.partial(_skewed_kl, alpha))


def linear_distillation(
    hidden: Float[Array, "N D"],
    head: Float[Array, "V D"],
    teacher_hidden: Float[Array, "N E"],
    teacher_head: Float[Array, "V E"],
    weights: Float[Array, " N"],
    divergence: Divergence = forward_kl,
    temperature: float = 1.0,
    chunk: int | None = None,
    block: int = 8192,
    implementation: str | None = None,
) -> tuple[Float[Array, ""], Float[Array, ""]]:
    """Divergence of the student's softmax(logits / temperature) from the teacher's, weighted and summed over tokens.

    Differentiable in `hidden` and `head` only.

    Args:
      hidden, head: hidden states and output matrix of the student.
      teacher_hidden, teacher_head: the teacher's.
      weights: of the tokens; a token of weight 0 costs nothing.
      divergence: see `Divergence`.
      temperature: divides all logits.
      chunk, block: tokens (by default `default_chunk`) and words whose logits are in memory at a time, in XLA.
      implementation: "xla", "tpu" or "tpu-interpreted"; by default the fastest for the platform and these shapes.

    Returns:
      float32: temperature^2 x the sum of weight x divergence, and the sum of the weights.

    Raises:
      ValueError: if the two vocabularies differ in size.
    """
    if len(head) != len(teacher_head):
        raise ValueError(f"the student's head has {len(head)} words, the teacher's {len(teacher_head)}")
    student, teacher = (hidden, head), (teacher_hidden, teacher_head)
    if not implementation:
        choices = [choose_implementation(*model, gradients=True) for model in (student, teacher)]
        implementation = "tpu" if choices == ["tpu", "tpu"] else "xla"
    if implementation != "xla":
        total = distill(divergence, temperature, implementation == "tpu-interpreted", student, teacher, weights)
        return total, jnp.sum(weights, dtype=jnp.float32)
    plan = LossPlan(_DenseTeacher(divergence), temperature, chunk or default_chunk(), block)
    return fused_linear_loss(plan, student, [teacher], (), weights)


def top_k_distillation(
    hidden: Float[Array, "N D"],
    head: Float[Array, "V D"],
    ids: Int[Array, "N k"],
    log_probs: Float[Array, "N k"],
    weights: Float[Array, " N"],
    divergence: Divergence = forward_kl,
    temperature: float = 1.0,
    chunk: int | None = None,
    block: int = 8192,
) -> tuple[Float[Array, ""], Float[Array, ""]]:
    """As `linear_distillation`, over k + 1 outcomes: the teacher's k words, and all other words as one ("the tail").

    The tail has the probability that the k words leave, but at least 2^-24, about what rounding leaves: from a teacher
    without a tail the reverse KL would be infinite.

    Args:
      hidden, head, weights, divergence, temperature, chunk, block: as of `linear_distillation`.
      ids: the teacher's words, different for each token; -1 for no word.
      log_probs: their log-probabilities at `temperature`, the likeliest first (for precision); -inf for no word.

    Returns:
      float32, as `linear_distillation`.

    Raises:
      ValueError: if k is not less than the vocabulary.
    """
    k, V = ids.shape[1], len(head)
    if k >= V:
        raise ValueError(f"the teacher's {k} words leave no tail in a vocabulary of {V}")
    log_probs = log_probs.astype(jnp.float32)
    tail = -jnp.expm1(log_probs[:, :1]) - jnp.exp(log_probs[:, 1:]).sum(-1, keepdims=True)
    log_p = jnp.concatenate([jnp.maximum(log_probs, MASKED), jnp.log(jnp.maximum(tail, 2.0**-24))], -1)
    plan = LossPlan(SparseTeacher(divergence), temperature, chunk or default_chunk(), block)
    return fused_linear_loss(plan, (hidden, head), [], (ids, log_p), weights)


def linear_top_k(
    hidden: Float[Array, "N D"],
    head: Float[Array, "V D"],
    counts: Bool[Array, " N"],
    k: int,
    temperature: float = 1.0,
    chunk: int = 64,
) -> tuple[Int[Array, "N k"], Float[Array, "N k"]]:
    """The k likeliest words of a teacher, as `top_k_distillation` takes them.

    Args:
      hidden, head: hidden states and output matrix of the teacher.
      counts: the tokens to compute.
      k: words of each token.
      temperature: divides the logits.
      chunk: tokens whose logits are in memory at a time.

    Returns:
      ids and float32 log-probabilities under softmax(logits / temperature), the likeliest first; -1 and -inf for tokens
      that do not count.
    """

    def visit(rows: Array, gather: Gather, results: tuple[Array, Array]) -> tuple[Array, Array]:
        logits = jnp.einsum("nd,vd->nv", gather(hidden), head, preferred_element_type=jnp.float32)
        log_probs, ids = jax.lax.top_k(jax.nn.log_softmax(logits / temperature), k)
        return results[0].at[rows].set(ids, mode="drop"), results[1].at[rows].set(log_probs, mode="drop")

    nothing = jnp.full((len(hidden), k), -1, jnp.int32), jnp.full((len(hidden), k), -jnp.inf, jnp.float32)
    return over_tokens(counts, chunk, visit, nothing)


# With z the student's logits, d log q_v / d z_u = [u = v] - q_u. With slopes = d terms / d log q, therefore
# d divergence / d z = slopes - q x (sum of slopes): over words, and over groups of words alike.


class _Sums(NamedTuple):
    log_q: Float[Array, " n"]  # log-sum-exp of the student's logits
    log_p: Float[Array, " n"]  # log-sum-exp of the teacher's logits
    value: Float[Array, " n"]  # sum of the terms
    slope: Float[Array, " n"]  # sum of their derivatives


class _DenseTeacher(NamedTuple):
    """A `Loss`: the divergence from a teacher whose logits are computed, second after the student's."""

    divergence: Divergence

    def start(self, per_token: tuple[()], n: int, pick: Callable[[Array], Array]) -> _Sums:
        nothing, zeros = jnp.full(n, MASKED, jnp.float32), jnp.zeros(n, jnp.float32)
        return _Sums(nothing, nothing, zeros, zeros)

    def visits(self, gradients: bool) -> Sequence[Visit]:
        known = gradients and self.divergence.slope is not None  # then `gradient` sums the value too
        return [self._log_sums] if known else [self._log_sums, self._terms]

    def gradient(self, logits: Logits, words: Array, per_token: tuple[()], sums: _Sums) -> tuple[Array, _Sums]:
        log_p, log_q = self._log_probs(logits, sums)
        terms, slopes = self.divergence.terms(log_p, log_q)
        if self.divergence.slope is None:
            return slopes - jnp.exp(log_q) * sums.slope[:, None], sums
        sums = sums._replace(value=sums.value + terms.sum(-1))
        return slopes - jnp.exp(log_q) * self.divergence.slope, sums

    def value(self, per_token: tuple[()], sums: _Sums) -> Float[Array, " n"]:
        return sums.value

    def _log_sums(self, logits: Logits, words: Array, per_token: tuple[()], sums: _Sums) -> _Sums:
        student, teacher = (jax.nn.logsumexp(x, -1) for x in logits)
        return sums._replace(log_q=jnp.logaddexp(sums.log_q, student), log_p=jnp.logaddexp(sums.log_p, teacher))

    def _terms(self, logits: Logits, words: Array, per_token: tuple[()], sums: _Sums) -> _Sums:
        terms, slopes = self.divergence.terms(*self._log_probs(logits, sums))
        return sums._replace(value=sums.value + terms.sum(-1), slope=sums.slope + slopes.sum(-1))

    def _log_probs(self, logits: Logits, sums: _Sums) -> tuple[Array, Array]:
        student, teacher = logits
        return teacher - sums.log_p[:, None], student - sums.log_q[:, None]


class _Buckets(NamedTuple):
    words: Float[Array, "n k"]  # logits of the teacher's words
    tail: Float[Array, " n"]  # log-sum-exp of the logits of all others


class SparseTeacher(NamedTuple):
    """A `Loss`: the divergence from a teacher known by k words of each token and the probability of all others.

    `per_token` is ids [n, k] and log-probabilities [n, k + 1], the last one that of all other words together.
    """

    divergence: Divergence

    def start(self, per_token: tuple[Array, Array], n: int, pick: Callable[[Array], Array]) -> _Buckets:
        ids, _ = per_token
        return _Buckets(jnp.where(ids >= 0, pick(ids), MASKED), jnp.full(n, MASKED, jnp.float32))

    def visits(self, gradients: bool) -> Sequence[Visit]:
        return [self._tail]

    def gradient(
        self, logits: Logits, words: Array, per_token: tuple[Array, Array], buckets: _Buckets
    ) -> tuple[Array, _Buckets]:
        log_p, log_q = self._log_probs(per_token, buckets)
        _, slopes = self.divergence.terms(log_p, log_q)
        slopes -= jnp.exp(log_q) * slopes.sum(-1, keepdims=True)
        # The tail's gradient is divided among its words by their shares in it.
        shares = jnp.exp(logits[0] - buckets.tail[:, None])
        return _replace(slopes[:, -1:] * shares, words, per_token[0], slopes[:, :-1]), buckets

    def value(self, per_token: tuple[Array, Array], buckets: _Buckets) -> Float[Array, " n"]:
        terms, _ = self.divergence.terms(*self._log_probs(per_token, buckets))
        return terms.sum(-1)

    def _tail(self, logits: Logits, words: Array, per_token: tuple[Array, Array], buckets: _Buckets) -> _Buckets:
        ids, _ = per_token
        tail_logits = _replace(logits[0], words, ids, jnp.full(ids.shape, MASKED, jnp.float32))
        return buckets._replace(tail=jnp.logaddexp(buckets.tail, jax.nn.logsumexp(tail_logits, -1)))

    def _log_probs(self, per_token: tuple[Array, Array], buckets: _Buckets) -> tuple[Array, Array]:
        """log p and log q of the k words and the tail, [n, k + 1]."""
        logits = jnp.concatenate([buckets.words, buckets.tail[:, None]], -1)
        return per_token[1], jax.nn.log_softmax(logits)


def _replace(
    x: Float[Array, "n block"], words: Int[Array, " block"], ids: Int[Array, "n k"], values: Float[Array, "n k"]
) -> Float[Array, "n block"]:
    """x with `values` in the columns of the words `ids`.

    By comparisons, because a TPU runs a scatter one number at a time. 16 ids share a pass over x: with many more the
    TPU compiler stores the comparisons.
    """

    def replace_column(x: Array, column: tuple[Array, Array]) -> tuple[Array, None]:
        ids, values = column
        return jnp.where(words == ids[:, None], values[:, None], x), None

    return jax.lax.scan(replace_column, x, (ids.T, values.T), unroll=min(16, ids.shape[1]))[0]
