"""Statistics of the inputs of a model's matrices on calibration prompts: one pass, a layer at a time.

Axis letters: B rows, T tokens, D model dimension, H query heads, E size of a head, F neurons, N experts
(docs/glossary.md, "Axis letters").
"""

from __future__ import annotations

import functools
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding
from jaxtyping import Array, Bool, Float, Int

from brewjax.data.text.encode import EncodedPrompt
from brewjax.model.config import ModelConfig
from brewjax.model.decoder import Layer
from brewjax.model.experts import route
from brewjax.model.params import Params, bind
from brewjax.model.rope import rotary
from brewjax.model.sharding import BATCH_AXES, Sharding, data_parallel_size
from brewjax.scoring.buckets import STEP, plan_passes
from brewjax.scoring.passes import Bucket, build_inputs
from pallas_kernels.token_labels import PADDING, TokenLabels

ROW_TOKENS = 1024  # of a row, at least; a row must hold the longest prompt
BATCH_TOKENS = 8192  # of a batch on each device


class Statistics(NamedTuple):
    """Sums over the tokens of all prompts for one layer; computed in float32, and kept on the host.

    Attributes:
      heads: X^T X of the inputs of the attention's output projection.
      neurons: X^T X of the inputs of the down projection, for each expert (one if there is no mixture); a token's
        inputs are multiplied with its weight for the expert.
      load: sum of the tokens' weights for each expert.
      cosine: cosine of the residual stream before and after the layer.
      tokens: number of tokens.
    """

    heads: Float[np.ndarray, "H*E H*E"]
    neurons: Float[np.ndarray, "N F F"]
    load: Float[np.ndarray, " N"]
    cosine: Float[np.ndarray, ""]
    tokens: Float[np.ndarray, ""]


def calibrate(model: ModelConfig, params: Params, prompts: Sequence[EncodedPrompt], mesh: Mesh) -> Iterator[Statistics]:
    """Yields the statistics of each layer in order.

    Besides a layer's sums only its input is in memory, for all tokens, spread over the devices.
    """
    longest = max(ROW_TOKENS, *(len(prompt) for prompt in prompts))
    bucket = Bucket(-(-longest // STEP) * STEP)
    passes = plan_passes(prompts, [bucket])
    num_rows = data_parallel_size(mesh) * min(
        max(BATCH_TOKENS // bucket.tokens, 1), -(-len(passes) // data_parallel_size(mesh))
    )
    groups = [passes[start : start + num_rows] for start in range(0, len(passes), num_rows)]
    laid_out = [build_inputs(group, num_rows) for group in groups]
    row_sharding = NamedSharding(mesh, jax.P(BATCH_AXES, None))
    batches = [jax.device_put((rows.positions, rows.token_labels), row_sharding) for rows in laid_out]
    with jax.set_mesh(mesh):
        streams = [_embed(model, params, jax.device_put(rows.tokens, row_sharding)) for rows in laid_out]
    for layer_index in range(model.layers):
        total: tuple[Array, ...] | None = None
        with jax.set_mesh(mesh):
            for index, batch in enumerate(batches):
                streams[index], sums = _run_layer(model, params, layer_index, streams[index], *batch)
                jax.block_until_ready(sums)  # two programs that run at once on a CPU's devices may deadlock
                total = sums if total is None else jax.tree.map(jnp.add, total, sums)
        assert total is not None
        yield Statistics(*(np.asarray(sums, np.float64) for sums in total))


@functools.partial(jax.jit, static_argnums=0)
def _embed(model: ModelConfig, params: Params, tokens: Int[Array, "B T"]) -> Float[Array, "B T D"]:
    return bind(model, params).embed(tokens)


@functools.partial(jax.jit, static_argnums=0, donate_argnums=3)
def _run_layer(
    model: ModelConfig,
    params: Params,
    layer_index: Int[Array, ""],
    x: Float[Array, "B T D"],
    positions: Int[Array, "B T"],
    token_labels: TokenLabels,
) -> tuple[Float[Array, "B T D"], tuple[Array, ...]]:
    """Runs a layer: the residual stream after it, and the sums of `Statistics`."""
    decoder = bind(model, params)
    sharding, layer = decoder.sharding, decoder.layer(layer_index)
    positions = sharding.reshard(positions, "batch", "length")
    token_labels = TokenLabels(*(sharding.reshard(jnp.asarray(part), "batch", None) for part in token_labels))
    real = sharding.reshard(token_labels.example_id != PADDING, "batch", "length")
    rotation = rotary(positions, model)
    attended, _ = layer.attend(x, rotation, token_labels, None)
    between = layer.add_attention(x, attended)
    after, _ = layer.add_mlp(between, token_labels)
    h = layer.mlp_norm(between)
    if model.experts:
        neurons, load = _expert_statistics(sharding, layer, h, real)
    else:
        neurons, load = _gram(sharding, layer.neurons(h), real)[None], jnp.ones(1)
    return after, (
        _gram(sharding, attended, real),
        neurons,
        load,
        jnp.sum(_cosine(x, after) * real),
        jnp.sum(real, dtype=jnp.float32),
    )


def _gram(sharding: Sharding, x: Float[Array, "B T *K"], weights: Array) -> Float[Array, "K K"]:
    """X^T X over all tokens, each multiplied with its entry of `weights` [B, T]."""
    x = sharding.reshard(x.astype(jnp.float32), "batch", "length", *[None] * (x.ndim - 2))
    x = x.reshape(*x.shape[:2], -1) * weights[..., None]
    spec = sharding.spec_or_none(None, None)
    return jnp.einsum("btk,btl->kl", x, x, precision=jax.lax.Precision.HIGHEST, out_sharding=spec)


def _expert_statistics(
    sharding: Sharding, layer: Layer, h: Float[Array, "B T D"], real: Bool[Array, "B T"]
) -> tuple[Float[Array, "N F F"], Float[Array, " N"]]:
    """`Statistics.neurons` and `load`. Every token goes through every expert: a weight of zero adds nothing."""
    experts = layer.experts
    weights, chosen, _ = route(experts.config, h, experts.router[...].astype(jnp.float32))
    weights_BTN = (
        jnp.einsum("btk,btkn->btn", weights, jax.nn.one_hot(chosen, experts.config.num_experts)) * real[..., None]
    )

    def expert_gram(matrices: tuple[Array, Array, Array]) -> Array:
        gate, up, weights = matrices
        neurons = jax.nn.silu(h @ gate) * (h @ up)
        return _gram(sharding, neurons, weights)

    matrices: list[Any] = [experts.gate, experts.up]
    gate, up = (sharding.reshard(w[...].astype(h.dtype), None, None, "neurons") for w in matrices)
    grams = jax.lax.map(expert_gram, (gate, up, jnp.moveaxis(weights_BTN, -1, 0)))
    return grams, jnp.sum(weights_BTN, (0, 1))


def _cosine(a: Float[Array, "B T D"], b: Float[Array, "B T D"]) -> Float[Array, "B T"]:
    a, b = a.astype(jnp.float32), b.astype(jnp.float32)
    squares = jnp.sum(a**2, -1) * jnp.sum(b**2, -1)
    return jnp.sum(a * b, -1) * jax.lax.rsqrt(jnp.maximum(squares, 1e-30))
