"""Text generation: each slot of a KV cache holds a sequence, and every step adds a token to all of them.

`prefill`, `insert`, `step` and `sample` are pure functions of arrays; a `Generator` compiles them for one model.

Axis letters: N slots, S tokens of a slot, T tokens of a prompt, L layers, K key-value heads, E size of a head,
V vocabulary (docs/glossary.md, "Axis letters").
"""

from __future__ import annotations

from collections import deque
from collections.abc import Collection, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pydantic
from jax.sharding import Mesh
from jaxtyping import Array, Float, Int

from brewjax.config import Config
from brewjax.model.config import ModelConfig
from brewjax.model.decoder import Decoder, KVCache, PagedKVCache
from brewjax.model.params import Params, abstract_params, bind, prepare_for_inference
from brewjax.model.sharding import FSDP_TENSOR, MeshConfig
from pallas_kernels.token_labels import ALL, PADDING, TokenLabels

SHORTEST_BUCKET = 64  # tokens
KV_AXES = (None, None, None, "heads", None)  # axis names of the keys and values of slots


class SamplingParams(Config):
    """How the next token is sampled."""

    temperature: float = pydantic.Field(default=0.0, ge=0)
    """Divides the logits; 0 takes the likeliest token."""
    top_k: int = pydantic.Field(default=0, ge=0)
    """Samples from the k likeliest tokens only; 0 for all tokens."""


class Prefix(NamedTuple):
    """The KV cache of one sequence.

    Attributes:
      keys, values: of its tokens, then of padding; in the compute dtype.
      length: tokens of the sequence.
      last: its last token, which the next step reads again to predict the one that follows.
    """

    keys: Float[Array, "L T K E"]
    values: Float[Array, "L T K E"]
    length: Int[Array, ""]
    last: Int[Array, ""]


class DecodeState(NamedTuple):
    """N growing sequences of at most S tokens.

    Attributes:
      keys, values: of the tokens read so far; undefined behind them.
      lengths: tokens read.
      tokens: the next token to read, of each sequence.
      num_sampled: tokens sampled in each slot since a sequence was inserted there.
      key: random key of the next steps.
    """

    keys: Float[Array, "L N S K E"]
    values: Float[Array, "L N S K E"]
    lengths: Int[Array, " N"]
    tokens: Int[Array, " N"]
    num_sampled: Int[Array, " N"]
    key: Array


def prefill(decoder: Decoder, tokens: Int[Array, " T"], length: Int[Array, ""], prefix: Prefix | None = None) -> Prefix:
    """Computes the KV cache of a prompt.

    Args:
      decoder: the model.
      tokens: the prompt, then padding.
      length: tokens of the prompt, at least 1.
      prefix: a sequence that the prompt continues.

    Returns:
      The whole sequence, prefix included.
    """
    T = tokens.shape[0]
    real = jnp.arange(T) < length
    if prefix is None:
        config = decoder.config
        start = jnp.int32(0)
        nothing = jnp.zeros((config.layers, 1, 1, config.kv_heads, config.head_dim), config.compute_dtype)
        cache = PagedKVCache(nothing, nothing, jnp.zeros((1, 0), jnp.int32))
    else:
        start = prefix.length
        real = jnp.concatenate([jnp.arange(prefix.keys.shape[1]) < start, real])
        cache = PagedKVCache(prefix.keys[:, None], prefix.values[:, None], jnp.zeros((1, 1), jnp.int32))
    _, new_kv = _read(decoder, tokens[None], start + jnp.arange(T)[None], real[None], cache)
    keys, values = (x[:, 0] for x in new_kv)
    if prefix is not None:
        room = ((0, 0), (0, T), (0, 0), (0, 0))
        keys, values = (
            jax.lax.dynamic_update_slice_in_dim(jnp.pad(old, room), new, start, 1)
            for old, new in ((prefix.keys, keys), (prefix.values, values))
        )
    return Prefix(keys, values, start + length, tokens[length - 1])


def insert(state: DecodeState, prefix: Prefix, slot: Int[Array, ""]) -> DecodeState:
    """Puts a sequence into a slot, in place of the slot's sequence."""
    S = state.keys.shape[2]
    keys, values = (
        jax.lax.dynamic_update_slice(old, new[:, None, :S], (0, slot, 0, 0, 0))
        for old, new in ((state.keys, prefix.keys), (state.values, prefix.values))
    )
    lengths, tokens, num_sampled = (
        old.at[slot].set(new)
        for old, new in ((state.lengths, prefix.length - 1), (state.tokens, prefix.last), (state.num_sampled, 0))
    )
    return DecodeState(keys, values, lengths, tokens, num_sampled, state.key)


def step(decoder: Decoder, state: DecodeState, sampling: SamplingParams) -> tuple[DecodeState, Int[Array, " N"]]:
    """Reads a token in every slot and samples the next one; the tokens of full and of empty slots are undefined."""
    N, S = state.keys.shape[1:3]
    real = jnp.arange(S + 1) < state.lengths[:, None]
    cache = PagedKVCache(state.keys, state.values, jnp.arange(N)[:, None])
    hidden, new_kv = _read(decoder, state.tokens[:, None], state.lengths[:, None], real.at[:, S].set(True), cache)
    key, sample_key = jax.random.split(state.key)
    tokens = decoder.sharding.reshard(sample(decoder.logits(hidden[:, 0]), sample_key, sampling), None)
    rows = jnp.arange(N)
    keys, values = (
        old.at[:, rows, state.lengths].set(decoder.sharding.reshard(new[:, :, 0], *KV_AXES[1:]), mode="drop")
        for old, new in zip((state.keys, state.values), new_kv, strict=True)
    )
    return DecodeState(keys, values, jnp.minimum(state.lengths + 1, S), tokens, state.num_sampled + 1, key), tokens


def sample(logits: Float[Array, "N V"], key: Array, sampling: SamplingParams) -> Int[Array, " N"]:
    """Samples a token for each row of logits."""
    if not sampling.temperature:
        return jnp.argmax(logits, -1).astype(jnp.int32)
    if sampling.top_k:
        threshold = jax.lax.top_k(logits, min(sampling.top_k, logits.shape[-1]))[0][:, -1:]
        logits = jnp.where(logits < threshold, -jnp.inf, logits)
    return jax.random.categorical(key, logits / sampling.temperature).astype(jnp.int32)


class Generator:
    """A model compiled for generation.

    Only the `tensor` axis of the mesh is used: one token at a time is too little work to split otherwise.

    Args:
      model: its shape.
      params: its parameters.
      slots: sequences that grow at the same time.
      context: limit of the tokens of a sequence, prompt included.
      sampling: how tokens are sampled; by default the likeliest is taken.
      seed: of the sampling.
      mesh: devices; by default all.
    """

    def __init__(
        self,
        model: ModelConfig,
        params: Params,
        slots: int,
        context: int,
        sampling: SamplingParams | None = None,
        seed: int = 0,
        mesh: Mesh | None = None,
    ):
        self.model, self.count, self.context = model, slots, context
        mesh = mesh or MeshConfig().build()
        replica = tuple(slice(None if axis == "tensor" else 1) for axis in mesh.axis_names)
        self.mesh = Mesh(mesh.devices[replica], mesh.axis_names, axis_types=mesh.axis_types)
        self.params = self.shard_params(params)
        self.buckets = _buckets(context)
        shape = (model.layers, slots, context, model.kv_heads, model.head_dim)

        def empty() -> DecodeState:
            zeros = jnp.zeros(slots, jnp.int32)
            keys, values = (FSDP_TENSOR.reshard(jnp.zeros(shape, model.compute_dtype), *KV_AXES) for _ in range(2))
            return DecodeState(keys, values, zeros, zeros, zeros, jax.random.key(seed))

        sampling_params = sampling or SamplingParams()
        self._empty = jax.jit(empty)
        self._prefill = jax.jit(lambda params, *args: prefill(bind(model, params), *args))
        self._insert = jax.jit(lambda *args: insert(*args), donate_argnums=0)  # not shared: compilations are counted
        self._step = jax.jit(lambda params, state: step(bind(model, params), state, sampling_params), donate_argnums=1)

    def shard_params(self, params: Params) -> Params:
        """Lays parameters out on the generator's devices, rounded for its products.

        Args:
          params: of this model.

        Returns:
          The parameters, to assign to `params`.
        """
        shardings = jax.tree.map(lambda leaf: leaf.sharding, abstract_params(self.model, self.mesh))
        return prepare_for_inference(jax.device_put(params, shardings))

    def slots(self) -> DecodeState:
        """Makes a state with empty slots.

        Returns:
          The state, for `insert` and `step`.
        """
        with jax.set_mesh(self.mesh):
            return self._empty()

    def pad(self, tokens: Sequence[int]) -> Int[np.ndarray, " T"]:
        """Pads tokens to the smallest bucket that holds them.

        Args:
          tokens: of a prompt, or of a piece of one.

        Returns:
          int32 [bucket].

        Raises:
          ValueError: if there are no tokens, or more than `context`.
        """
        if not 0 < len(tokens) <= self.context:
            raise ValueError(f"a sequence of {len(tokens)} tokens; 1 to {self.context} can be read")
        bucket = next(bucket for bucket in self.buckets if bucket >= len(tokens))
        return np.pad(np.asarray(tokens, np.int32), (0, bucket - len(tokens)))

    def prefill(self, padded: Int[np.ndarray, " T"], length: int, prefix: Prefix | None = None) -> Prefix:
        """Computes the cache of a prompt, or of a piece behind those before it (see the function of that name).

        Args:
          padded: as `pad` returns it.
          length: how many tokens of it are real.
          prefix: of the pieces before; None for the first.

        Returns:
          The cache with the first sampled token, for `insert`.
        """
        with jax.set_mesh(self.mesh):
            return self._prefill(self.params, padded, np.int32(length), prefix)

    def insert(self, state: DecodeState, prefix: Prefix, slot: int) -> DecodeState:
        """Puts a prompt's cache into a slot (see the function of that name).

        Args:
          state: is used up.
          prefix: as `prefill` returns it.
          slot: index of an empty slot.

        Returns:
          The next state.
        """
        with jax.set_mesh(self.mesh):
            return self._insert(state, prefix, np.int32(slot))

    def step(self, state: DecodeState) -> tuple[DecodeState, Int[Array, " N"]]:
        """Generates a token in every slot (see the function of that name).

        Args:
          state: is used up.

        Returns:
          The next state, and a token for each slot; those of empty slots are undefined.
        """
        with jax.set_mesh(self.mesh):
            return self._step(self.params, state)

    def warm_up(self) -> None:
        """Compiles every shape of sequences without a prefix, so that later calls compile nothing."""
        for bucket in self.buckets:
            prefix, state = self.prefill(np.zeros(bucket, np.int32), bucket), self.slots()
            for _ in range(2):  # over several devices, jit's cache distinguishes arrays by the program that made them
                state = self.insert(self.insert(state, prefix, 0), prefix, 0)
                state, _ = self.step(self.step(state)[0])
        jax.block_until_ready(state)

    def compilations(self) -> int:
        """Counts the shapes that were compiled so far.

        Returns:
          The number; a server's must not grow after its warm-up.
        """
        functions = (self._empty, self._prefill, self._insert, self._step)
        return sum(function._cache_size() for function in functions)  # type: ignore[attr-defined]

    def generate(
        self, prompts: Sequence[Sequence[int]], max_tokens: int, stop: Collection[int] = ()
    ) -> list[list[int]]:
        """Generates a continuation of each prompt.

        Args:
          prompts: token ids.
          max_tokens: limit of new tokens.
          stop: token ids that end a continuation, and are not part of it.

        Returns:
          The new tokens of each prompt.

        Raises:
          ValueError: if a prompt and `max_tokens` exceed the context.
        """
        for index, prompt in enumerate(prompts):
            if len(prompt) + max_tokens > self.context:
                raise ValueError(
                    f"prompt {index}: {len(prompt)} tokens and {max_tokens} more do not fit {self.context}"
                )
        outputs: list[list[int]] = [[] for _ in prompts]
        waiting = deque(range(len(prompts) if max_tokens > 0 else 0))
        running: dict[int, int] = {}
        state = self.slots()
        while waiting or running:
            for slot in [slot for slot in range(self.count) if slot not in running][: len(waiting)]:
                running[slot] = waiting.popleft()
                prompt = prompts[running[slot]]
                state = self.insert(state, self.prefill(self.pad(prompt), len(prompt)), slot)
            state, sampled = self.step(state)
            for slot, token in enumerate(np.asarray(sampled).tolist()):
                if slot in running:
                    text = outputs[running[slot]]
                    if token not in stop:
                        text.append(token)
                    if token in stop or len(text) == max_tokens:
                        del running[slot]
        return outputs


def _read(decoder: Decoder, tokens: Array, positions: Array, real: Array, cache: PagedKVCache) -> tuple[Array, KVCache]:
    """`Decoder.forward_with_cache` for plain text: every `real` token attends to all tokens before it."""
    token_labels = TokenLabels(jnp.where(real, 1, PADDING), jnp.zeros(real.shape, jnp.int32), jnp.full(real.shape, ALL))
    tokens, positions, token_labels = jax.tree.map(
        lambda x: decoder.sharding.reshard(x, "batch", "length"), (tokens, positions, token_labels)
    )
    return decoder.forward_with_cache(tokens, positions, token_labels, cache)


def _buckets(context: int) -> tuple[int, ...]:
    """Lengths that prompts are padded to: powers of two times the shortest, then the context."""
    buckets = [min(SHORTEST_BUCKET, context)]
    while buckets[-1] < context:
        buckets.append(min(2 * buckets[-1], context))
    return tuple(buckets)
