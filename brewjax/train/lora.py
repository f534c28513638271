"""LoRA: training learns a low-rank update of each matrix; the base weights stay as they are.

In training inputs are multiplied with base and update separately, so that a step computes neither the sum of the two
matrices nor its gradient.
"""

from __future__ import annotations

import math
import string
from collections.abc import Callable
from typing import Any, Literal, get_args

import jax
import jax.numpy as jnp
import pydantic
from flax import nnx
from jax.sharding import NamedSharding

from brewjax.config import Config
from brewjax.model.config import ModelConfig
from brewjax.model.decoder import Decoder
from brewjax.model.params import Params, bind
from brewjax.model.weights import MATRIX_AXES, AdaptedWeight

Target = Literal["query", "key", "value", "output", "gate", "up", "down"]


class LoraConfig(Config):
    """Low-rank adaptation (Hu et al. 2021, arXiv 2106.09685): W + (alpha / rank) A B, with A and B float32."""

    rank: int = pydantic.Field(default=16, gt=0)
    """Rank of each update."""
    alpha: float = pydantic.Field(default=32.0, gt=0)
    """Scale of the updates: they are multiplied with alpha / rank."""
    targets: tuple[Target, ...] = pydantic.Field(default=get_args(Target), min_length=1)
    """Matrices of each layer, or of each of its experts, that get an update."""

    def abstract(self, params: Params) -> Params:
        """Shapes, dtypes and shardings of the adapters: {"a", "b"} at the path of each adapted abstract parameter."""

        def pair(name: str, weight: jax.ShapeDtypeStruct) -> Params:
            inputs, outputs = MATRIX_AXES[name]
            num_stacked, shape = weight.ndim - inputs - outputs, weight.shape
            spec = (*weight.sharding.spec, *[None] * (weight.ndim - len(weight.sharding.spec)))

            def matrix(axes: list[int | None]) -> jax.ShapeDtypeStruct:  # None: along the rank
                sizes = tuple(self.rank if axis is None else shape[axis] for axis in axes)
                matrix_spec = jax.P(*(None if axis is None else spec[axis] for axis in axes))
                return jax.ShapeDtypeStruct(
                    sizes, jnp.float32, sharding=NamedSharding(weight.sharding.mesh, matrix_spec)
                )

            stack = list(range(num_stacked))
            inputs_axes, outputs_axes = (
                range(num_stacked, num_stacked + inputs),
                range(num_stacked + inputs, weight.ndim),
            )
            return {"a": matrix([*stack, *inputs_axes, None]), "b": matrix([*stack, None, *outputs_axes])}

        return self._each(params, pair)

    def init(self, params: Params, seed: int) -> Params:
        """Initial adapters of abstract parameters: A is random of variance 1 / inputs, B zero: nothing changes yet."""
        leaves, tree = jax.tree_util.tree_flatten_with_path(self.abstract(params))

        def values() -> Params:
            made = []
            for key, (path, leaf) in zip(jax.random.split(jax.random.key(seed), len(leaves)), leaves, strict=True):
                name, which = path[-2].key, path[-1].key
                fan_in = math.prod(leaf.shape[-1 - MATRIX_AXES[name][0] : -1])
                random = jax.random.normal(key, leaf.shape, leaf.dtype) * fan_in**-0.5
                made.append(random if which == "a" else jnp.zeros(leaf.shape, leaf.dtype))
            return jax.tree.unflatten(tree, made)

        return jax.jit(values, out_shardings=jax.tree.unflatten(tree, [leaf.sharding for _, leaf in leaves]))()

    def bind(self, model: ModelConfig, params: Params, adapters: Params) -> Decoder:
        """A decoder that computes as if with `merge(params, adapters)`, without computing the merged weights."""
        decoder = bind(model, params)

        def adapt(module: nnx.Module, adapters: Params) -> None:
            for name, below in adapters.items():
                weight = getattr(module, name)
                if name in self.targets:
                    scaled = self.alpha / self.rank * below["a"]
                    setattr(module, name, AdaptedWeight(weight, scaled, below["b"], MATRIX_AXES[name][0]))
                else:
                    adapt(weight, below)

        adapt(decoder, adapters)
        return decoder

    def merge(self, params: Params, adapters: Params) -> Params:
        """Base weights plus updates: ordinary parameters, in the dtypes of `params`."""
        merged = {}
        for name, value in params.items():
            if name not in adapters:
                merged[name] = value
            elif name in self.targets:
                merged[name] = _sum(name, value, adapters[name], self.alpha / self.rank)
            else:
                merged[name] = self.merge(value, adapters[name])
        return merged

    def _each(self, params: Params, function: Callable[[str, Any], Params]) -> Params:
        """A tree with `function(name, weight)` at the path of each target, and nothing else."""
        adapters: Params = {}
        for name, value in params.items():
            if name in self.targets:
                adapters[name] = function(name, value)
            elif isinstance(value, dict) and (below := self._each(value, function)):
                adapters[name] = below
        return adapters


def _sum(name: str, weight: jax.Array, adapter: Params, scale: float) -> jax.Array:
    inputs, outputs = MATRIX_AXES[name]
    before = weight.ndim - inputs - outputs
    axes = string.ascii_lowercase[: weight.ndim]
    stack, into, out = axes[:before], axes[before : before + inputs], axes[before + inputs :]
    product = jnp.einsum(f"{stack}{into}z,{stack}z{out}->{axes}", adapter["a"], adapter["b"])
    return (weight.astype(jnp.float32) + scale * product).astype(weight.dtype)
