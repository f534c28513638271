"""Gradients of a loss of a linear head on a TPU, in one pass over the logits, which stay in VMEM.

The loss is a `TileGradient`: the cross-entropy (three products), or a divergence from a teacher, whose head is one more
and gets no gradient. Tiles of the heads outside, blocks of tokens inside. A tile's gradient [v, D] is summed in VMEM
and written once, in the head's dtype. The gradient of the hidden states lies in HBM, float32: each step fetches a block
of it, adds to it and writes it back, one step ahead and two steps behind the products. As in `log_sum_exp_tpu`, logits
lie words by tokens, so that what is known of a token is one number on its lane.

Axis letters: N tokens, n of a block, D model dimension, V vocabulary, v words of a tile (docs/glossary.md, "Axis
letters").
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jaxtyping import Array, Float, Int, Num

from pallas_kernels.linear_loss import HiddenAndHead
from pallas_kernels.log_sum_exp_tpu import INTERPRETED_VMEM, LANES, HeadBlocks, multiply
from pallas_kernels.platform import precision, tpu_info

BUFFERS = 3  # blocks of the hidden states' gradient in VMEM: fetched, added to, written
MIN_BLOCKS = 3  # of tokens: a block must be written before it is fetched for the next tile
SUB = 256  # words whose logits exist at a time
ROWS = 32  # rows of a gradient that are set or rounded in one piece of straight-line code

# (float32 logits [v, n] of each head, ids of the words [v, n], what is known of the tokens [1, n] each)
# -> the gradient of the first head's logits, and the words' terms of a sum for each token
TileGradient = Callable[[Sequence[Array], Array, Sequence[Array]], tuple[Array, Array | None]]


def choose_gradient_blocks(N: int, D: int, itemsize: int, vmem: int, teachers_D: int = 0) -> HeadBlocks:
    """As many tokens as fill the matrix unit, up to 512, and then the longest tile of the head that VMEM has room for.

    The sums of the head's gradient are read and written once for each block of tokens; the hidden states and their
    gradient once for each tile. `teachers_D` is the sum of the model dimensions of heads without a gradient.

    Raises:
      ValueError: if D is too large for this VMEM.
    """
    largest = pl.cdiv(pl.cdiv(N, MIN_BLOCKS), LANES) * LANES
    for n in (512, 256, 128):
        tokens = n * D * (2 * itemsize + BUFFERS * 4) + n * teachers_D * 2 * itemsize
        for v in (2048, 1536, 1024, 768, 512):
            words = v * D * (4 + 2 * itemsize) + v * teachers_D * itemsize
            if words + tokens + 3 * SUB * n * 4 * (2 if teachers_D else 1) <= vmem * 29 // 32:
                return HeadBlocks(min(n, largest), v)
    raise ValueError(f"hidden states of {D + teachers_D:,} numbers are too long for the {vmem >> 20} MB of VMEM")


def gradients(
    models: Sequence[HiddenAndHead],
    rows: Sequence[Num[Array, " N"]],
    tile_gradient: TileGradient,
    num_tokens: Int[Array, ""],
    has_terms: bool = False,
    interpret: Any = False,
) -> tuple[Float[Array, "N D"], Float[Array, "V D"], list[Float[Array, " N"]]]:
    """d / d hidden and d / d head of the first model, for a sum over tokens of their losses.

    Args:
      models: hidden states and head of the student, in one dtype, then of the teachers.
      rows: what `tile_gradient` needs to know of each token.
      tile_gradient: the loss. For tokens of the last block that do not count, hidden states and rows must be finite,
        and make its gradient 0.
      num_tokens: only so many tokens are computed, in whole blocks.
      has_terms: whether `tile_gradient` gives terms.
      interpret: see `pl.pallas_call`.

    Returns:
      float32 [N, D], undefined for tokens behind `num_tokens`; [V, D] in the dtype of the head, of float32 sums; and
      the float32 sum of the terms of each token, if there are any.
    """
    (hidden, head), *teachers = models
    (N, D), V = hidden.shape, len(head)
    teachers_D = sum(hidden.shape[1] for hidden, _ in teachers)
    vmem = INTERPRETED_VMEM if interpret else tpu_info().vmem_capacity_bytes
    n, v = choose_gradient_blocks(N, D, head.dtype.itemsize, vmem, teachers_D)
    blocks = max(pl.cdiv(N, n), MIN_BLOCKS)
    hiddens = [jnp.pad(hidden, ((0, blocks * n - N), (0, 0))) for hidden, _ in models]
    padded_rows = [jnp.pad(x, (0, blocks * n - N))[None] for x in rows]
    active = pl.cdiv(num_tokens, n).astype(jnp.int32)

    def tile(head: Array) -> pl.BlockSpec:
        mode = None if interpret else pl.Buffered(1)
        return pl.BlockSpec((v, head.shape[1]), lambda j, i, _: (j, 0), pipeline_mode=mode)

    d_hidden, d_head, sums = pl.pallas_call(
        functools.partial(_kernel, V, tile_gradient),
        name="head_gradients",
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=1,
            grid=(pl.cdiv(V, v), jnp.maximum(active, MIN_BLOCKS)),
            in_specs=[
                [tile(head) for _, head in models],
                [pl.BlockSpec((n, x.shape[1]), lambda j, i, _: (i, 0)) for x in hiddens],
                [pl.BlockSpec((1, n), lambda j, i, _: (0, i))] * len(rows),
            ],
            out_specs=[
                pl.BlockSpec(memory_space=pl.ANY),
                tile(head),
                [pl.BlockSpec((blocks, 1, n), lambda j, i, _: (0, 0, 0))] * has_terms,
            ],
            scratch_shapes=[
                pltpu.VMEM((v, D), jnp.float32),
                pltpu.VMEM((BUFFERS, n, D), jnp.float32),
                pltpu.SemaphoreType.DMA((BUFFERS,)),
                pltpu.SemaphoreType.DMA((BUFFERS,)),
            ],
        ),
        out_shape=[
            jax.ShapeDtypeStruct((blocks, n, D), jnp.float32),
            jax.ShapeDtypeStruct(head.shape, head.dtype),
            [jax.ShapeDtypeStruct((blocks, 1, n), jnp.float32)] * has_terms,
        ],
        interpret=interpret,
        cost_estimate=pl.CostEstimate(
            flops=(6 * D + 2 * teachers_D) * N * V,
            transcendentals=N * V * len(models),
            bytes_accessed=pl.cdiv(V, v) * N * ((D + teachers_D) * hidden.dtype.itemsize + D * 8)
            + V * (2 * D + teachers_D) * head.dtype.itemsize,
        ),
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("arbitrary", "arbitrary"), vmem_limit_bytes=vmem * 127 // 128
        ),
    )(active[None], [head for _, head in models], hiddens, padded_rows)
    return d_hidden.reshape(-1, D)[:N], d_head, [x.reshape(-1)[:N] for x in sums]


def _kernel(
    V: int, tile_gradient: TileGradient, active, heads, hiddens, rows,  # read
    d_hidden, d_head, sums,  # written
    head_sums, hidden_sums, fetched, written,  # scratch
) -> None:  # fmt: skip
    j, i, blocks = pl.program_id(0), pl.program_id(1), pl.num_programs(1)
    v, n = d_head.shape[0], hiddens[0].shape[0]
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

    @pl.when(j == 0)
    def _() -> None:
        _each_rows(n, zero_hidden_sums)
        for each in sums:
            each[i] = jnp.zeros((1, n), jnp.float32)

    pl.when(i == 0)(lambda: _each_rows(v, zero_head_sums))
    pl.when(j > 0)(lambda: fetch(step).wait())

    def add(s: Array, _: None) -> None:
        start = pl.multiple_of(s * SUB, SUB)
        at = pl.ds(start, SUB)
        first = j * v + start
        words, tokens = [head[at, :] for head in heads], [hidden[...] for hidden in hiddens]
        if V % v:  # rows of the last tile that are no words may hold NaN
            is_word = lambda x: first + jax.lax.broadcasted_iota(jnp.int32, x.shape, 0) < V  # noqa: E731
            words = [jnp.where(is_word(x), x, 0) for x in words]
        ids = first + jax.lax.broadcasted_iota(jnp.int32, (SUB, n), 0)
        logits = [multiply(*pair) for pair in zip(words, tokens, strict=True)]
        d_logits, terms = tile_gradient(logits, ids, [row[...] for row in rows])
        if V % v:
            d_logits = jnp.where(ids < V, d_logits, 0)
        if terms is not None:
            terms = jnp.where(ids < V, terms, 0) if V % v else terms
            sums[0][i] += terms.sum(0, keepdims=True)
        d_logits = d_logits.astype(tokens[0].dtype)
        dot = functools.partial(
            jax.lax.dot_general, precision=precision(d_logits.dtype), preferred_element_type=jnp.float32
        )
        head_sums[at, :] += dot(d_logits, tokens[0], (((1,), (0,)), ((), ())))
        hidden_sums[slot] += dot(d_logits, words[0], (((0,), (0,)), ((), ())))

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
