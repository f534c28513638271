"""One weight: how it starts, how its axes are called, and how it is laid out to be computed with."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array

from brewjax.model.config import ModelConfig
from brewjax.model.sharding import Sharding


class Weight(nnx.Param):
    """A parameter with the names of its axes, for sharding; stacked layers have one more in front."""


def random_weight(
    rngs: nnx.Rngs, config: ModelConfig, shape: tuple[int, ...], axes: tuple, fan_in: int, scale: float = 1.0
) -> Weight:
    """Normal values, cut at three standard deviations, for products with unit inputs to be of size `scale`."""
    values = jax.random.truncated_normal(rngs.params(), -3, 3, shape, config.param_dtype) * (scale * fan_in**-0.5)
    return Weight(values, axes=axes)


def gathered(sharding: Sharding, weight: Weight, dtype: jnp.dtype) -> Array:
    """A weight in the compute dtype, whole along the axis that is only split at rest."""
    return sharding.reshard(weight[...].astype(dtype), *used_axes(weight))


def used_axes(weight: Weight) -> tuple[str | None, ...]:
    """The axes of a weight while it is computed with."""
    return tuple(None if axis == "weight" else axis for axis in weight.axes)
