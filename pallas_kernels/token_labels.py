"""`TokenLabels`: which token attends to which. Every attention kernel here is tested against `dense_mask`.

Axis letters: B rows, T or Q queries, S or K keys (docs/glossary.md, "Axis letters").
"""

from __future__ import annotations

from typing import NamedTuple

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Int

SELF, QUESTIONS, ALL = 0, 1, 2  # values of `TokenLabels.visibility`
PADDING = 0  # the `example_id` of padding
MASKED = -1e30  # score of a masked key; finite, so that a query that attends to nothing gives zeros and not NaN
INITIAL_MAX = MASKED / 2  # a query's first running maximum: above MASKED, whose weight is then exp(MASKED / 2) = 0


class TokenLabels(NamedTuple):
    """int32 labels on the tokens of packed rows. They take the place of an attention mask.

    Attributes:
      example_id: the packed example of a token, from 1; `PADDING` for padding. What JAX's attention kernels call
        `segment_ids`.
      piece_id: the piece of the example that the token is in (preamble, an event, a question); it never decreases
        within an example.
      visibility: which tokens may attend to the token: `ALL` later tokens of its example, `QUESTIONS` (and the
        token's own piece), or `SELF` (its own piece only). Only tokens of questions have `SELF`.
    """

    example_id: Int[Array | np.ndarray, "*B T"]
    piece_id: Int[Array | np.ndarray, "*B T"]
    visibility: Int[Array | np.ndarray, "*B T"]


def attends(
    q: TokenLabels, kv: TokenLabels, q_index: Array | np.ndarray, kv_index: Array | np.ndarray
) -> Bool[Array, ...]:
    """Whether each query attends to each key, elementwise on labels that broadcast against each other.

    A query attends to a key of the same example, not behind it, and either of the same piece, or of visibility `ALL`,
    or of visibility `QUESTIONS` if the query is in a question. Padding neither attends nor is attended to.

    Args:
      q, kv: labels of queries and keys.
      q_index, kv_index: indices in the row, not RoPE positions.

    Returns:
      bool of the broadcast shape.
    """
    needed = jnp.where(q.visibility == SELF, QUESTIONS, ALL)  # the least visibility that the query may attend to
    same = (q.example_id == kv.example_id) & (q.example_id != PADDING)
    return same & (kv_index <= q_index) & ((q.piece_id == kv.piece_id) | (kv.visibility >= needed))


def dense_mask(
    q: TokenLabels, kv: TokenLabels, q_index: Int[Array | np.ndarray, "*B Q"], kv_index: Int[Array | np.ndarray, "*B K"]
) -> Bool[Array, "*B Q K"]:
    """`attends` of every query and every key: a dense mask [.., Q, K], for short rows and single blocks.

    Args:
      q, kv: labels [.., Q] and [.., K].
      q_index, kv_index: indices in the row.
    """
    rows = TokenLabels(*(jnp.asarray(x)[..., :, None] for x in q))
    columns = TokenLabels(*(jnp.asarray(x)[..., None, :] for x in kv))
    return attends(rows, columns, q_index[..., :, None], kv_index[..., None, :])
