"""Upcycling (Komatsuzaki et al. 2022): a dense model becomes a mixture of experts with the same outputs at first."""

from __future__ import annotations

import functools

import jax
from jax.sharding import Mesh

from brewjax.model.config import ExpertsConfig, ModelConfig
from brewjax.model.params import Params, abstract_params

COPIED = ("gate", "up", "down")


def upcycle(
    config: ModelConfig, params: Params, experts: ExpertsConfig, mesh: Mesh, seed: int = 0, noise: float = 0.02
) -> tuple[ModelConfig, Params]:
    """The model with each MLP copied into every expert; other weights are unchanged.

    Args:
      config: the shape of a dense model.
      params: its parameters.
      experts: of the new model.
      mesh: its devices.
      seed: of the router's weights.
      noise: standard deviation of the router's weights, which makes experts diverge in training.

    Returns:
      Config and parameters of the mixture.

    Raises:
      ConfigError: if the model has experts or is quantised.
      ValueError: if the experts' weights would not sum to one.
    """
    if config.experts:
        raise config.error("it has experts already; only a dense model is upcycled", "experts")
    if config.quantized:
        raise config.error("a quantised model is for serving; upcycle the one that it was made from", "quantized")
    if not experts.norm_topk_prob:
        raise ValueError("experts.norm_topk_prob: must be true, or the copies of an MLP would not sum to its output")
    new = config.model_copy(update={"experts": experts})
    expected = abstract_params(new, mesh)
    layers = dict(params["layers"])
    mlp = {name: layers.pop(name) for name in COPIED}
    shapes = expected["layers"]["experts"]
    copies = {
        name: _copy_to_experts(matrix, experts.num_experts, shapes[name].sharding) for name, matrix in mlp.items()
    }
    router = shapes["router"]
    copies["router"] = jax.jit(
        lambda key: noise * jax.random.normal(key, router.shape, router.dtype), out_shardings=router.sharding
    )(jax.random.key(seed))
    return new, params | {"layers": layers | {"experts": copies}}


@functools.partial(jax.jit, static_argnums=(1, 2))
def _copy_to_experts(matrix: jax.Array, count: int, sharding: jax.sharding.NamedSharding) -> jax.Array:
    """[layers, ..] as [layers, experts, ..]."""
    return jax.lax.broadcast_in_dim(
        matrix, (len(matrix), count, *matrix.shape[1:]), (0, *range(2, matrix.ndim + 1)), out_sharding=sharding
    )
