"""Gradients of a linear head's cross-entropy on a TPU: three products in one pass over the logits, which stay in VMEM.

Tiles of the head outside, blocks of tokens inside. A tile's gradient [v, D] is summed in VMEM and written once, in the
head's dtype. The gradient of the hidden states lies in HBM, float32: each step fetches a block of it, adds to it and
writes it back, one step ahead and two steps behind the products. As in `log_sum_exp_tpu`, logits lie words by tokens,
so that what is known of a token is one number on its lane.

Axis letters: N tokens, n of a block, D model dimension, V vocabulary, v words of a tile (docs/glossary.md, "Axis
letters").
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jaxtyping import Array, Float, Int

from pallas_kernels.log_sum_exp_tpu import INTERPRETED_VMEM, LANES, HeadBlocks, multiply
from pallas_kernels.platform import precision, tpu_info

BUFFERS = 3  # blocks of the hidden states' gradient in VMEM: fetched, added to, written
MIN_BLOCKS = 3  # of tokens: a block must be written before it is fetched for the next tile
SUB = 256  # words whose logits exist at a time
ROWS = 32  # rows of a gradient that are set or rounded in one piece of straight-line code


def choose_gradient_blocks(N: int, D: int, itemsize: int, vmem: int) -> HeadBlocks:
    """As many tokens as fill the matrix unit, up to 512, and then the longest tile of the head that VMEM has room for.

    The sums of the head's gradient are read and written once for each block of tokens; the hidden states and their
    gradient once for each tile.

    Raises:
      ValueError: if D is too large for this VMEM.
    """
    largest = pl.cdiv(pl.cdiv(N, MIN_BLOCKS), LANES) * LANES
    for n in (512, 256, 128):
        for v in (2048, 1536, 1024, 768, 512):
            size = v * D * (4 + 2 * itemsize) + n * D * (2 * itemsize + BUFFERS * 4) + 3 * SUB * n * 4
            if size <= vmem * 29 // 32:
                return HeadBlocks(min(n, largest), v)
    raise ValueError(f"hidden states of {D:,} numbers are too long for the {vmem >> 20} MB of this TPU's VMEM")


def gradients(
    hidden: Float[Array, "N D"],
    head: Float[Array, "V D"],
    lse: Float[Array, " N"],
    targets: Int[Array, " N"],
    weights: Float[Array, " N"],
    num_tokens: Int[Array, ""],
    interpret: Any = False,
) -> tuple[Float[Array, "N D"], Float[Array, "V D"]]:
    """d / d hidden and d / d head of the sum over tokens of weight x (lse - logit of the target).

    Args:
      hidden, head: of one dtype.
      lse: log-sum-exp of each token's logits.
      targets: a word of each token.
      weights: of the tokens; 0, with finite hidden states, for those in the last block that do not count.
      num_tokens: only so many tokens are computed, in whole blocks.
      interpret: see `pl.pallas_call`.

    Returns:
      float32 [N, D], undefined for tokens behind `num_tokens`; and [V, D] in the dtype of the head, of float32 sums.
    """
    (N, D), V = hidden.shape, len(head)
    vmem = INTERPRETED_VMEM if interpret else tpu_info().vmem_capacity_bytes
    n, v = choose_gradient_blocks(N, D, head.dtype.itemsize, vmem)
    padded = max(pl.cdiv(N, n), MIN_BLOCKS) * n
    hidden = jnp.pad(hidden, ((0, padded - N), (0, 0)))
    rows = [jnp.pad(x, (0, padded - N))[None] for x in (lse, targets, weights)]
    active = pl.cdiv(num_tokens, n).astype(jnp.int32)
    row = pl.BlockSpec((1, n), lambda j, i, _: (0, i))
    tile = pl.BlockSpec((v, D), lambda j, i, _: (j, 0), pipeline_mode=None if interpret else pl.Buffered(1))
    d_hidden, d_head = pl.pallas_call(
        functools.partial(_kernel, V),
        name="cross_entropy_gradients",
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=1,
            grid=(pl.cdiv(V, v), jnp.maximum(active, MIN_BLOCKS)),
            in_specs=[tile, pl.BlockSpec((n, D), lambda j, i, _: (i, 0)), row, row, row],
            out_specs=[pl.BlockSpec(memory_space=pl.ANY), tile],
            scratch_shapes=[
                pltpu.VMEM((v, D), jnp.float32),
                pltpu.VMEM((BUFFERS, n, D), jnp.float32),
                pltpu.SemaphoreType.DMA((BUFFERS,)),
                pltpu.SemaphoreType.DMA((BUFFERS,)),
            ],
        ),
        out_shape=[
            jax.ShapeDtypeStruct((padded // n, n, D), jnp.float32),
            jax.ShapeDtypeStruct(head.shape, head.dtype),
        ],
        interpret=interpret,
        cost_estimate=pl.CostEstimate(
            flops=6 * N * V * D,
            transcendentals=N * V,
            bytes_accessed=pl.cdiv(V, v) * N * D * (hidden.dtype.itemsize + 8) + 2 * head.size * head.dtype.itemsize,
        ),
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("arbitrary", "arbitrary"), vmem_limit_bytes=vmem * 127 // 128
        ),
    )(active[None], head, hidden, *rows)
    return d_hidden.reshape(padded, D)[:N], d_head


def _kernel(
    V: int, active, head, hidden, lse, target, weight,  # read
    d_hidden, d_head,  # written
    head_sums, hidden_sums, fetched, written,  # scratch
) -> None:  # fmt: skip
    j, i, blocks = pl.program_id(0), pl.program_id(1), pl.num_programs(1)
    (v, _), n = head.shape, hidden.shape[0]
    step = j * blocks + i
    slot = step % BUFFERS

    def fetch(at: Array) -> Any:
        return pltpu.make_async_copy(d_hidden.at[at % blocks], hidden_sums.at[at % BUFFERS], fetched.at[at % BUFFERS])

    def write(at: Array) -> Any:
        return pltpu.make_async_copy(hidden_sums.at[at % BUFFERS], d_hidden.at[at % blocks], written.at[at % BUFFERS])

    is_last = step == pl.num_programs(0) * blocks - 1
    pl.when(step >= BUFFERS - 1)(lambda: write(step - 2).wait())  # its buffer is the next step's
    pl.when((step + 1 >= blocks) & ~is_last)(lambda: fetch(step + 1).start())

    def zero_head_sums(at: Any) -> None:
        head_sums[at, :] = jnp.zeros((ROWS, head_sums.shape[1]), jnp.float32)

    def zero_hidden_sums(at: Any) -> None:
        hidden_sums[slot, at, :] = jnp.zeros((ROWS, hidden_sums.shape[2]), jnp.float32)

    def write_d_head(at: Any) -> None:
        d_head[at, :] = head_sums[at, :].astype(d_head.dtype)

    pl.when(i == 0)(lambda: _each_rows(v, zero_head_sums))
    pl.when(j == 0)(lambda: _each_rows(n, zero_hidden_sums))
    pl.when(j > 0)(lambda: fetch(step).wait())

    def add(s: Array, _: None) -> None:
        start = pl.multiple_of(s * SUB, SUB)
        at = pl.ds(start, SUB)
        words, tokens = head[at, :], hidden[...]
        first = j * v + start
        if V % v:  # rows of the last tile that are no words may hold NaN
            words = jnp.where(first + jax.lax.broadcasted_iota(jnp.int32, words.shape, 0) < V, words, 0)
        ids = first + jax.lax.broadcasted_iota(jnp.int32, (SUB, n), 0)
        d_logits = jnp.exp(multiply(words, tokens) - lse[...]) - jnp.where(ids == target[...], 1.0, 0.0)
        if V % v:
            d_logits = jnp.where(ids < V, d_logits, 0)
        d_logits = (d_logits * weight[...]).astype(words.dtype)
        dot = functools.partial(
            jax.lax.dot_general, precision=precision(words.dtype), preferred_element_type=jnp.float32
        )
        head_sums[at, :] += dot(d_logits, tokens, (((1,), (0,)), ((), ())))
        hidden_sums[slot] += dot(d_logits, words, (((0,), (0,)), ((), ())))

    pl.when(i < active[0])(lambda: jax.lax.fori_loop(0, v // SUB, add, None))
    write(step).start()

    pl.when(i == blocks - 1)(lambda: _each_rows(v, write_d_head))

    def wait_for_the_last_two() -> None:
        write(step - 1).wait()
        write(step).wait()

    pl.when(is_last)(wait_for_the_last_two)


def _each_rows(count: int, visit: Callable[[Any], None]) -> None:
    """A loop over rows, because straight-line code for all of them takes long to compile."""
    jax.lax.fori_loop(0, count // ROWS, lambda r, _: visit(pl.ds(pl.multiple_of(r * ROWS, ROWS), ROWS)), None)
