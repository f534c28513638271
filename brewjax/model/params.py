"""Parameters as a plain nested dict of arrays: made, sharded, bound to a `Decoder`, saved and loaded."""

from __future__ import annotations

import functools
import warnings
from pathlib import Path
from typing import Any

import jax
from flax import nnx
from jax.sharding import Mesh
from orbax.checkpoint import v1 as ocp

from brewjax.model.decoder import Decoder, ModelConfig

Params = dict[str, Any]
MODEL, WEIGHTS = "model.yaml", "params"


@functools.lru_cache
def _abstract(config: ModelConfig) -> tuple[nnx.GraphDef, nnx.State]:
    return nnx.split(nnx.eval_shape(lambda: Decoder(config, nnx.Rngs(0))), nnx.Param)


def bind(config: ModelConfig, params: Params) -> Decoder:
    """A decoder that computes with these parameters."""
    graph, abstract = _abstract(config)
    state = jax.tree.map(lambda leaf: leaf, abstract)
    nnx.replace_by_pure_dict(state, params)
    return nnx.merge(graph, state)


def abstract_params(config: ModelConfig, mesh: Mesh) -> Params:
    """Shapes, dtypes and shardings of the parameters; ValueError names the axis that the mesh does not divide."""
    decoder = nnx.merge(*_abstract(config))

    def leaf(weight: Any) -> jax.ShapeDtypeStruct:
        shape = weight.shape
        axes = ("layers",) * (len(shape) - len(weight.axes)) + weight.axes
        return jax.ShapeDtypeStruct(shape, weight.dtype, sharding=decoder.sharding.named(mesh, shape, *axes))

    state = nnx.state(decoder, nnx.Param)
    return nnx.to_pure_dict(jax.tree.map(leaf, state, is_leaf=lambda x: isinstance(x, nnx.Param)))


def init_params(config: ModelConfig, mesh: Mesh, seed: int) -> Params:
    """Random parameters, created where they belong."""
    shardings = jax.tree.map(lambda leaf: leaf.sharding, abstract_params(config, mesh))

    def init() -> Params:
        return nnx.to_pure_dict(nnx.state(Decoder(config, nnx.Rngs(seed)), nnx.Param))

    return jax.jit(init, out_shardings=shardings)()


def count(params: Params) -> int:
    """Number of parameters; abstract ones count too."""
    return sum(leaf.size for leaf in jax.tree.leaves(params))


def save_model(folder: Path, config: ModelConfig, params: Params) -> None:
    """Writes model.yaml and the weights into a folder."""
    folder.mkdir(parents=True, exist_ok=True)
    ocp.save(folder.absolute() / WEIGHTS, params, overwrite=True)
    config.save(folder / MODEL)


def load_model(folder: Path, mesh: Mesh) -> tuple[ModelConfig, Params]:
    """Reads what `save_model` wrote, sharded over `mesh`."""
    config = ModelConfig.load(folder / MODEL)
    if not ocp.is_orbax_checkpoint(folder.absolute() / WEIGHTS):
        raise ValueError(f"{folder / WEIGHTS}: no complete weights there")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return config, ocp.load(folder.absolute() / WEIGHTS, abstract_params(config, mesh))
