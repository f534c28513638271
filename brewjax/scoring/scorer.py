"""`Scorer`: prompts in, label probabilities out. The one path to a score, in evaluation and in serving."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding
from jaxtyping import Array, Float, Int

from brewjax.data.prompt import Prompt
from brewjax.data.tokenizer import Tokenizer
from brewjax.data.tokens import EncodedPrompt, HistoryLayout, encode
from brewjax.model.decoder import ModelConfig
from brewjax.model.params import Params, bind
from brewjax.model.sharding import MeshConfig
from brewjax.scoring.buckets import LABELS_IN_PASS, Pass, answers_in, plan_passes
from pallas_kernels.label_scores import label_log_probs
from pallas_kernels.segments import PADDING, Segments


class Scorer:
    """A model, its tokenizer, and compiled passes of a few lengths.

    Args:
      layout: how the model was trained to see history.
      buckets: row lengths of passes (see `choose_buckets`); a prompt longer than the largest takes several passes.
      mesh: the devices; each scores its own rows of a pass.
    """

    def __init__(
        self,
        model: ModelConfig,
        params: Params,
        tokenizer: Tokenizer,
        layout: HistoryLayout,
        buckets: Sequence[int],
        mesh: jax.sharding.Mesh | None = None,
    ):
        self.model, self.tokenizer, self.layout, self.buckets = model, tokenizer, layout, tuple(sorted(buckets))
        self._params, self._mesh = params, mesh or MeshConfig().build()
        self._rows = self._mesh.shape["data"] * self._mesh.shape["fsdp"]
        self._pass = jax.jit(self._log_probs)

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
            return encode(prompt, self.tokenizer, self.layout)
        except ValueError as error:
            raise ValueError(f"prompt {number}: {error}") from None

    def score_encoded(
        self, prompts: Sequence[EncodedPrompt], on_pass: Callable[[int], None] = lambda questions: None
    ) -> list[Float[np.ndarray, "Q L"]]:
        """As `score_many`, for prompts already encoded."""
        results = [np.empty((len(prompt.questions), len(prompt.labels)), np.float32) for prompt in prompts]
        passes = plan_passes(prompts, self.buckets)
        by_bucket: dict[int, list[Pass]] = {}
        for one in passes:
            by_bucket.setdefault(one.bucket, []).append(one)
        groups = [same[i : i + self._rows] for same in by_bucket.values() for i in range(0, len(same), self._rows)]
        running = None  # one group is computed by the device while the host prepares the next
        for group in [*groups, None]:
            started = (group, self._start(group)) if group else None
            if running:
                self._finish(*running, results)
                on_pass(sum(len(prompt.questions) for one in running[0] for _, _, prompt in one.parts))
            running = started
        return results

    def warm_up(self) -> None:
        """Compiles every bucket, so that no later request does."""
        for bucket in self.buckets:
            self._start([Pass(bucket, [])])

    def compilations(self) -> int:
        """How many different passes were compiled so far."""
        return self._pass._cache_size()  # type: ignore[attr-defined]

    def _start(self, group: list[Pass]) -> tuple[jax.Array, list[dict[int, int]]]:
        """Dispatches passes of one bucket, a row each.

        Returns log-probabilities [rows, answers, labels], and each row's column of each label token.
        """
        bucket, rows = group[0].bucket, self._rows
        fields = {name: np.zeros((rows, bucket), np.int32) for name in ("tokens", "positions", "segment", "reach")}
        example = np.full((rows, bucket), PADDING, np.int32)
        ends = np.zeros((rows, answers_in(bucket)), np.int32)
        labels = np.full((rows, LABELS_IN_PASS), -1, np.int32)
        columns: list[dict[int, int]] = [{} for _ in group]
        for row, one in enumerate(group):
            start = answered = 0
            for number, (_, _, prompt) in enumerate(one.parts, 1):
                stop = start + len(prompt)
                arrays = prompt.arrays()
                for name, field in fields.items():
                    field[row, start:stop] = arrays[name]
                example[row, start:stop] = number
                ends[row, answered : answered + len(prompt.questions)] = start + prompt.ends()
                for label in prompt.labels:
                    columns[row].setdefault(label, len(columns[row]))
                start, answered = stop, answered + len(prompt.questions)
            labels[row, : len(columns[row])] = list(columns[row])
        inputs = (fields["tokens"], fields["positions"], Segments(example, fields["segment"], fields["reach"]))
        sharding = NamedSharding(self._mesh, jax.P(("data", "fsdp"), None))
        with jax.set_mesh(self._mesh):
            return self._pass(self._params, *jax.device_put((*inputs, ends, labels), sharding)), columns

    def _log_probs(
        self,
        params: Params,
        tokens: Int[Array, "R T"],
        positions: Int[Array, "R T"],
        segments: Segments,
        ends: Int[Array, "R Q"],
        labels: Int[Array, "R L"],
    ) -> Float[Array, "R Q L"]:
        """float32 log-probabilities, among a row's label tokens, where the questions end."""
        decoder = bind(self.model, params)
        hidden = decoder(tokens, positions, segments)
        asked = jnp.take_along_axis(hidden, ends[..., None], 1)
        of_rows = jax.vmap(functools.partial(label_log_probs, against="labels"), (0, None, 0))
        batch, whole = decoder.sharding.spec("batch", None, None), jax.P(None, None)
        specs = (batch, whole, decoder.sharding.spec("batch", None))
        return jax.shard_map(of_rows, in_specs=specs, out_specs=batch, check_vma=False)(asked, decoder.head, labels)

    def _finish(
        self, group: list[Pass], started: tuple[jax.Array, list[dict[int, int]]], results: list[np.ndarray]
    ) -> None:
        log_probs, columns = np.asarray(started[0]), started[1]
        for row, one in enumerate(group):
            answered = 0
            for index, done, prompt in one.parts:
                count = len(prompt.questions)
                own = log_probs[row, answered : answered + count][:, [columns[row][label] for label in prompt.labels]]
                weights = np.exp(own - own.max(-1, keepdims=True))
                results[index][done : done + count] = weights / weights.sum(-1, keepdims=True)
                answered += count
