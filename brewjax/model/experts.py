"""A mixture of experts (Shazeer et al. 2017; Mixtral, Jiang et al. 2024): many SwiGLU MLPs, a few of them per token."""

from __future__ import annotations

import functools
from collections.abc import Mapping

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Bool, Float

from brewjax.model.config import ExpertsConfig, ModelConfig
from brewjax.model.sharding import Sharding
from brewjax.model.weights import gathered, random_weight, used_axes
from pallas_kernels.grouped_matmul import grouped_matmul


class Experts(nnx.Module):
    """In place of a layer's MLP. No token is dropped, so what one token gets does not depend on its neighbours."""

    def __init__(self, config: ModelConfig, sharding: Sharding, rngs: nnx.Rngs):
        assert config.experts is not None
        self.config, self.sharding = config.experts, sharding
        N, D, F = config.experts.count, config.d_model, config.d_ff
        self.router = random_weight(rngs, config, (D, N), ("model", None), fan_in=D)
        self.gate = random_weight(rngs, config, (N, D, F), ("experts", "weight", "neurons"), fan_in=D)
        self.up = random_weight(rngs, config, (N, D, F), ("experts", "weight", "neurons"), fan_in=D)
        self.down = random_weight(
            rngs, config, (N, F, D), ("experts", "neurons", "weight"), fan_in=F, scale=(2 * config.layers) ** -0.5
        )

    def __call__(
        self, x: Float[Array, "B T D"], real: Bool[Array, "B T"]
    ) -> tuple[Float[Array, "B T D"], Float[Array, ""]]:
        """What the experts add to the residual stream, and the load-balancing loss over the `real` tokens.

        The loss (Fedus et al. 2021, eq. 4, for more than one expert as in Mixtral) is N * sum over experts of (share
        of tokens that chose it) * (mean probability of it): `per_token` when all are chosen alike, and more else.
        """
        matrices = [self.gate, self.up, self.down]
        weights = [self.router[...].astype(jnp.float32), *(gathered(self.sharding, w, x.dtype) for w in matrices)]
        if jax.sharding.get_abstract_mesh().empty:
            return _mix(self.config, {"batch": (), "length": (), "neurons": (), "experts": ()}, x, real, *weights)
        tokens, labels = self.sharding.spec("batch", "length", "model"), self.sharding.spec("batch", "length")
        specs = [self.sharding.spec(*used_axes(w)) for w in (self.router, *matrices)]
        return jax.shard_map(
            functools.partial(_mix, self.config, self.sharding.rules),
            in_specs=(tokens, labels, *specs),
            out_specs=(tokens, jax.P()),
            check_vma=False,  # which ragged_dot has no rule for
        )(x, real, *weights)


def _mix(
    config: ExpertsConfig,
    rules: Mapping[str, tuple[str, ...]],
    x_BTD: Array,
    real_BT: Array,
    router_DN: Array,
    gate_MDF: Array,
    up_MDF: Array,
    down_MFD: Array,
) -> tuple[Array, Array]:
    """A device's own tokens [B, T] through all N experts; it has M of them, and its part of their neurons."""
    x_SD, real_S1 = x_BTD.reshape(-1, x_BTD.shape[-1]), real_BT.reshape(-1, 1)
    N, M, K = config.count, len(gate_MDF), config.per_token
    logits_SN = jnp.einsum("sd,dn->sn", x_SD.astype(jnp.float32), router_DN, precision=jax.lax.Precision.HIGHEST)
    probabilities_SN = jax.nn.softmax(logits_SN)
    weights_SK, chosen_SK = jax.lax.top_k(probabilities_SN, K)
    if config.normalize:
        weights_SK /= jnp.sum(weights_SK, -1, keepdims=True)
    took_SN = jnp.sum(jax.nn.one_hot(chosen_SK, N), 1)
    sums = [jnp.sum(jnp.where(real_S1, each, 0), 0) for each in (took_SN, probabilities_SN, jnp.ones_like(took_SN))]
    tokens = (*rules["batch"], *rules["length"])
    took_N, probability_N, count_N = jax.lax.psum(sums, tokens) if tokens else sums
    balance = N * jnp.sum(took_N * probability_N / jnp.maximum(count_N, 1) ** 2)

    if M < N:  # the devices that share the experts show each other their tokens
        x_SD, weights_SK, chosen_SK = jax.lax.all_gather((x_SD, weights_SK, chosen_SK), rules["experts"], tiled=True)
        chosen_SK -= M * jax.lax.axis_index(rules["experts"])
    # Each token K times, sorted by expert: the rows of one expert are then one block of a grouped product. Those of
    # other devices' experts are behind, in no block.
    chosen = jnp.where((chosen_SK >= 0) & (chosen_SK < M), chosen_SK, M).reshape(-1)
    order, sizes_M = jnp.argsort(chosen, stable=True), jnp.bincount(chosen, length=M + 1)[:M]
    rows = x_SD[order // K]
    gate, up = grouped_matmul(rows, gate_MDF, sizes_M), grouped_matmul(rows, up_MDF, sizes_M)
    rows = grouped_matmul(jax.nn.silu(gate) * up, down_MFD, sizes_M)
    said_SKD = rows[jnp.argsort(order)].reshape(*chosen_SK.shape, -1)
    out_SD = jnp.einsum("skd,sk->sd", said_SKD.astype(jnp.float32), weights_SK).astype(x_BTD.dtype)
    if rules["neurons"]:
        out_SD = jax.lax.psum(out_SD, rules["neurons"])
    if M < N:
        out_SD = jax.lax.psum_scatter(out_SD, rules["experts"], tiled=True)
    return out_SD.reshape(x_BTD.shape), balance
