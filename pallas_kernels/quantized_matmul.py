"""Matrix products with weights in 8 bits: e4m3 or int8, one float32 scale per output channel.

`quantized_matmul` is what models call; `quantize` makes its weights. XLA does the product everywhere: it reads 8 bits
out of a stack of layers and makes no copy of them (docs/kernels.md says how a kernel of ours compared). Faster than
bfloat16 is e4m3 x e4m3 on TPU7x and H100, int8 x int8 on v5e, v5p, v6e and H100; elsewhere 8 bits save memory traffic
only. For serving: nothing here promises a gradient.
"""

from __future__ import annotations

from typing import Literal, NamedTuple, get_args

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Num

Activations = Literal["per_token", "per_tensor"]
LIMITS = {jnp.dtype(jnp.float8_e4m3fn): 448.0, jnp.dtype(jnp.int8): 127.0}  # the largest values used
ROUNDS_TO_0 = {jnp.dtype(jnp.float8_e4m3fn): 2**-10, jnp.dtype(jnp.int8): 0.5}  # the largest values that do
SMALLEST_PEAK = 1e-30  # keeps scales, and so quotients, away from zero and from subnormal numbers


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
    out = jax.lax.dot(
        tokens,
        weight.values.astype(tokens.dtype),
        # On H100 the default sums e4m3 products in fewer bits than float32 (openxla/xla pull request 6599).
        precision=jax.lax.Precision.HIGHEST,
        preferred_element_type=jnp.int32 if tokens.dtype == jnp.int8 else jnp.float32,
    ).astype(jnp.float32)
    for scale in (weight.scale[None, :], *token_scales):
        out *= scale
    if inputs_over:
        out = jax.lax.psum(out, inputs_over)
    return out.astype(x.dtype).reshape(*x.shape[:-1], out.shape[-1])


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
    return _round_values(x, scale, dtype), (scale,)


def to_8_bits(x: Float[Array, " *B"], dtype: DTypeLike, axis: int | tuple[int, ...]) -> tuple[Array, Array]:
    """8-bit values, and scales of length 1 along `axis`; see `quantize`."""
    scale = _scales(x, dtype, axis)
    return _round_values(x, scale, dtype), scale


def _scales(x: Float[Array, " *B"], dtype: DTypeLike, axis: int | tuple[int, ...]) -> Array:
    if jnp.dtype(dtype) not in LIMITS:
        raise ValueError(f"cannot quantize to {jnp.dtype(dtype)}, only to {' or '.join(map(str, LIMITS))}")
    # Of their bits, infinity and NaN are the largest: one pass finds them and the peak. (On CPU a maximum of floats may
    # overlook a NaN.)
    bits = jax.lax.bitcast_convert_type(jnp.abs(x.astype(jnp.float32)), jnp.int32)
    peak = jax.lax.bitcast_convert_type(jnp.max(bits, axis, keepdims=True), jnp.float32)
    return jnp.where(jnp.isfinite(peak), jnp.maximum(peak, SMALLEST_PEAK) / LIMITS[jnp.dtype(dtype)], jnp.nan)


def _round_values(x: Float[Array, " *B"], scale: Array, dtype: DTypeLike) -> Array:
    values = x.astype(jnp.float32) / scale
    # What rounds to 0 becomes 0 and not -0; so does NaN, for then the scale is NaN.
    values = jnp.where(jnp.abs(values) > ROUNDS_TO_0[jnp.dtype(dtype)], values, 0)
    return (jnp.round(values) if dtype == jnp.int8 else values).astype(dtype)
