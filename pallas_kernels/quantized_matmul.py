"""Matrix products with weights in 8 bits: e4m3 or int8, one float32 scale per output channel.

`quantized_matmul` is what models call; `quantize` makes its weights. XLA computes the product on every platform: it
reads 8 bits out of a stack of layers without copying them (docs/kernels.md compares a Pallas kernel). e4m3 x e4m3 is
faster than bfloat16 on TPU7x and H100, int8 x int8 on v5e, v5p, v6e and H100; elsewhere 8 bits only save memory
traffic. For serving: gradients are not supported.

Axis letters: T tokens, K inputs and N outputs of a matrix, B leading axes (docs/glossary.md, "Axis letters").
"""

from __future__ import annotations

from typing import Literal, NamedTuple, get_args

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Num

from pallas_kernels.platform import product_dtype

Activations = Literal["per_token", "per_tensor"]
LIMITS = {jnp.dtype(jnp.float8_e4m3fn): 448.0, jnp.dtype(jnp.int8): 127.0}  # the largest values in use
ROUNDS_TO_0 = {jnp.dtype(jnp.float8_e4m3fn): 2**-10, jnp.dtype(jnp.int8): 0.5}  # the largest that round to 0
SMALLEST_PEAK = 1e-30  # keeps scales, and so quotients, away from zero and from subnormal numbers


class Quantized(NamedTuple):
    """The matrix [K inputs, N outputs] `values * scale`.

    Attributes:
      values: float8_e4m3fn or int8, without NaN and -0: TPUs before TPU7x read the bits in a format that has neither,
        and in which e4m3's NaN is 480.
      scale: float32 of each output channel; NaN for a channel that held NaN or infinity.
    """

    values: Num[Array, "*B K N"]
    scale: Float[Array, "*B N"]


def quantize(weight: Float[Array, "*B K N"], dtype: DTypeLike) -> Quantized:
    """Rounds a matrix to 8 bits, to nearest even.

    Each output channel is scaled so that its largest magnitude is 448 (e4m3) or 127 (int8): nothing saturates. A
    channel of zeros stays zero; a channel with NaN or infinity becomes NaN throughout.

    Args:
      weight: inputs x outputs, with any leading axes.
      dtype: float8_e4m3fn or int8.

    Raises:
      ValueError: for another dtype.
    """
    values, scale = to_8_bits(weight, dtype, axis=-2)
    return Quantized(values, scale[..., 0, :])


def dequantize(weight: Quantized) -> Float[Array, "*B K N"]:
    """The float32 matrix `values * scale`."""
    return weight.values.astype(jnp.float32) * weight.scale[..., None, :]


def quantized_matmul(
    x: Float[Array, "*T K"],
    weight: Quantized,
    activations: Activations | None = None,
    inputs_over: tuple[str, ...] = (),
) -> Float[Array, "*T *N"]:
    """`x @ dequantize(weight)`, accumulated in float32; the scales are applied once, to the sums.

    Args:
      x: rounded before the product as `activations` says.
      weight: one matrix [K, *N], whose outputs may have several axes (heads): on a TPU that is faster than to divide
        them afterwards. Use `jax.vmap` for several. If a dimension is sharded, call this inside `jax.shard_map`.
      activations: see `round_tokens`. 8 bits are multiplied with 8 bits, and int8 is summed in int32.
      inputs_over: mesh axes that K is sharded over; float32 token scales and sums are reduced over them.

    Returns:
      The product in the dtype of `x`.

    Raises:
      ValueError: if the shapes do not match, or `activations` is unknown.
    """
    if weight.values.shape != (x.shape[-1], *weight.scale.shape):
        raise ValueError(f"x {x.shape} does not end in the inputs of one matrix: weight {weight.values.shape}")
    tokens, token_scales = round_tokens(x.reshape(-1, x.shape[-1]), weight.values.dtype, activations, inputs_over)
    values = weight.values.astype(tokens.dtype)
    if tokens.dtype == jnp.float8_e4m3fn and product_dtype(jnp.float32) == jnp.bfloat16:
        # bfloat16 holds e4m3 exactly, and a CPU that multiplies it would otherwise compute in float32.
        tokens, values = tokens.astype(jnp.bfloat16), values.astype(jnp.bfloat16)
    out = jax.lax.dot_general(
        tokens,
        values,
        (((1,), (0,)), ((), ())),
        # On H100 the default sums e4m3 products in fewer bits than float32 (openxla/xla pull request 6599).
        precision=jax.lax.Precision.HIGHEST,
        preferred_element_type=jnp.int32 if tokens.dtype == jnp.int8 else jnp.float32,
    ).astype(jnp.float32)
    out *= weight.scale
    for scale in token_scales:
        out *= scale.reshape(-1, *[1] * weight.scale.ndim)
    if inputs_over:
        out = jax.lax.psum(out, inputs_over)
    return out.astype(x.dtype).reshape(*x.shape[:-1], *weight.scale.shape)


def round_tokens(
    x: Float[Array, "T K"], dtype: DTypeLike, activations: Activations | None, inputs_over: tuple[str, ...] = ()
) -> tuple[Num[Array, "T K"], tuple[Float[Array, "T 1"], ...]]:
    """Rounds activations for a product with 8-bit weights of this dtype.

    Args:
      x: activations.
      dtype: of the weights.
      activations: `"per_token"` rounds each row of `x` as `quantize` rounds a channel, so that a row with NaN or
        infinity becomes NaN. `"per_tensor"` gives all rows on a device one scale, the largest: a row's values then
        depend on the other rows, and small rows lose bits. None rounds to bfloat16.
      inputs_over: see `quantized_matmul`.

    Returns:
      The rounded rows, and their scales: none for bfloat16.

    Raises:
      ValueError: if `activations` is unknown.
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
    return _round_values(x, scale, dtype), (scale,)


def to_8_bits(x: Float[Array, " *B"], dtype: DTypeLike, axis: int | tuple[int, ...]) -> tuple[Array, Array]:
    """Rounds to 8 bits, as `quantize` does.

    Args:
      x: any values.
      dtype: int8 or float8_e4m3fn.
      axis: or axes that share a scale.

    Returns:
      Values [*B] of `dtype`; and float32 scales, of length 1 along `axis`, to multiply them with.
    """
    scale = _scales(x, dtype, axis)
    return _round_values(x, scale, dtype), scale


def _scales(x: Float[Array, " *B"], dtype: DTypeLike, axis: int | tuple[int, ...]) -> Array:
    if jnp.dtype(dtype) not in LIMITS:
        raise ValueError(f"cannot quantize to {jnp.dtype(dtype)}, only to {' or '.join(map(str, LIMITS))}")
    # As integers, the bits of infinity and NaN are the largest: one pass finds them and the peak. (On CPU a maximum of
    # floats may miss a NaN.)
    bits = jax.lax.bitcast_convert_type(jnp.abs(x.astype(jnp.float32)), jnp.int32)
    peak = jax.lax.bitcast_convert_type(jnp.max(bits, axis, keepdims=True), jnp.float32)
    return jnp.where(jnp.isfinite(peak), jnp.maximum(peak, SMALLEST_PEAK) / LIMITS[jnp.dtype(dtype)], jnp.nan)


def _round_values(x: Float[Array, " *B"], scale: Array, dtype: DTypeLike) -> Array:
    values = x.astype(jnp.float32) / scale
    # Values that round to 0 become 0 and not -0. So does NaN, because its scale is NaN.
    values = jnp.where(jnp.abs(values) > ROUNDS_TO_0[jnp.dtype(dtype)], values, 0)
    return (jnp.round(values) if dtype == jnp.int8 else values).astype(dtype)
