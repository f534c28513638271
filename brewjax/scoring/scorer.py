"""`Scorer`: prompts in, label probabilities out. Evaluation and serving share this one path to a score."""

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
from brewjax.model.params import Params, bind, prepare_for_inference
from brewjax.model.sharding import BATCH_AXES, FSDP_TENSOR, MeshConfig, data_parallel_size
from brewjax.scoring.buckets import plan_passes
from brewjax.scoring.passes import LABELS_IN_PASS, NULL_PAGE, PAGE, Bucket, Chunk, Pass, PassInputs, build_inputs
from pallas_kernels.label_scores import label_log_probs
from pallas_kernels.token_labels import TokenLabels

NormalizeOver = Literal["labels", "vocabulary"]  # the tokens over which probabilities add up to one


class InFlight(NamedTuple):
    """Passes that the device computes.

    Attributes:
      passes: one for each row that is not padding.
      inputs: the arrays of the passes.
      log_probs: float32 [R, Q, LABELS_IN_PASS], still being computed; over the vocabulary Q is the first of the
        bucket's `head_sizes` with room for all questions.
    """

    passes: Sequence[Pass]
    inputs: PassInputs
    log_probs: jax.Array


class Scorer:
    """A model, its tokenizer, and compiled passes of a few shapes.

        >>> scorer = Scorer(bundle.model, bundle.params, bundle.tokenizer, "dense", [Bucket(256), Bucket(4096)])
        >>> prompt = Prompt("Member: a nurse. ", (), (Question("Job: Cook. Applies? "),), labels=("Yes", "No"))
        >>> scorer.score_many([prompt, prompt])[1].shape  # probabilities [questions, labels] of the second prompt
        (1, 2)

    Args:
      model: sizes of the model.
      params: its parameters, on the devices of `mesh`.
      tokenizer: encodes prompts.
      layout: how history tokens attend to each other, as in training.
      buckets: the shapes of passes (see `choose_buckets`); a prompt longer than the largest takes several passes.
      mesh: the devices; each along `data` and `fsdp` scores its own rows. All devices by default.
      cache_pages: pages of memory for the keys and values of prefixes, which passes may then write and read. Needs a
        mesh with `data` and `fsdp` of 1, because every row reads the same pages.

    Raises:
      ValueError: for a cache on a mesh that splits rows.
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
        self._head = jax.jit(functools.partial(_score_first, model), static_argnums=(3, 4))
        self.reset_cache()

    @property
    def params(self) -> Params:
        """The parameters that passes compute with: those that were set, rounded for products."""
        return self._params

    @params.setter
    def params(self, params: Params) -> None:
        self._params = prepare_for_inference(params)

    def reset_cache(self) -> None:
        """Allocates the pool of cached pages anew, in place of one that a failed pass took with it."""
        shape = (self.model.layers, self._cache_pages, PAGE, self.model.kv_heads, self.model.head_dim)
        sharding = FSDP_TENSOR.named(self._mesh, shape, "layers", None, None, "heads", None)
        zeros = functools.partial(jnp.zeros, shape, self.model.compute_dtype, device=sharding)
        self._pool = (zeros(), zeros()) if self._cache_pages else None

    def score(self, prompt: Prompt) -> Float[np.ndarray, "Q L"]:
        """Scores the questions of one prompt.

        Args:
          prompt: with one question or more.

        Returns:
          The probability of each label for each question, float32 [questions, labels], in the order of the prompt.

        Raises:
          ValueError: as `encode`.
        """
        return self.score_many([prompt])[0]

    def score_many(
        self, prompts: Sequence[Prompt], on_pass: Callable[[int], None] = lambda questions: None
    ) -> list[Float[np.ndarray, "Q L"]]:
        """Scores many prompts, packed together.

        Args:
          prompts: to score, in any order of lengths.
          on_pass: called after each pass with the number of questions that it scored.

        Returns:
          For each prompt, as `score`.

        Raises:
          ValueError: naming the prompt and the reason, before anything is computed.
        """
        return self.score_encoded([self.encode(prompt, index) for index, prompt in enumerate(prompts)], on_pass)

    def encode(self, prompt: Prompt, index: int = 0) -> EncodedPrompt:
        """Tokenizes a prompt.

        Args:
          prompt: with one question or more.
          index: of the prompt among others, for errors.

        Returns:
          Its tokens, in this scorer's layout.

        Raises:
          ValueError: the prompt cannot be scored: no question, too many labels, a label word of several tokens, or more
            tokens than the model reads. Names the prompt by its index.
        """
        try:
            if not prompt.questions:
                raise ValueError("no question")
            if len(prompt.labels) > LABELS_IN_PASS:
                raise ValueError(f"{len(prompt.labels)} labels; at most {LABELS_IN_PASS} are scored at once")
            encoded = encode(prompt, self.tokenizer, self.layout)
            self.model.check_length(encoded.context, "with one question it")
            return encoded
        except ValueError as error:
            raise ValueError(f"prompt {index}: {error}") from None

    def score_encoded(
        self, prompts: Sequence[EncodedPrompt], on_pass: Callable[[int], None] = lambda questions: None
    ) -> list[Float[np.ndarray, "Q L"]]:
        """As `score_many`, for prompts that are encoded already.

        Args:
          prompts: as `encode` returns them.
          on_pass: called after each pass with the number of questions that it scored.

        Returns:
          For each prompt, as `score`.

        Raises:
          ValueError: not even one question of a prompt fits into the largest bucket; names the prompt by its index.
        """
        results = [np.empty((len(prompt.questions), len(prompt.labels)), np.float32) for prompt in prompts]
        passes_by_bucket: dict[Bucket, list[Pass]] = {}
        for pass_ in plan_passes(prompts, [bucket for bucket in self.buckets if not bucket.cached_pages]):
            passes_by_bucket.setdefault(pass_.bucket, []).append(pass_)
        groups = [
            passes[start : start + self._rows]
            for passes in passes_by_bucket.values()
            for start in range(0, len(passes), self._rows)
        ]
        running = None  # the device computes one group while the host prepares the next
        for group in [*groups, None]:
            following = self.dispatch(group) if group else None
            if running:
                for pass_, chunk_log_probs in zip(running.passes, self.collect(running), strict=True):
                    for chunk, log_probs in zip(pass_.chunks, chunk_log_probs, strict=True):
                        index, first_question = chunk.owner
                        stop = first_question + len(log_probs)
                        temperature = chunk.prompt.temperature
                        results[index][first_question:stop] = normalize_over_labels(log_probs, temperature)
                on_pass(sum(pass_.num_questions for pass_ in running.passes))
            running = following
        return results

    def dispatch(self, passes: Sequence[Pass], normalize_over: NormalizeOver = "labels") -> InFlight:
        """Starts passes on the devices without waiting for them. Later passes can read the pages that these write.

        Args:
          passes: of one bucket, at most one for each row.
          normalize_over: what `collect` returns probabilities of.

        Returns:
          The passes, for `collect`.
        """
        num_questions = max(pass_.num_questions for pass_ in passes)
        size = next(size for size in _head_sizes(passes[0].bucket, normalize_over) if size >= num_questions)
        with jax.set_mesh(self._mesh):
            inputs, hidden, labels = self._compute(passes)
            return InFlight(passes, inputs, self._head(self.params, hidden, labels, normalize_over, size))

    def _compute(self, passes: Sequence[Pass]) -> tuple[PassInputs, Float[Array, "R Q D"], Int[Array, "R L"]]:
        """Starts passes, without the head: their arrays, the hidden states of their questions, and the labels."""
        inputs = build_inputs(passes, self._rows)
        row_inputs = (*inputs[:4], inputs.cached_pages, inputs.new_pages)
        sharding = NamedSharding(self._mesh, jax.P(BATCH_AXES, None))
        row_inputs, labels = jax.device_put((row_inputs, inputs.labels), sharding)
        hidden, self._pool = self._pass(self.params, self._pool, *row_inputs)
        return inputs, hidden, labels

    def collect(self, running: InFlight) -> list[list[Float[np.ndarray, "Q L"]]]:
        """Waits for dispatched passes.

        Args:
          running: as `dispatch` returned them.

        Returns:
          For each chunk of each pass, float32 log-probabilities [questions, labels of the prompt]: over the vocabulary
          if they were dispatched so, else up to a constant per question, which `normalize_over_labels` removes.
        """
        log_probs = np.asarray(multihost_utils.process_allgather(running.log_probs, tiled=True))
        results = []
        for pass_, row_log_probs, columns in zip(running.passes, log_probs, running.inputs.label_columns, strict=False):
            ends = np.cumsum([len(chunk.questions) for chunk in pass_.chunks])
            results.append(
                [
                    row_log_probs[end - len(chunk.questions) : end, [columns[label] for label in chunk.prompt.labels]]
                    for end, chunk in zip(ends, pass_.chunks, strict=True)
                ]
            )
        return results

    def warm_up(self) -> None:
        """Compiles every bucket and its heads, so that no later request does."""
        with jax.set_mesh(self._mesh):
            for bucket in self.buckets:
                _, hidden, labels = self._compute([Pass(bucket, [])])
                for normalize_over in get_args(NormalizeOver) if self._cache_pages else ("labels",):
                    for size in _head_sizes(bucket, normalize_over):
                        self._head(self.params, hidden, labels, normalize_over, size)

    def profile_buckets(self) -> dict[Bucket, float]:
        """Measures a full pass of each bucket twice.

        A row without cached pages is half prefix, half questions; a row with cached pages has questions only.

        Returns:
          The seconds of the faster one.
        """
        seconds = {}
        for bucket in self.buckets:
            prefix = bucket.cached_pages * PAGE or bucket.tokens // 2
            items = (bucket.tokens - (0 if bucket.cached_pages else prefix)) // 16
            prompt = EncodedPrompt([[0] * prefix], [[0] * 16] * items, [0, 1], [None] * items, self.layout)
            start = prefix if bucket.cached_pages else 0
            chunk = Chunk(None, prompt, range(items), start, prefix, (NULL_PAGE,) * bucket.cached_pages)
            times = []
            for _ in range(2):
                start_time = time.perf_counter()
                self.collect(self.dispatch([Pass(bucket, [chunk])]))
                times.append(time.perf_counter() - start_time)
            seconds[bucket] = min(times)
        return seconds

    def compilations(self) -> int:
        """Counts the programs that were compiled so far.

        Returns:
          The number; a server's must not grow after its warm-up.
        """
        return self._pass._cache_size() + self._head._cache_size()  # type: ignore[attr-defined]


def compute_pass(
    model: ModelConfig,
    params: Params,
    pool: KVCache | None,
    tokens: Int[Array, "R T"],
    positions: Int[Array, "R T"],
    token_labels: TokenLabels,
    ends: Int[Array, "R Q"],
    cached_pages: Int[Array, "R M"],
    new_pages: Int[Array, "R T/P"],
) -> tuple[Float[Array, "R Q D"], KVCache | None]:
    """Computes a pass: R rows of T tokens, Q candidates, M cached pages, P tokens in a page.

    Args:
      model: the shape of the decoder.
      params: its parameters.
      pool: keys and values by page; None without a cache.
      tokens, positions, token_labels, ends, cached_pages, new_pages: as in `PassInputs`.

    Returns:
      Hidden states of the questions' last tokens, and the pool with the pages that this pass writes.
    """
    decoder = bind(model, params)
    if pool is None:
        hidden = decoder(tokens, positions, token_labels)
    else:
        cache = PagedKVCache(*pool, cached_pages)
        hidden, new_kv = decoder.forward_with_cache(tokens, positions, token_labels, cache)
        page_shape = (len(pool[0]), new_pages.shape[1], *pool[0].shape[2:])
        head_spec = decoder.sharding.spec("layers", None, None, "heads", None)
        keys, values = (jnp.reshape(array, page_shape, out_sharding=head_spec) for array in new_kv)
        page = jnp.reshape(new_pages, -1, out_sharding=jax.P(None))
        pool = pool[0].at[:, page].set(keys), pool[1].at[:, page].set(values)
    hidden = decoder.sharding.reshard(hidden, "batch", None, "model")
    return jnp.take_along_axis(hidden, ends[..., None], 1), pool


def score_labels(
    model: ModelConfig,
    params: Params,
    hidden: Float[Array, "R Q D"],
    labels: Int[Array, "R L"],
    normalize_over: NormalizeOver,
) -> Float[Array, "R Q L"]:
    """Scores labels by the head.

    Args:
      model: the shape of the decoder.
      params: its parameters.
      hidden: states of the questions' last tokens.
      labels: token ids of each row's labels; -1 is padding.
      normalize_over: "labels" leaves a constant per question out, "vocabulary" does not.

    Returns:
      float32 log-probabilities.
    """
    decoder = bind(model, params)
    vocabulary = decoder.sharding.rules["vocab"]
    score = functools.partial(
        label_log_probs,
        normalize_over=normalize_over,
        logits_dtype=model.head.logits,
        vocabulary_over=vocabulary,
        parts=model.head.parts,
    )
    batch = decoder.sharding.spec("batch", None, None)
    specs = (batch, decoder.sharding.spec("vocab", None), decoder.sharding.spec("batch", None))
    return jax.shard_map(score, in_specs=specs, out_specs=batch, check_vma=False)(
        decoder.cast_for_head(hidden), decoder.gather_head("vocab"), labels
    )


def _score_first(
    model: ModelConfig, params: Params, hidden: Array, labels: Array, normalize_over: NormalizeOver, size: int
) -> Float[Array, "R Q L"]:
    """`score_labels` of the first questions, as many as `size`."""
    return score_labels(model, params, hidden[:, :size], labels, normalize_over)


def _head_sizes(bucket: Bucket, normalize_over: NormalizeOver) -> tuple[int, ...]:
    """Questions that heads are compiled for; over the labels a head is hardly any work, and one is enough."""
    return bucket.head_sizes if normalize_over == "vocabulary" else (bucket.max_candidates,)


def normalize_over_labels(log_probs: Float[np.ndarray, "Q L"], temperature: float = 1.0) -> Float[np.ndarray, "Q L"]:
    """Softmax over the labels of each question.

    Args:
      log_probs: log-probabilities of the label words, over the vocabulary or up to a constant for each question.
      temperature: that they are divided by; above 0.

    Returns:
      float32 probabilities, which add up to one for each question.
    """
    weights = np.exp((log_probs - log_probs.max(-1, keepdims=True)) / np.float32(temperature))
    return weights / weights.sum(-1, keepdims=True)
