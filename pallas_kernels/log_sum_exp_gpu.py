"""Log-sum-exp of a linear head's logits on a GPU, in Pallas through Triton: the logits of a tile stay in registers.

A program takes a block of tokens and a share of the vocabulary, and goes through its share tile by tile with a running
maximum and sum of each token. The shares' log-sums are joined outside, in a fixed order: the same bits from run to run,
and a token's do not depend on the tokens with it.

float32 hidden states are split into bfloat16 parts, as in `log_sum_exp_tpu`: true float32 products do not run on a
GPU's tensor cores. Each part is one more product with a tile of the head that is fetched once.

Axis letters: N tokens, n of a block, D model dimension, V vocabulary, v words of a tile, P parts (docs/glossary.md,
"Axis letters").
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton
from jaxtyping import Array, Float, Int

from pallas_kernels.linear_loss import MASKED
from pallas_kernels.log_sum_exp_tpu import HeadBlocks, split
from pallas_kernels.token_labels import INITIAL_MAX

# The largest whose logits fit into the registers of an H100 without spills; benchmarks/heads_h100.py shows it.
BLOCKS = HeadBlocks(n=128, v=256)
DEPTH = 64  # numbers of a token and of a word that are multiplied in a step
NUM_WARPS = 8
SHARES = 128  # of the vocabulary: with them a single block of tokens occupies the 132 cores of an H100
GROUP_BYTES = 24 << 20  # hidden states that are read at a time: half of an H100's L2 cache, the head streams through


def choose_groups(N: int, D: int, P: int) -> tuple[int, int]:
    """How often the head is read, and the blocks of tokens that read it together."""
    blocks = pl.cdiv(N, BLOCKS.n)
    groups = pl.cdiv(blocks, max(1, GROUP_BYTES // (P * BLOCKS.n * D * 2)))
    return groups, pl.cdiv(blocks, groups)


def log_sum_exp(
    hidden: Float[Array, "N D"],
    head: Float[Array, "V D"],
    num_tokens: Int[Array, ""] | None = None,
    parts: int = 2,
    interpret: bool = False,
) -> Float[Array, " N"]:
    """log sum over words of exp(head @ hidden).

    Args:
      hidden: float32 or bfloat16 hidden states.
      head: the output matrix, in bfloat16; D is a multiple of 64.
      num_tokens: only so many tokens are computed, in whole blocks, and the others' results are undefined.
      parts: bfloat16 parts of float32 hidden states. A bfloat16 input is its own only part.
      interpret: see `pl.pallas_call`.

    Returns:
      float32 [N].

    Raises:
      ValueError: if the head has another dtype, or D is no multiple of 64.
    """
    (N, D), V, (n, v) = hidden.shape, len(head), BLOCKS
    if head.dtype != jnp.bfloat16 or D % DEPTH:
        raise ValueError(f"head {head.dtype}[{V}, {D}]: the kernel takes bfloat16, and D in multiples of {DEPTH}")
    hidden_parts = jnp.stack(split(hidden, parts) if hidden.dtype == jnp.float32 else [hidden])
    P, tiles = len(hidden_parts), pl.cdiv(V, v)
    groups, group = choose_groups(N, D, P)
    share = pl.cdiv(tiles, SHARES)
    shares = pl.cdiv(tiles, share)
    log_sums = pl.pallas_call(
        functools.partial(_kernel, V, tiles, share),
        name="head_log_sum_exp",
        grid=(group, shares, groups),  # blocks of a group that read the same words start together
        in_specs=[
            pl.BlockSpec((1,), lambda i, s, g: (0,)),
            pl.BlockSpec((P, n, D), lambda i, s, g: (0, g * group + i, 0)),
            pl.BlockSpec((max(V, v), D), lambda i, s, g: (0, 0)),
        ],
        out_specs=pl.BlockSpec((None, n), lambda i, s, g: (s, g * group + i)),
        out_shape=jax.ShapeDtypeStruct((shares, groups * group * n), jnp.float32),
        # Two parts and more are so many products that loading one step ahead is enough, and leaves shared memory.
        compiler_params=triton.CompilerParams(num_warps=NUM_WARPS, num_stages=3 if P == 1 else 2),
        interpret=interpret,
    )(
        jnp.reshape(N if num_tokens is None else num_tokens, 1).astype(jnp.int32),
        jnp.pad(hidden_parts, ((0, 0), (0, groups * group * n - N), (0, 0))),
        jnp.pad(head, ((0, max(0, v - V)), (0, 0))),
    )
    return jax.nn.logsumexp(log_sums[:, :N], 0)


def _kernel(V: int, tiles: int, share: int, num_tokens, hidden, head, log_sum) -> None:
    P, n, D = hidden.shape
    v = BLOCKS.v
    block = pl.program_id(2) * pl.num_programs(0) + pl.program_id(0)
    first_tile = pl.program_id(1) * share

    def visit(tile: Array, state: tuple[Array, Array]) -> tuple[Array, Array]:
        row_max, row_sum = state
        begin = tile * v
        start = jnp.minimum(begin, max(V - v, 0))  # the last tile is whole; words that another one has are masked

        def multiply(step: Array, logits: Array) -> Array:
            depth = pl.ds(step * DEPTH, DEPTH)
            words = head[pl.ds(start, v), depth].T
            for part in reversed(range(P)):  # the smallest products first
                logits += jnp.dot(hidden[part, :, depth], words, preferred_element_type=jnp.float32)
            return logits

        logits = jax.lax.fori_loop(0, D // DEPTH, multiply, jnp.zeros((n, v), jnp.float32))
        ids = start + jnp.arange(v)
        logits = jnp.where(((ids >= begin) & (ids < V))[None, :], logits, MASKED)
        new_max = jnp.maximum(row_max, logits.max(1))
        weights = jnp.exp(logits - new_max[:, None])
        return new_max, row_sum * jnp.exp(row_max - new_max) + weights.sum(1)

    last_tile = jnp.where(block * n < num_tokens[0], jnp.minimum(first_tile + share, tiles), first_tile)
    initial = jnp.full(n, INITIAL_MAX, jnp.float32), jnp.zeros(n, jnp.float32)
    row_max, row_sum = jax.lax.fori_loop(first_tile, last_tile, visit, initial)
    log_sum[...] = row_max + jnp.log(row_sum)
