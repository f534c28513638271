"""Matrix products with weights in 8 bits: e4m3 or int8, one float32 scale per output channel.

`quantized_matmul` is what models call; `quantize` makes its weights. Every TPU from v5e and v5p on takes every kind
(v4's compiler: "Unsupported matmul RHS type"), as do GPUs and CPUs through XLA. Faster than bfloat16
is e4m3 x e4m3 on TPU7x and H100, int8 x int8 on v5e, v5p, v6e and H100; elsewhere 8 bits save memory traffic only.
For serving: nothing here promises a gradient.
"""

from __future__ import annotations

import functools
from typing import Literal, NamedTuple, get_args

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Num

from pallas_kernels.platform import platform, tpu_info

Activations = Literal["per_token", "per_tensor"]
LIMITS = {jnp.dtype(jnp.float8_e4m3fn): 448.0, jnp.dtype(jnp.int8): 127.0}  # the largest values used
ROUNDS_TO_0 = {jnp.dtype(jnp.float8_e4m3fn): 2**-10, jnp.dtype(jnp.int8): 0.5}  # the largest values that do
SMALLEST_PEAK = 1e-30  # keeps scales, and so quotients, away from zero and from subnormal numbers
VMEM_LIMIT = 48 * 2**20  # of 64 MiB on TPU7x, 128 MiB on v5e, v5p, v6e


class Quantized(NamedTuple):
    """The matrix [K inputs, N outputs] `values * scale`: float8_e4m3fn or int8, times float32.

    `values` hold neither NaN nor -0: TPUs before TPU7x read their bits as a format that has neither, in which the
    NaN of e4m3 is 480. A channel that held NaN or infinity has the scale NaN instead.
    """

    values: Num[Array, "*B K N"]
    scale: Float[Array, "*B N"]


def quantize(weight: Float[Array, "*B K N"], dtype: DTypeLike) -> Quantized:
    """Round to nearest even, each output channel scaled so that its largest magnitude is 448 (e4m3) or 127 (int8).

    So nothing saturates. A channel of zeros stays zeros; one with NaN or infinity becomes NaN throughout.
    """
    values, scale = to_8_bits(weight, dtype, axis=-2)
    return Quantized(values, scale[..., 0, :])


def dequantize(weight: Quantized) -> Float[Array, "*B K N"]:
    """float32."""
    return weight.values.astype(jnp.float32) * weight.scale[..., None, :]


def quantized_matmul(
    x: Float[Array, "*T K"],
    weight: Quantized,
    activations: Activations | None = None,
    inputs_over: tuple[str, ...] = (),
) -> Float[Array, "*T N"]:
    """`x @ dequantize(weight)` in the dtype of `x`, accumulated in float32, scales applied once, to the sums.

    Args:
      x: rounded to bfloat16 before the product, or to 8 bits, see `activations`.
      weight: one matrix; `jax.vmap` for several. With a dimension sharded, call inside `jax.shard_map`.
      activations: see `round_tokens`; 8 bits are multiplied by 8 bits (int8 summed in int32).
      inputs_over: the mesh axes that K lies over: token scales and sums, float32, are those of all its parts.
    """
    if weight.values.ndim != 2 or x.shape[-1] != weight.values.shape[0]:
        raise ValueError(f"x {x.shape} does not end in the first of two dimensions of weight {weight.values.shape}")
    tokens, token_scales = round_tokens(x.reshape(-1, x.shape[-1]), weight.values.dtype, activations, inputs_over)
    scales = (weight.scale[None, :], *token_scales)
    matmul = matmul_xla
    if platform() == "tpu":
        tpu_info()  # or ValueError
        matmul = matmul_pallas
    out = matmul(tokens, weight.values, scales, jnp.float32 if inputs_over else x.dtype)
    if inputs_over:
        out = jax.lax.psum(out, inputs_over).astype(x.dtype)
    return out.reshape(*x.shape[:-1], out.shape[-1])


def round_tokens(
    x: Float[Array, "T K"], dtype: DTypeLike, activations: Activations | None, inputs_over: tuple[str, ...] = ()
) -> tuple[Num[Array, "T K"], tuple[Float[Array, "T 1"], ...]]:
    """What is multiplied with 8-bit weights of this dtype: `x` in bfloat16, or in 8 bits with its scales.

    Args:
      activations: `"per_token"` rounds each row of `x` as `quantize` does a channel; one with NaN or infinity gives a
        row of NaN. `"per_tensor"` gives all rows on a device one scale, the largest: what a row becomes then depends
        on the others, and small rows lose their bits. None: bfloat16.
      inputs_over: see `quantized_matmul`.
    """
    if activations is None:
        return x.astype(jnp.bfloat16), ()
    if activations not in get_args(Activations):
        raise ValueError(f"activations is {activations!r}, not None or one of {', '.join(get_args(Activations))}")
    scale = _scales(x, dtype, -1)
    if inputs_over:
        scale = jax.lax.pmax(scale, inputs_over)
    if activations == "per_tensor":
        scale = jnp.full_like(scale, jnp.max(scale))
    return _rounded(x, scale, dtype), (scale,)


def matmul_xla(
    x: Num[Array, "T K"], weight: Num[Array, "K N"], scales: tuple[Array, ...], dtype: DTypeLike
) -> Float[Array, "T N"]:
    """`x @ weight` times the scales, [1, N] and maybe [T, 1]; `x` is bfloat16 or of the 8-bit dtype of `weight`."""
    sums = jax.lax.dot(
        x,
        weight.astype(x.dtype),
        # On H100 the default sums e4m3 products in fewer bits than float32 (openxla/xla pull request 6599).
        precision=jax.lax.Precision.HIGHEST,
        preferred_element_type=_sum_dtype(x),
    )
    return _scaled(sums, scales, dtype)


class Blocks(NamedTuple):
    """Tokens and output channels per step of the grid; inputs per product inside a step."""

    tokens: int
    out: int
    chunk: int


def choose_blocks(T: int, K: int, N: int, itemsize: int, unit: int) -> Blocks:
    """For x [T, K] of `itemsize` bytes and a weight [K, N], on a chip whose matrix unit is `unit` columns wide.

    A step of the grid takes all of K, so that `x` is read once and unfinished sums never leave the chip. Each weight
    meets up to 1024 tokens (512 on v5) while it is there, which is work enough to hide its way from memory.
    """
    wide = unit // 128
    tokens = _even(T, min(max(8 * 2**20 // (K * itemsize), 32), 512 * wide), 32)
    # 2 MiB of weights hide the start of a step. Sums of 512 x 256, of 1024 x 512 where the unit is 256 wide, keep the
    # unrolled code, and its compiling, small. Half of each, and what follows a step's products takes a fifth of it.
    channels = min(max(2 * 2**20 // K, 256), wide**2 * 2**17 // tokens, 1024)
    return Blocks(tokens, _even(N, channels, 128), _even(K, 4096, 128))


def matmul_pallas(
    x: Num[Array, "T K"],
    weight: Num[Array, "K N"],
    scales: tuple[Array, ...],
    dtype: DTypeLike,
    blocks: Blocks | None = None,
    interpret: bool | pltpu.InterpretParams = False,
) -> Float[Array, "T N"]:
    """`matmul_xla` for TPU. What the last blocks hold beyond the arrays stays in rows and columns nobody keeps."""
    (T, K), N = x.shape, weight.shape[1]
    blocks = blocks or choose_blocks(T, K, N, x.dtype.itemsize, tpu_info().mxu_column_size)
    out = jax.eval_shape(functools.partial(matmul_xla, dtype=dtype), x, weight, scales)  # varies over a mesh as that
    return pl.pallas_call(
        functools.partial(_kernel, chunk=blocks.chunk),
        grid=(pl.cdiv(T, blocks.tokens), pl.cdiv(N, blocks.out)),
        in_specs=[
            pl.BlockSpec((blocks.tokens, K), lambda i, j: (i, 0)),
            pl.BlockSpec((K, blocks.out), lambda i, j: (0, j)),
            (
                pl.BlockSpec((1, blocks.out), lambda i, j: (0, j)),
                pl.BlockSpec((blocks.tokens, 1), lambda i, j: (i, 0)),
            )[: len(scales)],
        ],
        out_specs=pl.BlockSpec((blocks.tokens, blocks.out), lambda i, j: (i, j)),
        out_shape=out,
        compiler_params=pltpu.CompilerParams(dimension_semantics=("parallel", "parallel"), vmem_limit_bytes=VMEM_LIMIT),
        cost_estimate=pl.CostEstimate(
            flops=2 * T * K * N,
            bytes_accessed=x.nbytes + pl.cdiv(T, blocks.tokens) * weight.nbytes + out.size * out.dtype.itemsize,
            transcendentals=0,
        ),
        interpret=interpret,
    )(x, weight, scales)


def _kernel(x: jax.Ref, weight: jax.Ref, scales: tuple[jax.Ref, ...], out: jax.Ref, chunk: int) -> None:
    K = x.shape[1]

    def product(start: int | Array, size: int) -> Array:
        part = weight[pl.ds(start, size), :]
        # The MXU takes bfloat16 x e4m3 as it is, which spares the vector unit the work of unpacking.
        part = part.astype(x.dtype) if part.dtype == jnp.int8 else part
        return jnp.dot(x[:, pl.ds(start, size)], part, preferred_element_type=_sum_dtype(x))

    sums = jax.lax.fori_loop(
        0,
        K // chunk,
        lambda i, sums: sums + product(pl.multiple_of(i * chunk, chunk), chunk),
        jnp.zeros(out.shape, _sum_dtype(x)),
    )
    if K % chunk:
        sums += product(K // chunk * chunk, K % chunk)
    out[...] = _scaled(sums, tuple(scale[...] for scale in scales), out.dtype)


def _sum_dtype(x: Array | jax.Ref) -> DTypeLike:
    return jnp.int32 if x.dtype == jnp.int8 else jnp.float32


def _scaled(sums: Array, scales: tuple[Array, ...], dtype: DTypeLike) -> Array:
    sums = sums.astype(jnp.float32)
    for scale in scales:
        sums *= scale
    return sums.astype(dtype)


def to_8_bits(x: Float[Array, " *B"], dtype: DTypeLike, axis: int | tuple[int, ...]) -> tuple[Array, Array]:
    """8-bit values, and scales of length 1 along `axis`; see `quantize`."""
    scale = _scales(x, dtype, axis)
    return _rounded(x, scale, dtype), scale


def _scales(x: Float[Array, " *B"], dtype: DTypeLike, axis: int | tuple[int, ...]) -> Array:
    if jnp.dtype(dtype) not in LIMITS:
        raise ValueError(f"cannot quantize to {jnp.dtype(dtype)}, only to {' or '.join(map(str, LIMITS))}")
    # Of their bits, infinity and NaN are the largest: one pass finds them and the peak. (On CPU a maximum of floats may
    # overlook a NaN.)
    bits = jax.lax.bitcast_convert_type(jnp.abs(x.astype(jnp.float32)), jnp.int32)
    peak = jax.lax.bitcast_convert_type(jnp.max(bits, axis, keepdims=True), jnp.float32)
    return jnp.where(jnp.isfinite(peak), jnp.maximum(peak, SMALLEST_PEAK) / LIMITS[jnp.dtype(dtype)], jnp.nan)


def _rounded(x: Float[Array, " *B"], scale: Array, dtype: DTypeLike) -> Array:
    values = x.astype(jnp.float32) / scale
    # What rounds to 0 becomes 0 and not -0; so does NaN, for then the scale is NaN.
    values = jnp.where(jnp.abs(values) > ROUNDS_TO_0[jnp.dtype(dtype)], values, 0)
    return (jnp.round(values) if dtype == jnp.int8 else values).astype(dtype)


def _even(size: int, most: int, multiple: int) -> int:
    """The length of the fewest blocks that cover `size`, all alike: all of it, or a multiple within `most`."""
    most -= most % multiple
    if size <= most:
        return size
    return pl.cdiv(pl.cdiv(size, pl.cdiv(size, most)), multiple) * multiple
