"""The decoder: a language model of the Llama family (Touvron et al. 2023) that sees by `Segments`."""

from __future__ import annotations

from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import pydantic
from flax import nnx
from jaxtyping import Array, Float, Int

from brewjax.config import Config
from brewjax.model.sharding import FSDP_TENSOR, Sharding
from pallas_kernels.attention import attention
from pallas_kernels.segments import Segments

Dtype = Literal["float32", "bfloat16"]


class ModelConfig(Config):
    """The shape of a decoder.

    Attributes:
      vocab_size: 0 takes the tokenizer's.
      rope_base: base of the rotary position angles (Su et al. 2021).
      tie_head: the output head is the embedding.
      param_dtype, compute_dtype: of the weights at rest, and of the matrix products; norms, softmax and logits
        are float32 whatever these are.
      remat: recompute each layer in the backward pass instead of storing its activations.
    """

    name: str
    vocab_size: int = pydantic.Field(default=0, ge=0)
    d_model: int = pydantic.Field(gt=0)
    layers: int = pydantic.Field(gt=0)
    heads: int = pydantic.Field(gt=0)
    kv_heads: int = pydantic.Field(gt=0)
    head_dim: int = pydantic.Field(gt=0, multiple_of=2)
    d_ff: int = pydantic.Field(gt=0)
    rope_base: float = 10_000.0
    norm_eps: float = 1e-5
    tie_head: bool = True
    param_dtype: Dtype = "float32"
    compute_dtype: Dtype = "float32"
    remat: bool = False

    @pydantic.model_validator(mode="after")
    def _groups_divide(self) -> ModelConfig:
        if self.heads % self.kv_heads:
            raise ValueError(f"heads ({self.heads}) must be a multiple of kv_heads ({self.kv_heads})")
        return self


KeysValues = tuple[Float[Array, "B T K E"], Float[Array, "B T K E"]]


class Past(NamedTuple):
    """Keys (rotated) and values of tokens that were computed before, for rows to go on from.

    Attributes:
      keys, values: N pages of P tokens each, in the compute dtype.
      pages: the pages that each row goes on from, in order; M may be 0.
    """

    keys: Float[Array, "L N P K E"]
    values: Float[Array, "L N P K E"]
    pages: Int[Array, "B M"]


class Weight(nnx.Param):
    """A parameter with the names of its axes, for sharding; stacked layers have one more in front."""


class RMSNorm(nnx.Module):
    """Zhang and Sennrich 2019; computed in float32."""

    def __init__(self, config: ModelConfig):
        self.eps = config.norm_eps
        self.scale = Weight(jnp.ones(config.d_model, config.param_dtype), axes=("model",))

    def __call__(self, x: Float[Array, "B T D"]) -> Float[Array, "B T D"]:
        x32 = x.astype(jnp.float32)
        x32 *= jax.lax.rsqrt(jnp.mean(x32**2, -1, keepdims=True) + self.eps)
        return (x32 * self.scale[...]).astype(x.dtype)


class Layer(nnx.Module):
    """Attention and a SwiGLU MLP (Shazeer 2020), each behind a norm and around a residual."""

    def __init__(self, config: ModelConfig, sharding: Sharding, rngs: nnx.Rngs):
        self.config, self.sharding = config, sharding
        D, H, K, E, F = config.d_model, config.heads, config.kv_heads, config.head_dim, config.d_ff
        # The projections into the residual stream start smaller, for the sum over layers to start at scale one.
        into_residual = (2 * config.layers) ** -0.5
        self.attention_norm = RMSNorm(config)
        self.query = _weight(rngs, config, (D, H, E), ("weight", "heads", None), fan_in=D)
        self.key = _weight(rngs, config, (D, K, E), ("weight", "heads", None), fan_in=D)
        self.value = _weight(rngs, config, (D, K, E), ("weight", "heads", None), fan_in=D)
        self.output = _weight(rngs, config, (H, E, D), ("heads", None, "weight"), fan_in=H * E, scale=into_residual)
        self.mlp_norm = RMSNorm(config)
        self.gate = _weight(rngs, config, (D, F), ("weight", "neurons"), fan_in=D)
        self.up = _weight(rngs, config, (D, F), ("weight", "neurons"), fan_in=D)
        self.down = _weight(rngs, config, (F, D), ("neurons", "weight"), fan_in=F, scale=into_residual)

    def __call__(
        self, x: Float[Array, "B T D"], rotation: Float[Array, "B T 1 E"], segments: Segments, past: KeysValues | None
    ) -> tuple[Float[Array, "B T D"], KeysValues]:
        """The residual stream after this layer, and the keys and values of these T tokens; `past` is before them."""
        h = self.attention_norm(x)
        q, k, v = (self._project("btd,dhe->bthe", h, weight) for weight in (self.query, self.key, self.value))
        q, k = rotate(q, rotation), rotate(k, rotation)
        all_k, all_v = (k, v) if past is None else (jnp.concatenate(x, 1) for x in zip(past, (k, v), strict=True))
        x += self._into_residual("bthe,hed->btd", _attend(self.sharding, q, all_k, all_v, segments), self.output)
        h = self.mlp_norm(x)
        gate, up = (self._project("btd,df->btf", h, weight) for weight in (self.gate, self.up))
        return x + self._into_residual("btf,fd->btd", jax.nn.silu(gate) * up, self.down), (k, v)

    def _project(self, equation: str, x: Array, weight: Weight) -> Array:
        return jnp.einsum(equation, x, gathered(self.sharding, weight, x.dtype))

    def _into_residual(self, equation: str, x: Array, weight: Weight) -> Array:
        # The contracted axis lies over `tensor`: the output sharding asks for the sum over it.
        spec = _spec_or_none(self.sharding, "batch", "length", "model")
        return jnp.einsum(equation, x, gathered(self.sharding, weight, x.dtype), out_sharding=spec)


class Decoder(nnx.Module):
    """Tokens in, hidden states out; `head` turns hidden states into logits.

    Layers are stacked along a leading axis of their weights and scanned.
    """

    def __init__(self, config: ModelConfig, rngs: nnx.Rngs, sharding: Sharding = FSDP_TENSOR):
        if not config.vocab_size:
            raise ValueError(f"model '{config.name}': vocab_size must be given")
        self.config, self.sharding = config, sharding
        V, D = config.vocab_size, config.d_model
        self.embedding = _weight(rngs, config, (V, D), ("vocab", "weight"), fan_in=D)

        @nnx.split_rngs(splits=config.layers)
        @nnx.vmap(transform_metadata={nnx.PARTITION_NAME: None})
        def stack(rngs: nnx.Rngs) -> Layer:
            return Layer(config, sharding, rngs)

        self.layers = stack(rngs)
        self.norm = RMSNorm(config)
        self.untied_head = None if config.tie_head else _weight(rngs, config, (V, D), ("vocab", "weight"), fan_in=D)

    def __call__(
        self, tokens: Int[Array, "B T"], positions: Int[Array, "B T"], segments: Segments
    ) -> Float[Array, "B T D"]:
        """Hidden states after the last norm, in the compute dtype. Those of padding mean nothing."""
        return self._run(tokens, positions, segments, None)[0]

    def extend(
        self, tokens: Int[Array, "B T"], positions: Int[Array, "B T"], segments: Segments, past: Past
    ) -> tuple[Float[Array, "B T D"], KeysValues]:
        """As a call, for tokens behind a past.

        Args:
          segments: labels of the M x P tokens in the past's pages, in their order, and then of these T.

        Returns hidden states, and the keys and values [L, B, T, K, E] of these tokens.
        """
        hidden, own = self._run(tokens, positions, segments, past)
        assert own is not None
        return hidden, own

    def _run(
        self, tokens: Array, positions: Array, segments: Segments, past: Past | None
    ) -> tuple[Array, KeysValues | None]:
        table = self.sharding.reshard(self.embedding[...], None, None).astype(self.config.compute_dtype)
        x = table.at[tokens].get(out_sharding=_spec_or_none(self.sharding, "batch", "length", "model"))
        rotation = rotary(positions, self.config.head_dim, self.config.rope_base)
        graph, weights = nnx.split(self.layers)

        def body(x: Array, layer: tuple[nnx.State, Array]) -> tuple[Array, KeysValues | None]:
            weights, number = layer
            before = None if past is None else _read(self.sharding, past, number)
            x, own = nnx.merge(graph, weights)(x, rotation, segments, before)
            return x, None if past is None else own

        layers = (weights, jnp.arange(self.config.layers))
        x, own = jax.lax.scan(jax.checkpoint(body) if self.config.remat else body, x, layers)
        return self.norm(x), own

    @property
    def head(self) -> Float[Array, "V D"]:
        """The output head, gathered, in the parameter dtype."""
        weight = self.embedding if self.untied_head is None else self.untied_head
        return self.sharding.reshard(weight[...], None, None)

    def logits(self, hidden: Float[Array, "*B D"]) -> Float[Array, "*B V"]:
        """float32, by a true float32 product."""
        return jnp.einsum(
            "...d,vd->...v",
            hidden.astype(jnp.float32),
            self.head.astype(jnp.float32),
            precision=jax.lax.Precision.HIGHEST,
        )


def rotary(positions: Int[Array, "B T"], head_dim: int, base: float) -> Float[Array, "B T 1 E"]:
    """Angles' cosines, then sines, float32, to turn each half of a head against the other."""
    frequencies = base ** (-jnp.arange(0, head_dim, 2, dtype=jnp.float32) / head_dim)
    angles = positions[..., None, None].astype(jnp.float32) * frequencies
    return jnp.concatenate([jnp.cos(angles), jnp.sin(angles)], -1)


def rotate(x: Float[Array, "B T H E"], rotation: Float[Array, "B T 1 E"]) -> Float[Array, "B T H E"]:
    """Rotary position embedding in the half-split layout that Hugging Face's Llama has."""
    cos, sin = jnp.split(rotation, 2, -1)
    first, second = jnp.split(x.astype(jnp.float32), 2, -1)
    return jnp.concatenate([first * cos - second * sin, second * cos + first * sin], -1).astype(x.dtype)


def gathered(sharding: Sharding, weight: Weight, dtype: jnp.dtype) -> Array:
    """A weight in the compute dtype, whole along the axis that is only split at rest."""
    axes = (None if axis == "weight" else axis for axis in weight.axes)
    return sharding.reshard(weight[...].astype(dtype), *axes)


def _weight(
    rngs: nnx.Rngs, config: ModelConfig, shape: tuple[int, ...], axes: tuple, fan_in: int, scale: float = 1.0
) -> Weight:
    values = jax.random.truncated_normal(rngs.params(), -3, 3, shape, config.param_dtype) * (scale * fan_in**-0.5)
    return Weight(values, axes=axes)


def _spec_or_none(sharding: Sharding, *axes: str | None) -> jax.P | None:
    return None if jax.sharding.get_abstract_mesh().empty else sharding.spec(*axes)


def _read(sharding: Sharding, past: Past, layer: Array) -> KeysValues:
    """One layer's keys and values [B, M * P, K, E] of the past."""
    B, M = past.pages.shape

    def read(pool: Array) -> Array:
        pages = pool.at[layer, past.pages].get(out_sharding=_spec_or_none(sharding, "batch", None, None, "heads", None))
        tokens = (B, M * pool.shape[2], *pool.shape[3:])
        return jnp.reshape(pages, tokens, out_sharding=_spec_or_none(sharding, "batch", None, "heads", None))

    return read(past.keys), read(past.values)


def _attend(sharding: Sharding, q: Array, k: Array, v: Array, segments: Segments) -> Array:
    """Attention on each device's own rows and heads."""

    def local(*args: Any) -> Array:
        return attention(*args)[0]

    if jax.sharding.get_abstract_mesh().empty:
        return local(q, k, v, segments)
    heads, rows = sharding.spec("batch", "length", "heads", None), sharding.spec("batch", "length")
    # check_vma: the kernels' loops start from plain zeros, which it would not let become device-varying.
    return jax.shard_map(local, in_specs=(heads, heads, heads, rows), out_specs=heads, check_vma=False)(
        q, k, v, segments
    )
