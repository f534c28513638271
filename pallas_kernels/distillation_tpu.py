"""Distillation from another head on a TPU: the logits of both models stay in VMEM.

Three passes over the vocabulary: the log-sum of each model's logits (`log_sum_exp_tpu`), the sums of a divergence's
terms and of their derivatives, and both gradients (`head_gradients_tpu`). Where the derivatives' sum is known, as for
the forward KL, the last pass sums the terms too, and the second is left out: six products with half the traffic of
eight.

Axis letters: N tokens, n of a block, D and E model dimensions of student and teacher, V vocabulary, v words of a tile
(docs/glossary.md, "Axis letters").
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jaxtyping import Array, Float, Int

from pallas_kernels import head_gradients_tpu
from pallas_kernels.linear_loss import HiddenAndHead, compact
from pallas_kernels.log_sum_exp_tpu import INTERPRETED_VMEM, SUBLANES, choose_blocks, log_sum_exp, multiply
from pallas_kernels.platform import tpu_info

if TYPE_CHECKING:
    from pallas_kernels.distillation import Divergence


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1, 2))
def distill(
    divergence: Divergence,
    temperature: float,
    interpret: bool,
    student: HiddenAndHead,
    teacher: HiddenAndHead,
    weights: Float[Array, " N"],
) -> Float[Array, ""]:
    """temperature^2 x the sum of weight x divergence; see `distillation.linear_distillation`."""
    return _run(divergence, temperature, interpret, student, teacher, weights, gradients=False)[0]


def _forward(
    divergence: Divergence,
    temperature: float,
    interpret: bool,
    student: HiddenAndHead,
    teacher: HiddenAndHead,
    weights: Array,
) -> tuple[Array, HiddenAndHead]:
    """Computes the gradients with the loss; the backward pass only scales them."""
    total, grads = _run(divergence, temperature, interpret, student, teacher, weights, gradients=True)
    assert grads is not None
    return total, grads


def _backward(
    divergence: Divergence, temperature: float, interpret: bool, grads: HiddenAndHead, d_total: Array
) -> tuple[HiddenAndHead, None, None]:
    return jax.tree.map(lambda grad: (d_total * grad).astype(grad.dtype), grads), None, None


distill.defvjp(_forward, _backward)


def _run(
    divergence: Divergence,
    temperature: float,
    interpret: bool,
    student: HiddenAndHead,
    teacher: HiddenAndHead,
    weights: Array,
    gradients: bool,
) -> tuple[Array, HiddenAndHead | None]:
    gather, put_back = compact(weights != 0)
    num_tokens, scale = jnp.sum(weights != 0), 1 / temperature
    models = [(gather(hidden), head) for hidden, head in (student, teacher)]

    def clean(sums: Array) -> Array:  # of tokens behind those that count they are undefined, and may be NaN
        return gather(put_back(sums))

    def log_sum(hidden: Array, head: Array) -> Array:
        return clean(log_sum_exp(hidden, head, num_tokens=num_tokens, scale=scale, interpret=interpret)[0])

    log_sums = [log_sum(*model) for model in models]
    slope_is_known = divergence.slope is not None
    if not (gradients and slope_is_known):
        losses, slopes = map(clean, divergence_sums(divergence, scale, models, log_sums, num_tokens, interpret))
    grads = None
    if gradients:
        if divergence.slope is not None:
            slopes = jnp.full_like(weights, divergence.slope)
        d_hidden, d_head, sums = head_gradients_tpu.gradients(
            models,
            [*log_sums, slopes, gather(weights) * temperature],  # its square over the one inside the logits
            functools.partial(logits_gradient, divergence, scale),
            num_tokens,
            has_terms=slope_is_known,
            interpret=interpret,
        )
        losses = clean(sums[0]) if slope_is_known else losses
        grads = put_back(d_hidden).astype(student[0].dtype), d_head
    return temperature**2 * jnp.sum(gather(weights) * losses), grads


def logits_gradient(
    divergence: Divergence, scale: float, logits: Sequence[Array], ids: Array, rows: Sequence[Array]
) -> tuple[Array, Array | None]:
    """A divergence as a `head_gradients_tpu.TileGradient`.

    Of each token the log-sum of both models' logits, the sum of the derivatives and the weight are known.
    """
    *log_sums, slope, weight = rows
    log_q, log_p = _log_probs(logits, log_sums, scale)
    terms, slopes = divergence.terms(log_p, log_q)
    return (slopes - jnp.exp(log_q) * slope) * weight, terms if divergence.slope is not None else None


def _log_probs(logits: Sequence[Array], log_sums: Sequence[Array], scale: float) -> list[Array]:
    return [z * scale - log_sum for z, log_sum in zip(logits, log_sums, strict=True)]


def divergence_sums(
    divergence: Divergence,
    scale: float,
    models: Sequence[HiddenAndHead],
    log_sums: Sequence[Float[Array, " N"]],
    num_tokens: Int[Array, ""],
    interpret: Any = False,
) -> tuple[Float[Array, " N"], Float[Array, " N"]]:
    """The sums over words of a divergence's terms, and of their derivatives in the student's log-probabilities.

    Args:
      divergence: of the first model from the second.
      scale: of the logits.
      models: hidden states [N, D] and head [V, D] of each, in one dtype.
      log_sums: log-sum-exp of each model's scaled logits.
      num_tokens: only so many tokens are computed, in whole blocks, and the others' results are undefined.
      interpret: see `pl.pallas_call`.

    Returns:
      float32 [N] each.
    """
    (hidden, head), (teacher_hidden, _) = models
    (N, D), V, E = hidden.shape, len(head), teacher_hidden.shape[1]
    vmem, cores = (INTERPRETED_VMEM, 1) if interpret else (tpu_info().vmem_capacity_bytes, tpu_info().num_cores)
    n, v = choose_blocks(N, D + E, hidden.dtype, head.dtype, 1, vmem, cores)
    row = pl.BlockSpec((1, n), lambda i, j: (0, i))
    values, slopes = pl.pallas_call(
        functools.partial(_kernel, V, divergence, scale),
        name="divergence_sums",
        grid=(pl.cdiv(num_tokens, n), pl.cdiv(V, v)),
        in_specs=[
            [pl.BlockSpec((v, head.shape[1]), lambda i, j: (j, 0)) for _, head in models],
            [
                pl.BlockSpec((n, x.shape[1]), lambda i, j: (i, 0), pipeline_mode=None if interpret else pl.Buffered(1))
                for x, _ in models
            ],
            [row, row],
        ],
        out_specs=[row, row],
        out_shape=[jax.ShapeDtypeStruct((1, N), jnp.float32)] * 2,
        scratch_shapes=[pltpu.VMEM((SUBLANES, n), jnp.float32)] * 2,
        interpret=interpret,
        cost_estimate=pl.CostEstimate(
            flops=2 * N * V * (D + E),
            transcendentals=3 * N * V,
            bytes_accessed=(pl.cdiv(N, n) * V + N) * (D + E) * head.dtype.itemsize,
        ),
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel", "arbitrary"), vmem_limit_bytes=vmem * 7 // 8
        ),
    )([head for _, head in models], [hidden for hidden, _ in models], [x[None] for x in log_sums])
    return values[0], slopes[0]


def _kernel(
    V: int, divergence: Divergence, scale: float, heads, hiddens, log_sums,  # read
    value, slope,  # written
    value_sums, slope_sums,  # scratch: of each token by sublane
) -> None:  # fmt: skip
    j = pl.program_id(1)
    v, n = heads[0].shape[0], hiddens[0].shape[0]

    @pl.when(j == 0)
    def _() -> None:
        value_sums[...] = jnp.zeros(value_sums.shape, jnp.float32)
        slope_sums[...] = jnp.zeros(slope_sums.shape, jnp.float32)

    logits = [multiply(head[...], hidden[...]) for head, hidden in zip(heads, hiddens, strict=True)]
    log_q, log_p = _log_probs(logits, [x[...] for x in log_sums], scale)
    is_word = j * v + jax.lax.broadcasted_iota(jnp.int32, (v, n), 0) < V
    for sums, terms in zip((value_sums, slope_sums), divergence.terms(log_p, log_q), strict=True):
        words = jnp.where(is_word, terms, 0) if V % v else terms  # rows of the last tile may be no words
        sums[...] += words.reshape(v // SUBLANES, SUBLANES, n).sum(0)

    @pl.when(j == pl.num_programs(1) - 1)
    def _() -> None:
        value[...] = value_sums[...].sum(0, keepdims=True)
        slope[...] = slope_sums[...].sum(0, keepdims=True)
