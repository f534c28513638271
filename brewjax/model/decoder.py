"""The decoder: a language model of the Llama families (Touvron et al. 2023) that attends by `TokenLabels`.

Axis letters: B rows, T tokens, D model dimension, H query heads, K key-value heads, E size of a head, F neurons,
V vocabulary, L layers; in caches N pages of P tokens, M pages of a row (docs/glossary.md, "Axis letters").
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int

from brewjax.model.config import ModelConfig
from brewjax.model.experts import Experts
from brewjax.model.rope import rotary, rotate
from brewjax.model.sharding import FSDP_TENSOR, Sharding
from brewjax.model.weights import Matrix, Weight, from_bits, gather_weight, matrix, product, random_weight
from pallas_kernels.attention import attention
from pallas_kernels.quantized_matmul import to_8_bits
from pallas_kernels.token_labels import PADDING, TokenLabels

KVCache = tuple[Float[Array, "B T K E"], Float[Array, "B T K E"]]  # rotated keys, and values


class PagedKVCache(NamedTuple):
    """Keys (rotated) and values of tokens that earlier calls computed.

    Attributes:
      keys, values: a pool of N pages of P tokens each, in the compute dtype.
      page_table: the pages that each row reads, in order; M may be 0.
    """

    keys: Float[Array, "L N P K E"]
    values: Float[Array, "L N P K E"]
    page_table: Int[Array, "B M"]


class RMSNorm(nnx.Module):
    """Root mean square normalisation (Zhang and Sennrich 2019), computed in float32."""

    def __init__(self, config: ModelConfig, size: int, axis: str | None = "model"):
        self.eps = config.norm_eps
        self.scale = Weight(jnp.ones(size, config.param_dtype), axes=(axis,))

    def __call__(self, x: Float[Array, "*B D"]) -> Float[Array, "*B D"]:
        x32 = x.astype(jnp.float32)
        x32 *= jax.lax.rsqrt(jnp.mean(x32**2, -1, keepdims=True) + self.eps)
        return (x32 * self.scale[...]).astype(x.dtype)


class Layer(nnx.Module):
    """Attention, then a SwiGLU MLP (Shazeer 2020) or experts; each has a norm before it and a residual around it.

    Args:
      config: the shape of the decoder.
      sharding: which mesh axes each of the model's axes is split over.
      rngs: of the initial weights.
    """

    def __init__(self, config: ModelConfig, sharding: Sharding, rngs: nnx.Rngs):
        self.config, self.sharding = config, sharding
        D, H, K, E, F = config.d_model, config.heads, config.kv_heads, config.head_dim, config.d_ff
        # The projections into the residual stream start smaller, for the sum over layers to start at scale one.
        residual_scale = (2 * config.layers) ** -0.5

        def weight(*shape: int, axes: tuple, inputs: int = 1, scale: float = 1.0) -> Matrix:
            return matrix(rngs, config, shape, axes, inputs, scale)

        def bias(*shape: int) -> Weight | None:
            return Weight(jnp.zeros(shape, config.param_dtype), axes=("heads", None)) if config.qkv_bias else None

        self.attention_norm = RMSNorm(config, D)
        self.query = weight(D, H, E, axes=("weight", "heads", None))
        self.key = weight(D, K, E, axes=("weight", "heads", None))
        self.value = weight(D, K, E, axes=("weight", "heads", None))
        self.query_bias, self.key_bias, self.value_bias = bias(H, E), bias(K, E), bias(K, E)
        self.query_norm = RMSNorm(config, E, None) if config.qk_norm else None
        self.key_norm = RMSNorm(config, E, None) if config.qk_norm else None
        self.output = weight(H, E, D, axes=("heads", None, "weight"), inputs=2, scale=residual_scale)
        self.mlp_norm = RMSNorm(config, D)
        if config.experts:
            self.experts = Experts(config, sharding, rngs)
        else:
            self.gate = weight(D, F, axes=("weight", "neurons"))
            self.up = weight(D, F, axes=("weight", "neurons"))
            self.down = weight(F, D, axes=("neurons", "weight"), scale=residual_scale)

    def __call__(
        self,
        x: Float[Array, "B T D"],
        rotation: Float[Array, "B T 1 E"],
        token_labels: TokenLabels,
        cached_kv: KVCache | None,
    ) -> tuple[Float[Array, "B T D"], KVCache, Float[Array, ""]]:
        """The whole layer.

        Args:
          x: residual stream.
          rotation: of the tokens' positions, see `rotary`.
          token_labels: of cached and new tokens.
          cached_kv: keys and values of cached tokens, or None.

        Returns:
          The residual stream after the layer; keys and values of the T new tokens; the experts' load-balancing loss.
        """
        attended, new_kv = self.attend(x, rotation, token_labels, cached_kv)
        x, balance = self.add_mlp(self.add_attention(x, attended), token_labels)
        return x, new_kv, balance

    @jax.named_scope("attention")
    def attend(
        self,
        x: Float[Array, "B T D"],
        rotation: Float[Array, "B T 1 E"],
        token_labels: TokenLabels,
        cached_kv: KVCache | None,
    ) -> tuple[Float[Array, "B T H E"], KVCache]:
        """Computes the attention, without the output projection.

        Args:
          x: residual stream before the layer.
          rotation: of the tokens' positions, see `rotary`.
          token_labels: of cached and new tokens.
          cached_kv: keys and values of cached tokens; None if there are none.

        Returns:
          The attended values of each head; keys and values [B, T, K, E] of the T new tokens.
        """
        q, k, v = self.queries_keys_values(x, rotation)
        k, v = (self.sharding.reshard(x, "batch", None, "heads", None) for x in (k, v))
        all_k, all_v = (
            (k, v) if cached_kv is None else (jnp.concatenate(x, 1) for x in zip(cached_kv, (k, v), strict=True))
        )
        return _attend(self.sharding, q, all_k, all_v, token_labels), (k, v)

    def queries_keys_values(
        self, x: Float[Array, "B T D"], rotation: Float[Array, "B T 1 E"]
    ) -> tuple[Float[Array, "B T H E"], Float[Array, "B T K E"], Float[Array, "B T K E"]]:
        """Projects the residual stream.

        Args:
          x: residual stream before the layer.
          rotation: of the tokens' positions, see `rotary`.

        Returns:
          Queries and keys, rotated, and values.
        """
        h = self.attention_norm(x)
        q = self._heads(h, self.query, self.query_bias, self.query_norm)
        k = self._heads(h, self.key, self.key_bias, self.key_norm)
        v = self._heads(h, self.value, self.value_bias, None)
        return rotate(q, rotation), rotate(k, rotation), v

    @jax.named_scope("attention")
    def add_attention(self, x: Float[Array, "B T D"], attended: Float[Array, "B T H E"]) -> Float[Array, "B T D"]:
        """The residual stream between attention and MLP: `x`, plus the output projection of `attended`."""
        return x + product(self.sharding, attended, self.output, inputs=2)

    def add_mlp(
        self, x: Float[Array, "B T D"], token_labels: TokenLabels
    ) -> tuple[Float[Array, "B T D"], Float[Array, ""]]:
        """Adds the MLP or the experts.

        Args:
          x: residual stream between attention and MLP.
          token_labels: of cached and new tokens; experts leave padding out of their loss.

        Returns:
          The residual stream after the layer; the experts' load-balancing loss, 0 for an MLP.
        """
        with jax.named_scope("experts" if self.config.experts else "mlp"):
            h = self.mlp_norm(x)
            if self.config.experts:
                real = self.sharding.reshard(token_labels.example_id[:, -x.shape[1] :] != PADDING, "batch", "length")
                expert_output, balance = self.experts(h, real)
                return x + expert_output, balance
            return x + product(self.sharding, self.neurons(h), self.down), jnp.zeros(())

    def neurons(self, h: Float[Array, "B T D"]) -> Float[Array, "B T F"]:
        """Activations of the MLP's neurons, before the down projection; `h` is normed."""
        return swiglu(product(self.sharding, h, self.gate), product(self.sharding, h, self.up))

    def _heads(self, x: Array, weight: Matrix, bias: Weight | None, norm: RMSNorm | None) -> Array:
        heads = product(self.sharding, x, weight)
        if bias is not None:
            heads += gather_weight(self.sharding, bias, x.dtype)
        return heads if norm is None else norm(heads)


@functools.partial(jax.checkpoint, prevent_cse=False)  # otherwise five arrays, not two, are stored for its gradient
def swiglu(gate: Float[Array, "*B F"], up: Float[Array, "*B F"]) -> Float[Array, "*B F"]:
    """silu(gate) * up."""
    return jax.nn.silu(gate) * up


class Decoder(nnx.Module):
    """Tokens in, hidden states out; `logits` turns hidden states into logits.

    Layers are stacked along a leading axis of their weights and scanned. Called without a mesh in context, it runs on
    one device; with one, arrays are laid out by `sharding`.

    Args:
      config: the shape of the decoder, with a vocabulary.
      rngs: of the initial weights.
      sharding: which mesh axes each of the model's axes is split over.

    Raises:
      ValueError: `config` has no `vocab_size`.
    """

    def __init__(self, config: ModelConfig, rngs: nnx.Rngs, sharding: Sharding = FSDP_TENSOR):
        if not config.vocab_size:
            raise ValueError(f"model '{config.name}': vocab_size must be given")
        self.config, self.sharding = config, sharding
        V, D = config.vocab_size, config.d_model
        self.embedding = random_weight(rngs, config, (V, D), ("vocab", "weight"), fan_in=D)

        @nnx.split_rngs(splits=config.layers)
        @nnx.vmap(transform_metadata={nnx.PARTITION_NAME: None})
        def stack(rngs: nnx.Rngs) -> Layer:
            return Layer(config, sharding, rngs)

        self.layers = stack(rngs)
        self.norm = RMSNorm(config, D)
        self.untied_head = (
            None if config.tie_head else random_weight(rngs, config, (V, D), ("vocab", "weight"), fan_in=D)
        )

    def __call__(
        self, tokens: Int[Array, "B T"], positions: Int[Array, "B T"], token_labels: TokenLabels
    ) -> Float[Array, "B T D"]:
        """Hidden states after the last norm, in the compute dtype; undefined for padding.

        Args:
          tokens: ids.
          positions: RoPE positions, from 0 in each example.
          token_labels: of the tokens.
        """
        return self._run(tokens, positions, token_labels)[0]

    def forward_with_aux_loss(
        self, tokens: Int[Array, "B T"], positions: Int[Array, "B T"], token_labels: TokenLabels
    ) -> tuple[Float[Array, "B T D"], Float[Array, ""]]:
        """As a call, with the loss that keeps experts equally busy.

        Args:
          tokens: ids.
          positions: RoPE positions, from 0 in each example.
          token_labels: of the tokens.

        Returns:
          Hidden states; the load-balancing loss times its coefficient, the mean over layers, 0 without experts.
        """
        hidden, balance, _ = self._run(tokens, positions, token_labels)
        return hidden, self._weighed(balance)

    def forward_with_hidden_states(
        self, tokens: Int[Array, "B T"], positions: Int[Array, "B T"], token_labels: TokenLabels
    ) -> tuple[Float[Array, "B T D"], Float[Array, ""], Float[Array, "L B T D"]]:
        """As `forward_with_aux_loss`, with the activations between layers.

        Args:
          tokens: ids.
          positions: RoPE positions, from 0 in each example.
          token_labels: of the tokens.

        Returns:
          Hidden states; the load-balancing loss; the residual stream after each layer, in the compute dtype.
        """
        hidden, balance, streams = self._run(tokens, positions, token_labels, layer_output=lambda x, new_kv: x)
        return hidden, self._weighed(balance), streams

    def _weighed(self, balance: Array) -> Array:
        return balance * (self.config.experts.router_aux_loss_coef if self.config.experts else 0.0)

    def forward_with_cache(
        self, tokens: Int[Array, "B T"], positions: Int[Array, "B T"], token_labels: TokenLabels, cache: PagedKVCache
    ) -> tuple[Float[Array, "B T D"], KVCache]:
        """As a call, for tokens behind cached ones.

        Args:
          tokens, positions: of the T new tokens.
          token_labels: of the M x P cached tokens of a row, in the order of its pages, then of the T new ones.
          cache: keys and values of cached tokens.

        Returns:
          Hidden states, and keys and values [L, B, T, K, E], of the new tokens.
        """
        hidden, _, new_kv = self._run(tokens, positions, token_labels, cache, layer_output=lambda x, new_kv: new_kv)
        return hidden, new_kv

    def _run(
        self,
        tokens: Array,
        positions: Array,
        token_labels: TokenLabels,
        cache: PagedKVCache | None = None,
        layer_output: Callable[[Array, KVCache], Any] = lambda x, new_kv: None,
    ) -> tuple[Array, Array, Any]:
        """Hidden states; the experts' loss; and `layer_output(residual stream, new keys and values)` of each layer,
        stacked."""
        tokens, positions = (self.sharding.reshard(x, "batch", "length") for x in (tokens, positions))
        token_labels = TokenLabels(*(self.sharding.reshard(jnp.asarray(x), "batch", None) for x in token_labels))
        x = self.embed(tokens)
        rotation = rotary(positions, self.config)
        graph, weights = nnx.split(self.layers)

        def body(x: Array, layer: tuple[nnx.State, Array]) -> tuple[Array, tuple[Array, Any]]:
            weights, layer_index = layer
            cached_kv = None if cache is None else _read(self.sharding, cache, layer_index)
            weights = jax.tree.map(from_bits, weights)
            x, new_kv, balance = nnx.merge(graph, weights)(x, rotation, token_labels, cached_kv)
            return x, (balance, layer_output(x, new_kv))

        layers = (weights, jnp.arange(self.config.layers))
        if self.config.remat:
            # A scan needs no guard against common subexpression elimination, and the guard would keep what is the same
            # for all layers, such as the attention's worklist, inside the backward loop: computed once per layer.
            body = jax.checkpoint(body, prevent_cse=False)
        x, (balance, outputs) = jax.lax.scan(body, x, layers)
        return self.norm(x), jnp.mean(balance), outputs

    @jax.named_scope("embedding")
    def embed(self, tokens: Int[Array, "B T"]) -> Float[Array, "B T D"]:
        """The residual stream before the first layer, in the compute dtype: a row of the embedding for each of
        `tokens`."""
        table = self.sharding.reshard(self.embedding[...], None, None).astype(self.config.compute_dtype)
        return table.at[tokens].get(out_sharding=self.sharding.spec_or_none("batch", "length", "model"))

    def layer(self, layer_index: Int[Array, ""]) -> Layer:
        """One of the stacked layers, by `layer_index`, which may be traced."""
        graph, weights = nnx.split(self.layers)
        layer_weights = jax.tree.map(
            lambda stack: from_bits(jax.lax.dynamic_index_in_dim(stack, layer_index, keepdims=False)), weights
        )
        return nnx.merge(graph, layer_weights)

    @property
    def lm_head(self) -> Float[Array, "V D"]:
        """The output matrix, gathered, in the parameter dtype or as `HeadPrecision` rounds it."""
        return self.gather_head(None)

    @jax.named_scope("head")
    def gather_head(self, vocabulary: str | None) -> Float[Array, "V D"]:
        """The output matrix, as `lm_head`.

        Args:
          vocabulary: the axis "vocab", for each device to get the words that this axis gives it; None for all words.

        Returns:
          The matrix, in the parameter dtype or as `HeadPrecision` rounds it.
        """
        weight = self.embedding if self.untied_head is None else self.untied_head
        return self.cast_for_head(self.sharding.reshard(weight[...], vocabulary, None))

    def cast_for_head(self, x: Float[Array, "*B D"]) -> Float[Array, "*B D"]:
        """Rounds what the output head multiplies.

        Args:
          x: hidden states, or rows of the head.

        Returns:
          `x` as `HeadPrecision.product` says: as it is, bfloat16, or the float32 values of e4m3 numbers scaled by row.
        """
        match self.config.head.product:
            case "e4m3":
                values, scale = to_8_bits(x, jnp.float8_e4m3fn, -1)
                return values.astype(jnp.float32) * scale
            case "bfloat16":
                return x.astype(jnp.bfloat16)
        return x

    @jax.named_scope("head")
    def logits(self, hidden: Float[Array, "*B D"]) -> Float[Array, "*B V"]:
        """float32 logits of `hidden` states, by a float32 product without reduced precision, rounded as
        `HeadPrecision.logits` says."""
        logits = jnp.einsum(
            "...d,vd->...v",
            self.cast_for_head(hidden).astype(jnp.float32),
            self.lm_head.astype(jnp.float32),
            precision=jax.lax.Precision.HIGHEST,
        )
        return logits.astype(self.config.head.logits).astype(jnp.float32)


def _read(sharding: Sharding, cache: PagedKVCache, layer: Array) -> KVCache:
    """One layer's cached keys and values [B, M * P, K, E]."""
    B, M = cache.page_table.shape

    def read(pool: Array) -> Array:
        pages = pool.at[layer, cache.page_table].get(
            out_sharding=sharding.spec_or_none("batch", None, None, "heads", None)
        )
        tokens = (B, M * pool.shape[2], *pool.shape[3:])
        return jnp.reshape(pages, tokens, out_sharding=sharding.spec_or_none("batch", None, "heads", None))

    return read(cache.keys), read(cache.values)


def _attend(sharding: Sharding, q: Array, k: Array, v: Array, token_labels: TokenLabels) -> Array:
    """Attention; with a mesh in context, each device computes its rows, heads and queries."""
    if jax.sharding.get_abstract_mesh().empty:
        return attention(q, k, v, token_labels)[0]
    first, axes = k.shape[1] - q.shape[1], sharding.rules["length"]

    def local(q: Array, k: Array, v: Array, token_labels: TokenLabels) -> Array:
        return attention(q, k, v, token_labels, first + jax.lax.axis_index(axes) * q.shape[1])[0]

    queries, keys = sharding.spec("batch", "length", "heads", None), sharding.spec("batch", None, "heads", None)
    # check_vma: the kernels' loops start from plain zeros, which it would not let become device-varying.
    return jax.shard_map(
        local, in_specs=(queries, keys, keys, sharding.spec("batch", None)), out_specs=queries, check_vma=False
    )(q, k, v, token_labels)
