"""Parameters as a plain nested dict of arrays: created, sharded, bound to a `Decoder`, saved and loaded."""

from __future__ import annotations

import functools
import warnings
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import Mesh
from orbax.checkpoint import v1 as ocp

from brewjax import distributed
from brewjax.model.config import ModelConfig
from brewjax.model.decoder import Decoder
from brewjax.model.weights import MATRIX_AXES, to_bits
from pallas_kernels.platform import product_dtype

Params = dict[str, Any]
MODEL, WEIGHTS = "model.yaml", "params"


@functools.lru_cache
def _abstract(config: ModelConfig) -> tuple[nnx.GraphDef, nnx.State]:
    return nnx.split(nnx.eval_shape(lambda: Decoder(config, nnx.Rngs(0))), nnx.Param)


def bind(config: ModelConfig, params: Params) -> Decoder:
    """A decoder that computes with these `params`, of the shapes that `config` says."""
    graph, abstract = _abstract(config)
    state = jax.tree.map(lambda leaf: leaf, abstract)
    nnx.replace_by_pure_dict(state, params)
    return nnx.merge(graph, state)


def abstract_decoder(config: ModelConfig) -> Decoder:
    """A decoder of shapes, without weights."""
    return nnx.merge(*_abstract(config))


def abstract_params(config: ModelConfig, mesh: Mesh) -> Params:
    """Makes the parameters' shapes, dtypes and shardings, without weights.

    Args:
      config: of the model.
      mesh: that the parameters are sharded over.

    Returns:
      A tree of `jax.ShapeDtypeStruct`.

    Raises:
      ValueError: an axis does not divide over the mesh.
    """
    decoder = abstract_decoder(config)

    def leaf(weight: Any) -> jax.ShapeDtypeStruct:
        shape = weight.shape
        axes = ("layers",) * (len(shape) - len(weight.axes)) + weight.axes
        return jax.ShapeDtypeStruct(shape, weight.dtype, sharding=decoder.sharding.named(mesh, shape, *axes))

    state = nnx.state(decoder, nnx.Param)
    return nnx.to_pure_dict(jax.tree.map(leaf, state, is_leaf=lambda x: isinstance(x, nnx.Param)))


def init_params(config: ModelConfig, mesh: Mesh, seed: int) -> Params:
    """Makes random parameters, on the devices that hold them.

    Args:
      config: of the model.
      mesh: that the parameters are sharded over.
      seed: of the random numbers.

    Returns:
      The parameters in `config.param_dtype`.
    """
    shardings = jax.tree.map(lambda leaf: leaf.sharding, abstract_params(config, mesh))

    def init() -> Params:
        return nnx.to_pure_dict(nnx.state(Decoder(config, nnx.Rngs(seed)), nnx.Param))

    return jax.jit(init, out_shardings=shardings)()


def prepare_for_inference(params: Params) -> Params:
    """Makes parameters ready for use without gradients.

    Matrices are rounded to the dtype that products use (see `product_dtype`). Products would round them anyway, to the
    same bits; a pass over few tokens would spend its time on that. On a CPU those of 8 and 16 bits become integers, see
    `to_bits`.

    Args:
      params: of a decoder.

    Returns:
      The parameters, to be bound to a decoder.
    """
    layers = {
        name: leaf.astype(product_dtype(leaf.dtype)) if name in MATRIX_AXES and isinstance(leaf, jax.Array) else leaf
        for name, leaf in params["layers"].items()
    }
    return params | {"layers": jax.tree.map(to_bits, layers)}


def num_parameters(params: Params) -> int:
    """Number of parameters in `params`: of arrays, or of abstract ones."""
    return sum(leaf.size for leaf in jax.tree.leaves(params))


class ModelSize(NamedTuple):
    """Sizes of a model.

    Attributes:
      parameters: all of them.
      active: those that one token's forward pass uses.
      weight_bytes: bytes of the weights at rest.
      cache_bytes: bytes of one token's keys and values.
    """

    parameters: int
    active: int
    weight_bytes: int
    cache_bytes: int


def model_size(config: ModelConfig) -> ModelSize:
    """Computes the sizes of a model, without creating it.

    Args:
      config: of the model.

    Returns:
      Numbers of parameters, and bytes.

    Raises:
      ConfigError: the config has no vocabulary size.
    """
    if not config.vocab_size:
        raise config.error("is left to a tokenizer; set it (on the command line: --set vocab_size=N)", "vocab_size")
    weights = jax.tree.leaves(_abstract(config)[1])
    state = nnx.to_pure_dict(_abstract(config.model_copy(update={"quantized": None}))[1])  # scales are no parameters
    parameters, unused = num_parameters(state), 0
    if config.experts:
        matrices = {name: leaf for name, leaf in state["layers"]["experts"].items() if name != "router"}
        unused = (
            num_parameters(matrices)
            // config.experts.num_experts
            * (config.experts.num_experts - config.experts.num_experts_per_tok)
        )
    if not config.tie_head:
        unused += state["embedding"].size  # looked up, not multiplied with
    cache = 2 * config.layers * config.kv_heads * config.head_dim * jnp.dtype(config.compute_dtype).itemsize
    weight_bytes = sum(leaf.size * leaf.dtype.itemsize for leaf in weights)
    return ModelSize(parameters, parameters - unused, weight_bytes, cache)


def save_model(folder: Path, config: ModelConfig, params: Params) -> None:
    """Writes model.yaml and the weights into a folder, each process its shards; returns when all are written.

    Args:
      folder: is made if it is not there.
      config: of the model.
      params: its parameters.
    """
    folder.mkdir(parents=True, exist_ok=True)
    ocp.save(folder.absolute() / WEIGHTS, params, overwrite=True)
    distributed.run_on_process_zero(lambda: config.save(folder / MODEL))


def load_model(folder: Path, mesh: Mesh) -> tuple[ModelConfig, Params]:
    """Reads what `save_model` wrote.

    Args:
      folder: of the model.
      mesh: that the weights are sharded over.

    Returns:
      The config and the weights.

    Raises:
      ConfigError: model.yaml is missing or wrong.
      ValueError: as `read_params`; or an axis does not divide over the mesh.
    """
    config = ModelConfig.load(folder / MODEL)
    return config, read_params(folder, abstract_params(config, mesh))


def read_params(folder: Path, abstract: Params) -> Params:
    """The weights that `save_model` wrote into a folder.

    Args:
      folder: of the model.
      abstract: shapes, dtypes and shardings; a leaf that is `...` is not read.

    Returns:
      The weights, as `abstract` says.

    Raises:
      ValueError: if the folder has no complete weights, or others than `abstract`: of another model.yaml.
    """
    if not ocp.is_orbax_checkpoint(folder.absolute() / WEIGHTS):
        raise ValueError(f"{folder / WEIGHTS}: no complete weights there")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        _check_stored(folder, abstract)
        return ocp.load(folder.absolute() / WEIGHTS, abstract)


def _check_stored(folder: Path, abstract: Params) -> None:
    """Refuses weights whose names and shapes are not those of the model, in one line that names the first of them."""
    metadata = ocp.metadata(folder.absolute() / WEIGHTS).metadata
    if metadata is None:  # files are missing: loading says which
        return
    stored, expected = (
        {
            jax.tree_util.keystr(path, simple=True, separator="."): None if leaf is ... else tuple(leaf.shape)
            for path, leaf in jax.tree.leaves_with_path(tree)
        }
        for tree in (metadata, abstract)
    )
    for name in expected | stored:
        shape, stored_shape = expected.get(name, "none"), stored.get(name, "none")
        if shape is not None and shape != stored_shape:
            raise ValueError(
                f"{folder / WEIGHTS}: {name} is {stored_shape}, and {folder / MODEL} makes it {shape}: these are the "
                "weights of another model, or of another version of brewjax; train or import it again"
            )
