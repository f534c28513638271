"""A mixture of experts (Shazeer et al. 2017; Mixtral, Jiang et al. 2024): many SwiGLU MLPs, a few of them per token.

Axis letters, as suffixes too: B rows, T tokens of a row, S tokens of a device, D model dimension, F neurons, N experts,
M experts of a device, K experts of a token, R rows gathered for experts (docs/glossary.md, "Axis letters").
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Bool, Float, Int

from brewjax.model.config import ExpertsConfig, ModelConfig
from brewjax.model.sharding import Sharding
from brewjax.model.weights import (
    Adapted,
    AdaptedWeight,
    Matrix,
    QuantizedWeight,
    gather_weight,
    matrix,
    random_weight,
    used_axes,
)
from pallas_kernels.grouped_matmul import grouped_matmul
from pallas_kernels.quantized_matmul import Activations, Quantized, round_tokens

# Rows of a chunk over the rows that a device gets when tokens are routed evenly. No token is dropped: more rows take
# more chunks.
CAPACITY_FACTOR = 1.25
# Rows of a chunk are a multiple of this: the TPU compiler runs 20,480 rows in its grouped kernel, and 20,481 as dense
# products.
CHUNK_MULTIPLE = 512


class Experts(nnx.Module):
    """A mixture of experts instead of a layer's MLP. No token is dropped, so a token's output depends on it alone."""

    def __init__(self, config: ModelConfig, sharding: Sharding, rngs: nnx.Rngs):
        assert config.experts is not None
        self.config, self.sharding = config.experts, sharding
        self.activations = config.quantized.activations if config.quantized else None
        N, D, F = config.experts.num_experts, config.d_model, config.d_ff
        self.router = random_weight(rngs, config, (D, N), ("model", None), fan_in=D)
        self.gate = matrix(rngs, config, (N, D, F), ("experts", "weight", "neurons"))
        self.up = matrix(rngs, config, (N, D, F), ("experts", "weight", "neurons"))
        scale = (2 * config.layers) ** -0.5
        self.down = matrix(rngs, config, (N, F, D), ("experts", "neurons", "weight"), scale=scale)

    def __call__(
        self, x: Float[Array, "B T D"], real: Bool[Array, "B T"]
    ) -> tuple[Float[Array, "B T D"], Float[Array, ""]]:
        """The experts' output, and their load-balancing loss.

        The loss (Fedus et al. 2021, eq. 4, for more than one expert as in Mixtral) is N x the sum over experts of
        (share of tokens routed to it) x (its mean probability): `num_experts_per_tok` if all are routed to equally,
        and more otherwise.

        Args:
          x: normed residual stream.
          real: tokens that are not padding; only they count in the loss.

        Returns:
          What the experts add to the residual stream, in the dtype of `x`; the loss, float32.
        """
        matrices = [self.gate, self.up, self.down]
        weights = [self.router[...].astype(jnp.float32), *(gather_weight(self.sharding, w, x.dtype) for w in matrices)]
        if jax.sharding.get_abstract_mesh().empty:
            rules: dict[str, tuple[str, ...]] = {"batch": (), "length": (), "neurons": (), "experts": ()}
            return _mix(self.config, self.activations, rules, x, real, *weights)
        tokens, labels = self.sharding.spec("batch", "length", "model"), self.sharding.spec("batch", "length")
        return jax.shard_map(
            functools.partial(_mix, self.config, self.activations, self.sharding.rules),
            in_specs=(tokens, labels, *(self._spec(w) for w in (self.router, *matrices))),
            out_specs=(tokens, jax.P()),
            check_vma=False,  # which ragged_dot has no rule for
        )(x, real, *weights)

    def _spec(self, weight: Matrix) -> Any:
        if isinstance(weight, AdaptedWeight):
            return Adapted(*(self._spec(part) for part in (weight.base, weight.a, weight.b)))
        if isinstance(weight, QuantizedWeight):
            specs: list[Any] = [self.sharding.spec(*used_axes(part)) for part in (weight.values, weight.scale)]
            return Quantized(*specs)
        return self.sharding.spec(*used_axes(weight))


def route(
    config: ExpertsConfig, x: Float[Array, "*S D"], router: Float[Array, "D N"]
) -> tuple[Float[Array, "*S K"], Int[Array, "*S K"], Float[Array, "*S N"]]:
    """Routes each token to its experts, in float32.

    Args:
      config: how many experts there are, and how many a token goes to.
      x: normed residual stream of S tokens.
      router: its matrix.

    Returns:
      Weights and indices of the K experts of each token, the most probable first; probabilities of all N experts.
    """
    logits = jnp.einsum("...d,dn->...n", x.astype(jnp.float32), router, precision=jax.lax.Precision.HIGHEST)
    probabilities = jax.nn.softmax(logits)
    weights, chosen = jax.lax.top_k(probabilities, config.num_experts_per_tok)
    if config.norm_topk_prob:
        weights /= jnp.sum(weights, -1, keepdims=True)
    return weights, chosen, probabilities


def _mix(
    config: ExpertsConfig,
    activations: Activations | None,
    rules: Mapping[str, tuple[str, ...]],
    x_BTD: Array,
    real_BT: Array,
    router_DN: Array,
    gate_MDF: Array | Quantized | Adapted,
    up_MDF: Array | Quantized | Adapted,
    down_MFD: Array | Quantized | Adapted,
) -> tuple[Array, Array]:
    """All N experts on the tokens [B, T] of this device, which holds M of the experts, and a part of their neurons."""
    x_SD, real_S1 = x_BTD.reshape(-1, x_BTD.shape[-1]), real_BT.reshape(-1, 1)
    N, M, K = config.num_experts, len(jax.tree.leaves(gate_MDF)[0]), config.num_experts_per_tok
    weights_SK, chosen_SK, probabilities_SN = route(config, x_SD, router_DN)
    routed_SN = jnp.sum(jax.nn.one_hot(chosen_SK, N), 1)
    sums = [
        jnp.sum(jnp.where(real_S1, array, 0), 0) for array in (routed_SN, probabilities_SN, jnp.ones_like(routed_SN))
    ]
    tokens = (*rules["batch"], *rules["length"])
    routed_N, probability_N, count_N = jax.lax.psum(sums, tokens) if tokens else sums
    balance = N * jnp.sum(routed_N * probability_N / jnp.maximum(count_N, 1) ** 2)

    if M < N:  # the devices that share the experts gather each other's tokens
        x_SD, weights_SK, chosen_SK = jax.lax.all_gather((x_SD, weights_SK, chosen_SK), rules["experts"], tiled=True)
        chosen_SK -= M * jax.lax.axis_index(rules["experts"])
        chosen_SK = jnp.where((chosen_SK >= 0) & (chosen_SK < M), chosen_SK, M)  # M: an expert of another device
        K = min(K, M)  # no token has more experts on this device
        local_SK = jnp.argsort(chosen_SK, 1)[:, :K]
        weights_SK, chosen_SK = (jnp.take_along_axis(array, local_SK, 1) for array in (weights_SK, chosen_SK))
    # Each token K times, sorted by expert: the rows of one expert are then one group of a grouped product. Rows for
    # other devices' experts come last, in no group.
    chosen = chosen_SK.reshape(-1)
    order, sizes_M = jnp.argsort(chosen, stable=True), jnp.bincount(chosen, length=M + 1)[:M]
    token_R, weight_R, matrices = order // K, weights_SK.reshape(-1)[order], (gate_MDF, up_MDF, down_MFD)
    apply_experts = functools.partial(_expert_outputs, activations, rules["neurons"])
    # 8-bit scales are reduced over several devices, which must not wait for each other in loops of different lengths.
    if M == N or isinstance(gate_MDF, Quantized):
        rows = apply_experts(x_SD[token_R], weight_R, matrices, sizes_M, jnp.minimum(chosen[order], M - 1))
        out_SD = jnp.zeros(x_SD.shape, jnp.float32).at[token_R].add(rows)
    else:
        chunk_size = (
            math.ceil(CAPACITY_FACTOR * len(x_SD) * config.num_experts_per_tok * M / N / CHUNK_MULTIPLE)
            * CHUNK_MULTIPLE
        )
        chunk_size = min(chunk_size, len(token_R))
        token_R, weight_R = (jnp.pad(array, (0, -len(array) % chunk_size)) for array in (token_R, weight_R))
        out_SD = _sum_in_chunks(apply_experts, chunk_size, x_SD, weight_R, matrices, token_R, sizes_M)
    out_SD = out_SD.astype(x_BTD.dtype)
    if rules["neurons"]:
        out_SD = jax.lax.psum(out_SD, rules["neurons"])
    if M < N:
        out_SD = jax.lax.psum_scatter(out_SD, rules["experts"], tiled=True)
    return out_SD.reshape(x_BTD.shape), balance


def _expert_outputs(
    activations: Activations | None,
    neurons_over: tuple[str, ...],
    rows_RD: Array,
    weight_R: Array,
    matrices: tuple[Any, Any, Any],
    sizes_M: Array,
    expert_R: Array | None = None,
) -> Float[Array, "R D"]:
    """float32 outputs of experts for their groups of rows, times the rows' weights; zeros behind the last group."""
    gate_MDF, up_MDF, down_MFD = matrices
    grouped = functools.partial(_grouped, activations, sizes_M, expert_R)
    neurons = jax.nn.silu(grouped(rows_RD, gate_MDF)) * grouped(rows_RD, up_MDF)
    outputs = grouped(neurons, down_MFD, neurons_over).astype(jnp.float32) * weight_R[:, None]
    return jnp.where(jnp.arange(len(outputs))[:, None] < jnp.sum(sizes_M), outputs, 0)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _sum_in_chunks(
    apply_experts: Callable,
    chunk_size: int,
    x_SD: Array,
    weight_R: Array,
    matrices: Any,
    token_R: Array,
    sizes_M: Array,
) -> Float[Array, "S D"]:
    """`apply_experts` on chunks of rows, summed by token, until no rows are left.

    All R rows at once would need memory for rows of other devices' experts too, which on average are most of them. R is
    a multiple of `chunk_size`.
    """

    def add_chunk(chunk_index: Array, out_SD: Array) -> Array:
        token, weight, sizes = _chunk_rows(chunk_size, chunk_index, token_R, weight_R, sizes_M)
        return out_SD.at[token].add(apply_experts(x_SD[token], weight, matrices, sizes))

    return jax.lax.fori_loop(0, _num_chunks(chunk_size, sizes_M), add_chunk, jnp.zeros(x_SD.shape, jnp.float32))


def _num_chunks(chunk_size: int, sizes_M: Array) -> Int[Array, ""]:
    return -(-jnp.sum(sizes_M) // chunk_size)


def _chunk_rows(
    chunk_size: int, chunk_index: Array, token_R: Array, weight_R: Array, sizes_M: Array
) -> tuple[Array, Array, Array]:
    """Tokens and weights of a chunk's rows, and how many of the rows each expert has."""
    token, weight = (
        jax.lax.dynamic_slice_in_dim(array, chunk_index * chunk_size, chunk_size) for array in (token_R, weight_R)
    )
    ends_M = jnp.clip(jnp.cumsum(sizes_M) - chunk_index * chunk_size, 0, chunk_size)
    return token, weight, jnp.diff(ends_M, prepend=0)


def _sum_in_chunks_forward(apply_experts: Callable, chunk_size: int, *inputs: Any) -> tuple[Array, tuple]:
    return _sum_in_chunks(apply_experts, chunk_size, *inputs), inputs


def _sum_in_chunks_backward(apply_experts: Callable, chunk_size: int, inputs: tuple, d_out_SD: Array) -> tuple:
    x_SD, weight_R, matrices, token_R, sizes_M = inputs

    def add_chunk(chunk_index: Array, sums: tuple) -> tuple:
        token, weight, sizes = _chunk_rows(chunk_size, chunk_index, token_R, weight_R, sizes_M)
        _, pull = jax.vjp(lambda *chunk_inputs: apply_experts(*chunk_inputs, sizes), x_SD[token], weight, matrices)
        d_rows, d_weight, d_matrices = pull(d_out_SD[token])
        d_x_SD, d_weight_R, previous = sums
        return (
            d_x_SD.at[token].add(d_rows.astype(jnp.float32)),
            jax.lax.dynamic_update_slice_in_dim(d_weight_R, d_weight, chunk_index * chunk_size, 0),
            jax.tree.map(jnp.add, previous, d_matrices),
        )

    zeros = jnp.zeros(x_SD.shape, jnp.float32), *jax.tree.map(jnp.zeros_like, (weight_R, matrices))
    d_x_SD, d_weight_R, d_matrices = jax.lax.fori_loop(0, _num_chunks(chunk_size, sizes_M), add_chunk, zeros)
    return d_x_SD.astype(x_SD.dtype), d_weight_R, d_matrices, None, None


_sum_in_chunks.defvjp(_sum_in_chunks_forward, _sum_in_chunks_backward)


def _grouped(
    activations: Activations | None,
    sizes_M: Array,
    expert_R: Array | None,
    rows_RK: Array,
    weight: Array | Quantized | Adapted,
    inputs_over: tuple[str, ...] = (),
) -> Array:
    """Each expert's group of rows times its matrix. 8-bit values are multiplied as bfloat16, which holds them exactly.

    Args:
      activations: how to round activations for 8-bit weights.
      sizes_M: rows of each expert.
      expert_R: the expert of each row, for 8-bit weights only.
      rows_RK: rows, grouped by expert.
      weight: [M, K, F].
      inputs_over: mesh axes that K is sharded over; token scales are reduced over them, sums are not.
    """
    if isinstance(weight, Adapted):
        grouped = functools.partial(_grouped, activations, sizes_M, expert_R)
        return grouped(rows_RK, weight.base, inputs_over) + grouped(grouped(rows_RK, weight.a), weight.b)
    if not isinstance(weight, Quantized):
        return grouped_matmul(rows_RK, weight, sizes_M)
    tokens, scales = round_tokens(rows_RK, weight.values.dtype, activations, inputs_over)
    out = jax.lax.ragged_dot(
        tokens.astype(jnp.bfloat16),
        weight.values.astype(jnp.bfloat16),
        sizes_M,
        preferred_element_type=jnp.float32,
    )
    for scale in (weight.scale[expert_R], *scales):
        out *= scale
    return out.astype(rows_RK.dtype)
