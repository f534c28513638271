"""Weights: initial values, axis names and layout, and products with them; plain, 8-bit and with LoRA updates.

Axis letters: B rows (or leading axes), T tokens, K axes that are summed over, N output axes, R rank of an update
(docs/glossary.md, "Axis letters").
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Num

from brewjax.model.config import ModelConfig, Quantization
from brewjax.model.sharding import Sharding
from pallas_kernels.platform import platform, product_dtype
from pallas_kernels.quantized_matmul import Quantized, quantized_matmul, to_8_bits

Specs = tuple[jax.P | None, jax.P | None, jax.P | None]  # of `x`, of the matrix, and of their product
# How many axes of each matrix of a layer are summed over, and are output axes; axes of layers and experts precede them.
MATRIX_AXES: dict[str, tuple[int, int]] = dict.fromkeys(("query", "key", "value"), (1, 2)) | {"output": (2, 1)}
MATRIX_AXES |= dict.fromkeys(("gate", "up", "down"), (1, 1))
OF_BITS = {1: jnp.dtype(jnp.float8_e4m3fn), 2: jnp.dtype(jnp.bfloat16)}  # by size in bytes, the floats of `to_bits`
DTYPES = {"e4m3": jnp.dtype(jnp.float8_e4m3fn), "int8": jnp.dtype(jnp.int8)}


class Weight(nnx.Param):
    """A parameter with names of its axes, for sharding; stacked layers have one more axis in front."""


def random_weight(
    rngs: nnx.Rngs, config: ModelConfig, shape: tuple[int, ...], axes: tuple, fan_in: int, scale: float = 1.0
) -> Weight:
    """Normal values, truncated at three standard deviations; products with inputs of variance 1 have size `scale`."""
    values = jax.random.truncated_normal(rngs.params(), -3, 3, shape, config.param_dtype) * (scale * fan_in**-0.5)
    return Weight(values, axes=axes)


def to_bits(stack: Array) -> Array:
    """The bits of a stack of 8- or 16-bit floats as unsigned integers, on a CPU; other stacks as they are.

    XLA for CPUs cuts a layer out of such floats by way of a copy of the whole stack in wider ones, in every pass.
    Integers it cuts in place. They have no gradient: this is for weights that are not trained.
    """
    if platform() != "cpu" or stack.dtype not in OF_BITS.values():
        return stack
    return jax.lax.bitcast_convert_type(stack, jnp.dtype(f"uint{8 * stack.dtype.itemsize}"))


def from_bits(matrix: Array) -> Array:
    """What `to_bits` made integers of, in floats again."""
    if not jnp.issubdtype(matrix.dtype, jnp.unsignedinteger):
        return matrix
    return jax.lax.bitcast_convert_type(matrix, OF_BITS[matrix.dtype.itemsize])


class QuantizedWeight(nnx.Module):
    """A matrix in 8 bits, for serving.

    Attributes:
      values: 8-bit values, in the shape of the matrix: experts if there are any, `inputs` axes that are summed over,
        output axes.
      scale: float32, without the axes that are summed over.
    """

    def __init__(self, weight: Weight, inputs: int, config: Quantization):
        self.inputs, self.config = inputs, config
        batch = 1 if weight.axes[0] == "experts" else 0
        self.summed = tuple(range(batch, batch + inputs))
        values, scale = self.quantize(weight[...])
        self.values = Weight(values, axes=weight.axes)
        self.scale = Weight(
            scale, axes=tuple(axis for index, axis in enumerate(weight.axes) if index not in self.summed)
        )

    def quantize(
        self, weight: Float[Array, " *B"], per_tensor: bool = False
    ) -> tuple[Num[Array, " *B"], Float[Array, " *N"]]:
        """Rounds a float matrix of this shape to 8 bits.

        Args:
          weight: to round.
          per_tensor: give all output channels of a matrix the largest scale, instead of each its own.

        Returns:
          8-bit values, and the float32 scale that they are multiplied with, without the axes that are summed over.
        """
        values, scale = to_8_bits(weight, DTYPES[self.config.dtype], self.summed)
        if per_tensor:
            all_axes = tuple(range(self.summed[0], weight.ndim))
            values, largest_scale = to_8_bits(weight, DTYPES[self.config.dtype], all_axes)
            scale = largest_scale + jnp.zeros_like(scale)
        return values, jnp.squeeze(scale, self.summed)

    def __call__(self, sharding: Sharding, x: Float[Array, "B T *K"]) -> Float[Array, "B T *N"]:
        """`x` times the matrix, in the dtype of `x`."""
        values, scale = gather_weight(sharding, self, x.dtype)
        axes = used_axes(self.values)
        sum_axes: tuple[str, ...] = ()

        def multiply(x: Array, values: Array, scale: Array) -> Array:
            matrix = Quantized(values.reshape(-1, *scale.shape), scale)
            return quantized_matmul(x.reshape(*x.shape[:2], -1), matrix, self.config.activations, sum_axes)

        if jax.sharding.get_abstract_mesh().empty:
            return multiply(x, values, scale)
        input_axes, output_axes = axes[: self.inputs], axes[self.inputs :]
        sum_axes = tuple(mesh_axis for axis in input_axes if axis for mesh_axis in sharding.rules[axis])
        specs = (sharding.spec("batch", "length", *input_axes), sharding.spec(*axes), sharding.spec(*output_axes))
        out_spec = sharding.spec("batch", "length", *output_axes)
        return jax.shard_map(multiply, in_specs=specs, out_specs=out_spec)(x, values, scale)


class Adapted(NamedTuple):
    """The matrix `base + a b`, which is never computed: `x` is multiplied with each."""

    base: Array | Quantized
    a: Float[Array, "*B *K R"]
    b: Float[Array, "*B R *N"]


class AdaptedWeight(nnx.Module):
    """A matrix W with a low-rank update A B (see `brewjax.train.lora`): `x W + (x A) B` instead of `x (W + A B)`.

    Args:
      base: W.
      a: A.
      b: B.
      inputs: how many axes of W are summed over; they follow the experts' axis, if there is one.

    Attributes:
      base: W.
      a: A, with the axes of W that are summed over, then the rank.
      b: B, with the rank, then the output axes of W.
    """

    def __init__(self, base: Weight, a: Float[Array, " *A"], b: Float[Array, " *B"], inputs: int):
        batch = 1 if base.axes[0] == "experts" else 0
        stack, into, out = base.axes[:batch], base.axes[batch : batch + inputs], base.axes[batch + inputs :]
        self.base, self.a, self.b = base, Weight(a, axes=(*stack, *into, None)), Weight(b, axes=(*stack, None, *out))


Matrix = Weight | QuantizedWeight | AdaptedWeight


def matrix(
    rngs: nnx.Rngs, config: ModelConfig, shape: tuple[int, ...], axes: tuple, inputs: int = 1, scale: float = 1.0
) -> Weight | QuantizedWeight:
    """A random matrix: axes of experts if there are any, `inputs` axes that are summed over, output axes."""
    batch = 1 if axes[0] == "experts" else 0
    weight = random_weight(rngs, config, shape, axes, math.prod(shape[batch : batch + inputs]), scale)
    return QuantizedWeight(weight, inputs, config.quantized) if config.quantized else weight


def gather_weight(sharding: Sharding, weight: Matrix, dtype: jnp.dtype) -> Any:
    """A weight as it is computed with: in the compute dtype (or `Quantized`, or `Adapted`), gathered over `fsdp`."""
    if isinstance(weight, AdaptedWeight):
        return Adapted(*(gather_weight(sharding, part, dtype) for part in (weight.base, weight.a, weight.b)))
    if isinstance(weight, QuantizedWeight):
        parts = (weight.values, weight.scale)
        return Quantized(*(sharding.reshard(part[...], *used_axes(part)) for part in parts))
    return sharding.reshard(weight[...].astype(dtype), *used_axes(weight))


def product(sharding: Sharding, x: Float[Array, "B T *K"], weight: Matrix, inputs: int = 1) -> Float[Array, "B T *N"]:
    """`x` times a matrix whose first `inputs` axes are summed over, in the dtype of `x`."""
    if isinstance(weight, AdaptedWeight):
        low_rank = product(sharding, product(sharding, x, weight.a, inputs), weight.b)
        return product(sharding, x, weight.base, inputs) + low_rank
    if isinstance(weight, QuantizedWeight):
        return weight(sharding, x)
    axes = used_axes(weight)
    x_spec, out_spec = (
        sharding.spec_or_none("batch", "length", *part_axes) for part_axes in (axes[:inputs], axes[inputs:])
    )
    specs = (x_spec, sharding.spec_or_none(*axes), out_spec)

    @functools.partial(jax.checkpoint, prevent_cse=False)  # or the gathered matrices of all layers would be kept
    def multiply_gathered(x: Array, matrix: Array) -> Array:
        if matrix.dtype != product_dtype(x.dtype):  # it is after `brewjax.model.params.prepare_for_inference`
            matrix = matrix.astype(x.dtype)
        return _product(inputs, specs, x, sharding.reshard(matrix, *axes))

    return multiply_gathered(x, weight[...])


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _product(inputs: int, specs: Specs, x: Float[Array, "B T *K"], matrix: Float[Array, "*K *N"]) -> Array:
    """The product, with a hand-written gradient.

    JAX's own rule would transpose the largest array, the cotangent, to have its tokens last, which on a CPU takes as
    long as the product. Here `x` is transposed instead.
    """
    return _dot(x, matrix, range(2, 2 + inputs), range(inputs), specs[2])


def _dot(a: Array, b: Array, a_axes: Sequence[int], b_axes: Sequence[int], out: jax.P | None) -> Array:
    """The product in the dtype of `a`; on some CPUs the inputs are rounded (see `product_dtype`)."""
    contract = ((tuple(a_axes), tuple(b_axes)), ((), ()))
    a_rounded, b_rounded = (x.astype(product_dtype(x.dtype)) for x in (a, b))
    # On a CPU a product that gives bfloat16 is computed in float32. Elsewhere float32 would be summed over devices.
    sums = jnp.float32 if platform() == "cpu" else None
    product = jax.lax.dot_general(a_rounded, b_rounded, contract, preferred_element_type=sums, out_sharding=out)
    return product.astype(a.dtype)


def _product_forward(inputs: int, specs: Specs, x: Array, matrix: Array) -> tuple[Array, tuple[Array, Array]]:
    return _product(inputs, specs, x, matrix), (x, matrix)


def _product_backward(inputs: int, specs: Specs, saved: tuple[Array, Array], d_out: Array) -> tuple[Array, Array]:
    x, matrix = saved
    d_x = _dot(d_out, matrix, range(2, d_out.ndim), range(inputs, matrix.ndim), specs[0])
    return d_x, _dot(x, d_out, (0, 1), (0, 1), specs[1]).astype(matrix.dtype)


_product.defvjp(_product_forward, _product_backward)


def used_axes(weight: Weight) -> tuple[str | None, ...]:
    """The axis names of a weight while it is computed with: the axis that is split at rest is gathered."""
    return tuple(None if axis == "weight" else axis for axis in weight.axes)
