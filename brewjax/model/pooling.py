"""One vector for each text of packed rows: the hidden states of its tokens, pooled, truncated and of length 1.

Axis letters: B rows, T tokens, N texts of a row, D model dimension (docs/glossary.md, "Axis letters").
"""

from __future__ import annotations

from typing import Literal

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from brewjax.model.decoder import Decoder
from pallas_kernels.token_labels import PADDING, TokenLabels

Pooling = Literal["mean", "last"]


def tokens_of_texts(token_labels: TokenLabels, num_texts: int) -> Bool[Array, "B T N"]:
    """Which tokens belong to each text of a row: a run of tokens of one example and one piece.

    Texts beyond `num_texts` are left out.
    """
    example_id, piece_id = jnp.asarray(token_labels.example_id), jnp.asarray(token_labels.piece_id)
    real = example_id != PADDING
    changes = (example_id[:, 1:] != example_id[:, :-1]) | (piece_id[:, 1:] != piece_id[:, :-1])
    starts = real & jnp.pad(changes, ((0, 0), (1, 0)), constant_values=True)
    number = jnp.cumsum(starts, 1) - 1
    return (number[..., None] == jnp.arange(num_texts)) & real[..., None]


def pool(
    decoder: Decoder,
    hidden: Float[Array, "B T D"],
    token_labels: TokenLabels,
    num_texts: int,
    pooling: Pooling,
) -> Float[Array, "B N D"]:
    """Pools the hidden states of texts: the mean over a text's tokens, or its last token.

    Sums are over a text's own tokens, whatever stands beside it, so that a text has the same vector alone and packed,
    up to rounding.

    Args:
      decoder: whose sharding is used.
      hidden: states behind the last norm.
      token_labels: of the rows; each piece of an example is a text.
      num_texts: texts of a row, at most.
      pooling: "mean" or "last".

    Returns:
      float32 vectors; those of texts that a row does not have are 0.
    """
    sharding = decoder.sharding
    hidden = sharding.reshard(hidden, "batch", None, None).astype(jnp.float32)
    whole_rows = TokenLabels(*(sharding.reshard(jnp.asarray(x), "batch", None) for x in token_labels))
    of_text = tokens_of_texts(whole_rows, num_texts)
    if pooling == "last":
        of_text &= ~jnp.pad(of_text[:, 1:], ((0, 0), (0, 1), (0, 0)))
    real = jnp.any(of_text, -1, keepdims=True)
    sums = jnp.einsum(
        "btn,btd->bnd",
        of_text.astype(jnp.float32),
        jnp.where(real, hidden, 0),  # hidden states of padding are undefined: not even finite
        precision=jax.lax.Precision.HIGHEST,
    )
    return sums / jnp.maximum(jnp.sum(of_text, 1), 1)[..., None]


def unit(vectors: Float[Array, "*B D"], dimensions: int) -> Float[Array, "*B d"]:
    """The first `dimensions` of each of `vectors`, scaled to length 1 (Matryoshka: Kusupati et al. 2022, arXiv
    2205.13147).

    A vector of 0 stays 0, and has the gradient 0.
    """
    truncated = vectors[..., :dimensions]
    square = jnp.sum(truncated**2, -1, keepdims=True)
    return truncated * jnp.where(square > 0, jax.lax.rsqrt(jnp.where(square > 0, square, 1)), 0)
