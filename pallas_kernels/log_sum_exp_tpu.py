"""Log-sum-exp of a linear head's logits on a TPU: the head streams through VMEM once for each block of tokens.

A tile of the head [v, D] times a block of hidden states [n, D] gives logits **words by tokens**, which never leave
VMEM: the maximum and the sum over words run over sublanes, as plain vector instructions, and what is kept of a token
lies on its lane. Logits of one tile are one piece of straight-line code, in which the compiler sums the words that are
ready while the matrix unit multiplies the next.

float32 inputs are split into bfloat16 parts inside the kernel, and products of parts are summed in float32 (Henry, Tang
and Heinecke 2019, arXiv 1904.06376). A TPU's own float32 product (`HIGHEST`) is that too, with three parts of each
input in six passes. The log-sum over a vocabulary needs less: with two parts and a bfloat16 head two passes leave an
error of about a unit of the last place (docs/kernels.md, "The heads").

Axis letters: N tokens, n of a block, D model dimension, V vocabulary, v words of a tile, P parts (docs/glossary.md,
"Axis letters").
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int

from pallas_kernels.linear_loss import MASKED
from pallas_kernels.platform import precision, tpu_info

LANES, SUBLANES = 128, 8
SPLIT_ROWS = 32  # hidden states that are split in one piece of straight-line code
INTERPRETED_VMEM = 2 << 20  # bytes; small, for blocks of few tokens and words


class HeadBlocks(NamedTuple):
    """Tokens in a block, and words in a tile of the head."""

    n: int
    v: int


def choose_blocks(
    N: int, D: int, hidden_dtype: DTypeLike, head_dtype: DTypeLike, parts: int, vmem: int, cores: int = 1
) -> HeadBlocks:
    """As many tokens as VMEM has room for, up to 1,024: the head is read once for each block of them.

    All cores of a device get as many blocks.
    """
    word_bytes, token_bytes = (D * jnp.dtype(dtype).itemsize for dtype in (head_dtype, hidden_dtype))
    if hidden_dtype == jnp.float32:
        token_bytes += D * parts * 2
    v = 1024
    while v > 256 and 2 * v * word_bytes > vmem // 4:
        v //= 2
    room = vmem * 3 // 4 - 2 * v * word_bytes
    limit = max(LANES, min(1024, room // (token_bytes + 2 * v * 4)) // LANES * LANES)
    n = pl.cdiv(N, pl.cdiv(pl.cdiv(N, limit), cores) * cores)  # blocks of about the same size
    return HeadBlocks(pl.cdiv(n, LANES) * LANES, v)


def log_sum_exp(
    hidden: Float[Array, "N D"],
    head: Float[Array, "V D"],
    targets: Int[Array, " N"] | None = None,
    num_tokens: Int[Array, ""] | None = None,
    parts: int = 2,
    scale: float = 1.0,
    interpret: Any = False,
) -> tuple[Float[Array, " N"], Float[Array, " N"]]:
    """log sum over words of exp(scale x head @ hidden), and the logit of each token's target, scaled too.

    Args:
      hidden: float32 or bfloat16 hidden states.
      head: the output matrix, float32 or bfloat16.
      targets: words whose logits to return, with the same precision; none by default.
      num_tokens: only so many tokens are computed, in whole blocks, and the others' results are undefined.
      parts: bfloat16 parts of a float32 input. A bfloat16 input is its own only part. Passes of the matrix unit: as
        many as parts, if one input is bfloat16; 1, 3 or 6 with 1, 2 or 3 parts of two float32 inputs.
      scale: of the logits.
      interpret: see `pl.pallas_call`.

    Returns:
      float32 [N] each; 0 for a target that is no word.
    """
    (N, D), V = hidden.shape, len(head)
    vmem, cores = (INTERPRETED_VMEM, 1) if interpret else (tpu_info().vmem_capacity_bytes, tpu_info().num_cores)
    n, v = choose_blocks(N, D, hidden.dtype, head.dtype, parts, vmem, cores)
    hidden_parts, head_parts = (parts if x.dtype == jnp.float32 else 1 for x in (hidden, head))
    blocks = pl.cdiv(N, n)
    row = pl.BlockSpec((1, n), lambda i, j: (0, i))
    lse, target_logits = pl.pallas_call(
        functools.partial(_kernel, V, hidden_parts, head_parts, scale),
        name="head_log_sum_exp",
        grid=(blocks if num_tokens is None else pl.cdiv(num_tokens, n), pl.cdiv(V, v)),
        in_specs=[
            pl.BlockSpec((v, D), lambda i, j: (j, 0)),
            pl.BlockSpec((n, D), lambda i, j: (i, 0), pipeline_mode=None if interpret else pl.Buffered(1)),
            row,
        ],
        out_specs=[row, row],
        out_shape=[jax.ShapeDtypeStruct((1, N), jnp.float32)] * 2,
        scratch_shapes=[pltpu.VMEM((SUBLANES, n), jnp.float32)] * 3
        + [pltpu.VMEM((hidden_parts, n, D), jnp.bfloat16)] * (hidden.dtype == jnp.float32),
        interpret=interpret,
        cost_estimate=pl.CostEstimate(
            flops=2 * len(pairs(hidden_parts, head_parts)) * N * V * D,
            transcendentals=N * V,
            bytes_accessed=blocks * head.size * head.dtype.itemsize + hidden.size * hidden.dtype.itemsize,
        ),
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel", "arbitrary"), vmem_limit_bytes=vmem * 7 // 8
        ),
    )(head, hidden, (jnp.full(N, -1, jnp.int32) if targets is None else targets)[None])
    return lse[0], target_logits[0]


def _kernel(
    V: int, hidden_parts: int, head_parts: int, scale: float, head, hidden, target,  # read
    lse, target_logit,  # written
    row_max, row_sum, picked, *split_hidden,  # scratch: sums of each token by sublane, and the parts [P, n, D]
) -> None:  # fmt: skip
    j = pl.program_id(1)
    v, n = head.shape[0], hidden.shape[0]

    @pl.when(j == 0)
    def _() -> None:
        row_max[...] = jnp.full(row_max.shape, MASKED, jnp.float32)
        row_sum[...] = jnp.zeros(row_sum.shape, jnp.float32)
        picked[...] = jnp.zeros(picked.shape, jnp.float32)
        if split_hidden:
            _split_rows(hidden, split_hidden[0])

    tokens = [split_hidden[0][p] for p in range(hidden_parts)] if split_hidden else [hidden[...]]
    words = split(head[...], head_parts) if head.dtype == jnp.float32 else [head[...]]
    products = (multiply(words[b], tokens[a]) for a, b in pairs(hidden_parts, head_parts))
    logits = functools.reduce(jnp.add, products)
    if scale != 1:
        logits *= scale
    ids = j * v + jax.lax.broadcasted_iota(jnp.int32, (v, n), 0)
    if V % v:  # rows of the last tile that are no words, and hold anything
        logits = jnp.where(ids < V, logits, -jnp.inf)
    by_sublane = lambda x: x.reshape(v // SUBLANES, SUBLANES, n)  # noqa: E731
    picked[...] += by_sublane(jnp.where(ids == target[...], logits, 0)).sum(0)
    new_max = jnp.maximum(row_max[...], by_sublane(logits).max(0))
    weights = jnp.exp(by_sublane(logits) - new_max)
    row_sum[...] = row_sum[...] * jnp.exp(row_max[...] - new_max) + weights.sum(0)
    row_max[...] = new_max

    @pl.when(j == pl.num_programs(1) - 1)
    def _() -> None:
        top = row_max[...].max(0, keepdims=True)
        lse[...] = top + jnp.log((row_sum[...] * jnp.exp(row_max[...] - top)).sum(0, keepdims=True))
        target_logit[...] = picked[...].sum(0, keepdims=True)


def _split_rows(x: Any, parts: Any) -> None:
    """Writes the parts [P, n, D] of a Ref [n, D]."""

    def split_some(r: Array, _: None) -> None:
        rows = pl.ds(pl.multiple_of(r * SPLIT_ROWS, SPLIT_ROWS), SPLIT_ROWS)
        for p, part in enumerate(split(x[rows, :], parts.shape[0])):
            parts[p, rows, :] = part

    jax.lax.fori_loop(0, x.shape[0] // SPLIT_ROWS, split_some, None)


def multiply(words: Array, tokens: Array) -> Float[Array, "v n"]:
    """Logits [v, n] of words [v, D] and tokens [n, D], summed in float32."""
    contract = (((1,), (1,)), ((), ()))
    return jax.lax.dot_general(
        words, tokens, contract, precision=precision(words.dtype), preferred_element_type=jnp.float32
    )


def split(x: Float[Array, " *B"], parts: int) -> list[Float[Array, " *B"]]:
    """bfloat16 arrays that add up to float32 `x`: to 8 bits of it with one part, 16 with two, 24 with three.

    Rounded by their bits, because XLA may leave out a conversion to bfloat16 and back.
    """
    result = []
    for _ in range(parts):
        bits = jax.lax.bitcast_convert_type(x, jnp.int32)
        part = jax.lax.bitcast_convert_type((bits + 0x8000) & ~0xFFFF, jnp.float32)
        result.append(part.astype(jnp.bfloat16))
        x = x - part
    return result


def pairs(hidden_parts: int, head_parts: int) -> Sequence[tuple[int, int]]:
    """Which parts to multiply, the smallest products first; smaller ones are below what the parts leave out."""
    products = [(a, b) for a in range(hidden_parts) for b in range(head_parts) if a + b < max(hidden_parts, head_parts)]
    return sorted(products, key=sum, reverse=True)
