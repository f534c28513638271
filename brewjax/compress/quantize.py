"""A bundle's matrices in 8 bits, for serving: read, rounded and dropped one after the other."""

from __future__ import annotations

import dataclasses
import functools
from pathlib import Path
from typing import Any, Literal

import jax

from brewjax.bundle.bundle import Bundle
from brewjax.config import Config
from brewjax.model.config import HeadPrecision, ModelConfig, Quantization
from brewjax.model.params import MODEL, Params, abstract_decoder, abstract_params, read_params
from brewjax.model.sharding import MeshConfig
from brewjax.model.weights import QuantizedWeight


class QuantizeConfig(Config):
    """How a model is rounded for serving. Embedding, head, norms, biases and router stay as they are."""

    dtype: Literal["e4m3", "int8"] = "e4m3"
    """Of the matrices of attention and MLP."""
    scales: Literal["per_channel", "per_tensor"] = "per_channel"
    """Of a matrix, one for each output channel, or the largest of them for all."""
    activations: Literal["per_token", "per_tensor"] | None = "per_token"
    """See `Quantization`."""
    mesh: MeshConfig = MeshConfig()
    """The devices that share the work; a bundle is loaded onto any."""

    def target(self, model: ModelConfig) -> ModelConfig:
        """The model in 8 bits; ConfigError where it is already."""
        if model.quantized:
            raise model.error("is quantised already; start from the model that it was made from", "quantized")
        return model.model_copy(update={"quantized": Quantization(dtype=self.dtype, activations=self.activations)})


def quantize(source: Path, config: QuantizeConfig) -> Bundle:
    """The bundle at `source` in 8 bits; of the weights as they were, one stacked parameter is in memory at a time.

    Raises ConfigError where the source is quantised already, ValueError where it has no weights.
    """
    model = ModelConfig.load(source / MODEL)
    smaller = config.target(model)
    return Bundle.from_params(smaller, _quantize_params(source, model, smaller, config), source, config.mesh)


def with_head(bundle: Bundle, head: HeadPrecision) -> Bundle:
    """The bundle with another precision of its head, to measure what less than float32 costs."""
    return dataclasses.replace(bundle, model=bundle.model.model_copy(update={"head": head}))


def _quantize_params(source: Path, model: ModelConfig, smaller: ModelConfig, config: QuantizeConfig) -> Params:
    mesh = config.mesh.build()
    leaves, tree = jax.tree_util.tree_flatten_with_path(abstract_params(model, mesh))
    abstract, decoder = abstract_params(smaller, mesh), abstract_decoder(smaller)
    quantized = []
    for index, (path, leaf) in enumerate(leaves):
        selected = jax.tree.unflatten(tree, [leaf if position == index else ... for position in range(len(leaves))])
        keys = [key.key for key in path]
        array = functools.reduce(dict.__getitem__, keys, read_params(source, selected))
        weight = functools.reduce(getattr, keys, decoder)
        if isinstance(weight, QuantizedWeight):
            placed = jax.tree.map(lambda part: part.sharding, functools.reduce(dict.__getitem__, keys, abstract))
            array = _quantize_stack(weight, config.scales == "per_tensor", placed, array)
        quantized.append(jax.block_until_ready(array))
    return jax.tree.unflatten(tree, quantized)


def _quantize_stack(
    weight: QuantizedWeight, per_tensor: bool, shardings: dict[str, Any], stack: jax.Array
) -> dict[str, jax.Array]:
    """Layer by layer, so that no float32 copy of the stack is made."""

    def quantize_layers(stack: jax.Array) -> dict[str, jax.Array]:
        values, scale = jax.lax.map(functools.partial(weight.quantize, per_tensor=per_tensor), stack)
        return {"values": values, "scale": scale}

    return jax.jit(quantize_layers, out_shardings=shardings)(stack)
