"""Quantisation of a bundle's matrices to 8 bits for serving, one matrix in memory at a time."""

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
    """How a model is quantised for serving. Embedding, head, norms, biases and router stay as they are."""

    dtype: Literal["e4m3", "int8"] = "e4m3"
    """8-bit format of the matrices of attention and MLP: float8 e4m3, or int8."""
    scales: Literal["per_channel", "per_tensor"] = "per_channel"
    """Scales of a matrix: one for each output channel, or the largest of these for all channels."""
    activations: Literal["per_token", "per_tensor"] | None = "per_token"
    """Rounds activations to 8 bits too, with a scale for each token or one for all tokens; null rounds them to
    bfloat16."""
    mesh: MeshConfig = MeshConfig()
    """The devices that share the work; the bundle can be loaded on any others."""

    def target(self, model: ModelConfig) -> ModelConfig:
        """Computes the quantised shape.

        Args:
          model: to quantise.

        Returns:
          The quantised model.

        Raises:
          ConfigError: `model` is quantised already.
        """
        if model.quantized:
            raise model.error("is quantised already; start from the model that it was made from", "quantized")
        return model.model_copy(update={"quantized": Quantization(dtype=self.dtype, activations=self.activations)})


def quantize(source: Path, config: QuantizeConfig) -> Bundle:
    """Quantises a bundle; of the original weights, one stacked parameter is in memory at a time.

    Args:
      source: folder of the bundle.
      config: the dtype, what is quantised, and the devices.

    Returns:
      The quantised bundle, in memory; its tokenizer and surfaces are those of `source`.

    Raises:
      ConfigError: if the bundle is quantised already.
      ValueError: if it has no weights.
    """
    model = ModelConfig.load(source / MODEL)
    smaller = config.target(model)
    return Bundle.from_params(smaller, _quantize_params(source, model, smaller, config), source, config.mesh)


def with_head(bundle: Bundle, head: HeadPrecision) -> Bundle:
    """The bundle with another precision of its output head, to measure what less than float32 costs."""
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
