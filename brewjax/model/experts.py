"""A mixture of experts (Shazeer et al. 2017; Mixtral, Jiang et al. 2024): many SwiGLU MLPs, a few of them per token."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Bool, Float

from brewjax.model.config import ExpertsConfig, ModelConfig
from brewjax.model.sharding import Sharding
from brewjax.model.weights import gathered, random_weight, used_axes


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
        rules = self.sharding.rules
        matrices = [self.gate, self.up, self.down]
        weights = [self.router[...].astype(jnp.float32), *(gathered(self.sharding, w, x.dtype) for w in matrices)]
        if jax.sharding.get_abstract_mesh().empty:
            return _mix(self.config, (), (), x, real, *weights)
        tokens, labels = self.sharding.spec("batch", "length", "model"), self.sharding.spec("batch", "length")
        specs = [self.sharding.spec(*used_axes(w)) for w in (self.router, *matrices)]
        mix = functools.partial(_mix, self.config, rules["batch"] + rules["length"], rules["neurons"])
        # check_vma: ragged_dot has no rule for it.
        return jax.shard_map(
            mix, in_specs=(tokens, labels, *specs), out_specs=(tokens, jax.P()), check_vma=False
        )(x, real, *weights)  # fmt: skip


def _mix(
    config: ExpertsConfig,
    batch_axes: tuple[str, ...],
    neuron_axes: tuple[str, ...],
    x_BTD: Array,
    real_BT: Array,
    router_DN: Array,
    gate_NDF: Array,
    up_NDF: Array,
    down_NFD: Array,
) -> tuple[Array, Array]:
    """On a device's own tokens and neurons: its experts are all of them."""
    x_SD, real_S = x_BTD.reshape(-1, x_BTD.shape[-1]), real_BT.reshape(-1)
    N, K = config.count, config.per_token
    logits = jnp.einsum("sd,dn->sn", x_SD.astype(jnp.float32), router_DN, precision=jax.lax.Precision.HIGHEST)
    probabilities_SN = jax.nn.softmax(logits)
    weights_SK, chosen_SK = jax.lax.top_k(probabilities_SN, K)
    if config.normalize:
        weights_SK /= jnp.sum(weights_SK, -1, keepdims=True)
    # Each token K times, sorted by expert: the rows of one expert are then one block of a grouped product.
    chosen = chosen_SK.reshape(-1)
    order = jnp.argsort(chosen, stable=True)
    rows, sizes = x_SD[order // K], jnp.bincount(chosen, length=N)
    gate, up = jax.lax.ragged_dot(rows, gate_NDF, sizes), jax.lax.ragged_dot(rows, up_NDF, sizes)
    rows = jax.lax.ragged_dot(jax.nn.silu(gate) * up, down_NFD, sizes)
    said_SKD = rows[jnp.argsort(order)].reshape(*chosen_SK.shape, -1)
    out_SD = jnp.einsum("skd,sk->sd", said_SKD.astype(jnp.float32), weights_SK)
    if neuron_axes:
        out_SD = jax.lax.psum(out_SD, neuron_axes)

    took = jnp.sum(jax.nn.one_hot(chosen_SK, N), 1)  # [S, N]
    sums = [jnp.sum(jnp.where(real_S[:, None], each, 0), 0) for each in (took, probabilities_SN)]
    totals = (*sums, jnp.sum(real_S))
    took_N, probability_N, count = jax.lax.psum(totals, batch_axes) if batch_axes else totals
    balance = N * jnp.sum(took_N * probability_N) / jnp.maximum(count, 1) ** 2
    return out_SD.astype(x_BTD.dtype).reshape(x_BTD.shape), balance
