"""`Scorer`: prompts in, label probabilities out. The one path to a score, in evaluation and in serving."""

from __future__ import annotations

import functools
import time
from collections.abc import Callable, Sequence
from typing import Literal, NamedTuple, get_args

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import NamedSharding
from jaxtyping import Array, Float, Int

from brewjax.data.text.encode import EncodedPrompt, HistoryLayout, encode
from brewjax.data.text.prompt import Prompt
from brewjax.data.text.tokenizer import Tokenizer
from brewjax.model.decoder import KVCache, ModelConfig, PagedKVCache
from brewjax.model.params import Params, bind
from brewjax.model.sharding import BATCH_AXES, FSDP_TENSOR, MeshConfig, data_parallel_size
from brewjax.scoring.buckets import plan_passes
from brewjax.scoring.passes import LABELS_IN_PASS, NULL_PAGE, PAGE, Bucket, Chunk, Pass, PassInputs, build_inputs
from pallas_kernels.label_scores import label_log_probs
from pallas_kernels.token_labels import TokenLabels

NormalizeOver = Literal["labels", "vocabulary"]


class InFlight(NamedTuple):
    """Passes that the device computes: their rows, and log-probabilities [R, answers, LABELS_IN_PASS] to come."""

    passes: Sequence[Pass]
    rows: PassInputs
    log_probs: jax.Array


class Scorer:
    """A model, its tokenizer, and compiled passes of a few shapes.

    Args:
      layout: how the model was trained to see history.
      buckets: the shapes of passes (see `choose_buckets`); a prompt longer than the largest takes several passes.
      mesh: the devices; each along `data` and `fsdp` scores its own rows of a pass.
      cache_pages: pages of memory for the keys and values of prefixes, which passes may then fill and go on from;
        rows are then not spread over devices.
    """

    def __init__(
        self,
        model: ModelConfig,
        params: Params,
        tokenizer: Tokenizer,
        layout: HistoryLayout,
        buckets: Sequence[Bucket],
        mesh: jax.sharding.Mesh | None = None,
        cache_pages: int = 0,
    ):
        self.model, self.tokenizer, self.layout, self.buckets = model, tokenizer, layout, tuple(sorted(buckets))
        self.params, self._mesh, self._cache_pages = params, mesh or MeshConfig().build(), cache_pages
        self._rows = data_parallel_size(self._mesh)
        if cache_pages and self._rows > 1:
            raise ValueError(f"a cache of prefixes needs data=1 and fsdp=1, not a mesh of {dict(self._mesh.shape)}")
        self._pass = jax.jit(functools.partial(compute_pass, model), donate_argnums=1)
        self._head = jax.jit(functools.partial(score_labels, model), static_argnums=3)
        self.reset_cache()

    def reset_cache(self) -> None:
        """Makes the pool of cached pages anew."""
        shape = (self.model.layers, self._cache_pages, PAGE, self.model.kv_heads, self.model.head_dim)
        sharding = FSDP_TENSOR.named(self._mesh, shape, "layers", None, None, "heads", None)
        zeros = functools.partial(jnp.zeros, shape, self.model.compute_dtype, device=sharding)
        self._pool = (zeros(), zeros()) if self._cache_pages else None

    def score(self, prompt: Prompt) -> Float[np.ndarray, "Q L"]:
        """Probability of each label for each question, float32, in the order of the prompt."""
        return self.score_many([prompt])[0]

    def score_many(
        self, prompts: Sequence[Prompt], on_pass: Callable[[int], None] = lambda questions: None
    ) -> list[Float[np.ndarray, "Q L"]]:
        """As `score` for many prompts, packed together; `on_pass` hears how many questions each pass answered.

        Raises ValueError (which prompt, why) before anything is computed.
        """
        return self.score_encoded([self.encode(prompt, number) for number, prompt in enumerate(prompts)], on_pass)

    def encode(self, prompt: Prompt, number: int = 0) -> EncodedPrompt:
        """Tokens of a prompt; ValueError names it by its number where it cannot be scored."""
        try:
            if not prompt.questions:
                raise ValueError("no question")
            if len(prompt.labels) > LABELS_IN_PASS:
                raise ValueError(f"{len(prompt.labels)} labels; at most {LABELS_IN_PASS} are scored at once")
            encoded = encode(prompt, self.tokenizer, self.layout)
            self.model.check_length(encoded.context, "with one question it")
            return encoded
        except ValueError as error:
            raise ValueError(f"prompt {number}: {error}") from None

    def score_encoded(
        self, prompts: Sequence[EncodedPrompt], on_pass: Callable[[int], None] = lambda questions: None
    ) -> list[Float[np.ndarray, "Q L"]]:
        """As `score_many`, for prompts already encoded."""
        results = [np.empty((len(prompt.questions), len(prompt.labels)), np.float32) for prompt in prompts]
        by_bucket: dict[Bucket, list[Pass]] = {}
        for one in plan_passes(prompts, [bucket for bucket in self.buckets if not bucket.cached_pages]):
            by_bucket.setdefault(one.bucket, []).append(one)
        groups = [same[i : i + self._rows] for same in by_bucket.values() for i in range(0, len(same), self._rows)]
        running = None  # one group is computed by the device while the host prepares the next
        for group in [*groups, None]:
            started = self.dispatch(group) if group else None
            if running:
                for one, found in zip(running.passes, self.collect(running), strict=True):
                    for part, log_probs in zip(one.chunks, found, strict=True):
                        index, done = part.owner
                        results[index][done : done + len(log_probs)] = normalize_over_labels(log_probs)
                on_pass(sum(len(part.questions) for one in running.passes for part in one.chunks))
            running = started
        return results

    def dispatch(self, passes: Sequence[Pass], against: NormalizeOver = "labels") -> InFlight:
        """Dispatches passes of one bucket, at most one for each row of devices.

        What they store can be read by whatever is started after them.
        """
        rows = build_inputs(passes, self._rows)
        sharding = NamedSharding(self._mesh, jax.P(BATCH_AXES, None))
        with jax.set_mesh(self._mesh):
            inputs, labels = jax.device_put(((*rows[:4], rows.pages, rows.store), rows.labels), sharding)
            asked, self._pool = self._pass(self.params, self._pool, *inputs)
            return InFlight(passes, rows, self._head(self.params, asked, labels, against))

    def collect(self, running: InFlight) -> list[list[Float[np.ndarray, "Q L"]]]:
        """Waits; returns float32 log-probabilities of the prompt's labels, for the questions of each part of each pass.

        Of the whole vocabulary where they were started so; else up to a constant for each question (`among_labels`).
        """
        log_probs, results = np.asarray(multihost_utils.process_allgather(running.log_probs, tiled=True)), []
        for one, of_row, columns in zip(running.passes, log_probs, running.rows.columns, strict=False):
            ends = np.cumsum([len(part.questions) for part in one.chunks])
            results.append(
                [
                    of_row[end - len(part.questions) : end, [columns[label] for label in part.prompt.labels]]
                    for end, part in zip(ends, one.chunks, strict=True)
                ]
            )
        return results

    def warm_up(self) -> None:
        """Compiles every bucket, so that no later request does."""
        for bucket in self.buckets:
            for against in get_args(NormalizeOver) if self._cache_pages else ("labels",):
                self.dispatch([Pass(bucket, [])], against)

    def profile_buckets(self) -> dict[Bucket, float]:
        """Seconds that a full pass of each bucket takes: the quicker of two, half of it a prefix or all behind one."""
        seconds = {}
        for bucket in self.buckets:
            prefix = bucket.cached_pages * PAGE or bucket.tokens // 2
            items = (bucket.tokens - (0 if bucket.cached_pages else prefix)) // 16
            prompt = EncodedPrompt([[0] * prefix], [[0] * 16] * items, [0, 1], [None] * items, self.layout)
            start = prefix if bucket.cached_pages else 0
            part = Chunk(None, prompt, range(items), start, prefix, (NULL_PAGE,) * bucket.cached_pages)
            times = []
            for _ in range(2):
                began = time.perf_counter()
                self.collect(self.dispatch([Pass(bucket, [part])]))
                times.append(time.perf_counter() - began)
            seconds[bucket] = min(times)
        return seconds

    def compilations(self) -> int:
        """How many different passes were compiled so far."""
        return self._pass._cache_size() + self._head._cache_size()  # type: ignore[attr-defined]


def compute_pass(
    model: ModelConfig,
    params: Params,
    pool: KVCache | None,
    tokens: Int[Array, "R T"],
    positions: Int[Array, "R T"],
    token_labels: TokenLabels,
    ends: Int[Array, "R Q"],
    pages: Int[Array, "R M"],
    store: Int[Array, "R T/P"],
) -> tuple[Float[Array, "R Q D"], KVCache | None]:
    """Hidden states where the questions end, and the pool with what this pass stores."""
    decoder = bind(model, params)
    if pool is None:
        hidden = decoder(tokens, positions, token_labels)
    else:
        hidden, own = decoder.forward_with_cache(tokens, positions, token_labels, PagedKVCache(*pool, pages))
        in_pages = (len(pool[0]), store.shape[1], *pool[0].shape[2:])
        by_heads = decoder.sharding.spec("layers", None, None, "heads", None)
        keys, values = (jnp.reshape(new, in_pages, out_sharding=by_heads) for new in own)
        page = jnp.reshape(store, -1, out_sharding=jax.P(None))
        pool = pool[0].at[:, page].set(keys), pool[1].at[:, page].set(values)
    hidden = decoder.sharding.reshard(hidden, "batch", None, "model")
    return jnp.take_along_axis(hidden, ends[..., None], 1), pool


def score_labels(
    model: ModelConfig, params: Params, asked: Float[Array, "R Q D"], labels: Int[Array, "R L"], against: NormalizeOver
) -> Float[Array, "R Q L"]:
    """float32 log-probabilities of each row's label tokens."""
    decoder = bind(model, params)
    score = functools.partial(label_log_probs, normalize_over=against, logits_dtype=model.head.logits)
    of_rows = jax.vmap(score, (0, None, 0))
    batch, whole = decoder.sharding.spec("batch", None, None), jax.P(None, None)
    specs = (batch, whole, decoder.sharding.spec("batch", None))
    return jax.shard_map(of_rows, in_specs=specs, out_specs=batch, check_vma=False)(
        decoder.cast_for_head(asked), decoder.lm_head, labels
    )


def normalize_over_labels(log_probs: Float[np.ndarray, "Q L"]) -> Float[np.ndarray, "Q L"]:
    """Probabilities that add up to one over the labels, float32."""
    weights = np.exp(log_probs - log_probs.max(-1, keepdims=True))
    return weights / weights.sum(-1, keepdims=True)
