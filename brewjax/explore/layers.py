"""Inside the model: the label's log-odds after every layer (logit lens), and which pieces the question attends to.

A look, not a reason: what a middle layer would answer is only what the head makes of it, and attention to a piece does
not say that it matters. `why` says what matters.
"""

from __future__ import annotations

import dataclasses
import functools
from typing import TYPE_CHECKING, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from brewjax.data.text.encode import EncodedPrompt
from brewjax.explore.reasons import log_odds
from brewjax.model.config import ModelConfig
from brewjax.model.params import Params, bind
from brewjax.model.rope import rotary
from pallas_kernels.label_scores import label_log_probs
from pallas_kernels.token_labels import MASKED, PADDING, TokenLabels, dense_mask

if TYPE_CHECKING:
    import pandas as pd

    from brewjax.explore.context import Context
    from brewjax.explore.plots import Plot

STEP = 128  # rows are padded to multiples of it, so that prompts of about one length share a program


@dataclasses.dataclass(frozen=True, repr=False)
class Layers:
    """One question, layer by layer.

    Attributes:
      title, label: the item, and the label word whose log-odds are meant.
      log_odds: float64 [layers + 1], as the last norm and the head read the residual stream: before the first layer,
        then after each. The last one is the score.
      attention: float32 [layers, heads, pieces], attention of the question's last token, by the piece it goes to; the
        question itself is the last piece. Adds up to 1 over pieces.
      pieces: a name of each piece.
    """

    title: str
    label: str
    log_odds: np.ndarray
    attention: np.ndarray
    pieces: tuple[str, ...]

    def table(self) -> pd.DataFrame:
        """Attention by piece and layer, the mean over heads; the pieces that get most of it first."""
        import pandas as pd

        mean = self.attention.mean(1)
        columns = {f"layer {layer + 1}": mean[layer] for layer in range(len(mean))}
        table = pd.DataFrame({"piece": self.pieces, **columns})
        return table.iloc[np.argsort(-mean.mean(0), kind="stable")].reset_index(drop=True)

    def heads(self, layer: int) -> pd.DataFrame:
        """Attention by piece and head in a layer, from 1; the pieces that get most of it first."""
        import pandas as pd

        weights = self.attention[layer - 1]
        columns = {f"head {head + 1}": weights[head] for head in range(len(weights))}
        table = pd.DataFrame({"piece": self.pieces, **columns})
        return table.iloc[np.argsort(-weights.mean(0), kind="stable")].reset_index(drop=True)

    def plot(self) -> Plot:
        """The log-odds after each layer."""
        from brewjax.explore.plots import plot_bars

        names = ["before the first layer", *(f"after layer {n}" for n in range(1, len(self.log_odds)))]
        return plot_bars(self.title, f"log-odds of “{self.label}” by the last head", names, self.log_odds, 0.0)

    def __repr__(self) -> str:
        odds = ", ".join(f"{value:+.2f}" for value in self.log_odds)
        return f"'{self.label}' for {self.title}, by layer: {odds}\n{self.table().head(8)}"

    def _repr_html_(self) -> str:
        odds = ", ".join(f"{value:+.2f}" for value in self.log_odds)
        return f"<p>'{self.label}', by layer: {odds}</p>{self.table().head(12)._repr_html_()}"  # type: ignore[operator]


class _Reading(NamedTuple):
    """What one forward call gives: of the labels [layers + 1, labels], and of the question [layers, heads, T]."""

    log_probs: Array
    attention: Array


def read_layers(context: Context, item: str | int) -> Layers:
    """Reads the question about a candidate layer by layer.

    Args:
      context: the member, the task and the candidates.
      item: the id of a candidate.

    Raises:
      ValueError: the item is not a candidate.
    """
    index = context.find(item)
    base = dataclasses.replace(context.text, questions=(context.text.questions[index],))
    encoded = context.bundle.encode(base)
    params = jax.device_get(context.bundle.params)  # without their mesh: one row has nothing to split over it
    reading = _read(context.bundle.model, params, *_pad(encoded), jnp.asarray(encoded.labels))
    pieces = np.array(encoded.arrays["piece_id"])
    attention = np.asarray(reading.attention)[..., : len(pieces)]
    by_piece = np.stack([attention[..., pieces == piece].sum(-1) for piece in range(pieces.max() + 1)], -1)
    names = ["preamble", *(event.strip() for event in base.events), "the question"]
    probabilities = np.exp(np.asarray(reading.log_probs, np.float64))
    return Layers(
        context.titles[index],
        context.task.words[context.top_label],
        log_odds(probabilities, context.top_label),
        by_piece,
        tuple(names),
    )


def _pad(prompt: EncodedPrompt) -> tuple[np.ndarray, np.ndarray, TokenLabels, np.int32]:
    """Tokens, positions and labels [1, T] of a prompt with one question, and the index of its last token."""
    arrays, length = prompt.arrays, -(-len(prompt) // STEP) * STEP
    row = {name: np.zeros((1, length), np.int32) for name in ("tokens", "positions", "piece_id", "visibility")}
    for name, padded in row.items():
        padded[0, : len(prompt)] = arrays[name]
    example_id = np.full((1, length), PADDING, np.int32)
    example_id[0, : len(prompt)] = 1
    labels = TokenLabels(example_id, row["piece_id"], row["visibility"])
    return row["tokens"], row["positions"], labels, np.int32(len(prompt) - 1)


@functools.partial(jax.jit, static_argnums=0)
def _read(
    model: ModelConfig,
    params: Params,
    tokens: Int[Array, "1 T"],
    positions: Int[Array, "1 T"],
    token_labels: TokenLabels,
    last: Int[Array, ""],
    labels: Int[Array, " L"],
) -> _Reading:
    decoder = bind(model, params)
    _, _, after = decoder.forward_with_hidden_states(tokens, positions, token_labels)
    streams = jnp.concatenate([decoder.embed(tokens)[None], after])  # [layers + 1, 1, T, D]
    hidden = decoder.cast_for_head(decoder.norm(streams[:, 0, last]))
    log_probs = label_log_probs(hidden, decoder.lm_head, labels, "labels", logits_dtype=model.head.logits)
    rotation, index = rotary(positions, model), jnp.arange(tokens.shape[1])
    query_labels = TokenLabels(*(jnp.asarray(field)[:, last][:, None] for field in token_labels))
    mask = dense_mask(query_labels, token_labels, last[None, None], index[None])[0, 0]

    def attend(layer: Array) -> Float[Array, "H T"]:
        q, k, _ = decoder.layer(layer).queries_keys_values(streams[layer], rotation)
        q = q[0, last].reshape(model.kv_heads, -1, model.head_dim).astype(jnp.float32)
        scores = jnp.einsum("kge,tke->kgt", q, k[0].astype(jnp.float32)) * model.head_dim**-0.5
        weights = jax.nn.softmax(jnp.where(mask, scores, MASKED), -1)
        return weights.reshape(model.heads, -1)

    return _Reading(log_probs, jax.lax.map(attend, jnp.arange(model.layers)))
