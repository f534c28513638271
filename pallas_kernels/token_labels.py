"""`TokenLabels`: which token attends to which. Every attention kernel here is held against `dense_mask`."""

from __future__ import annotations

from typing import NamedTuple

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Int

SELF, QUESTIONS, ALL = 0, 1, 2
PADDING = 0  # the `example` of a token that is not there
MASKED = -1e30  # the score of a key that is not seen; finite, for a query that sees none gives zeros and not NaN
INITIAL_MAX = (
    MASKED / 2
)  # where a query's running maximum begins: above MASKED, whose weight is then exp(MASKED / 2) = 0


class TokenLabels(NamedTuple):
    """Labels on the tokens of packed rows.

    Attributes:
      example: which packed example a token belongs to, from 1; `PADDING` for none.
      segment: which piece of that example (center, an event, a question); within a row, never decreasing
        inside an example.
      reach: who may look at the token: `ALL` later tokens of its example, `QUESTIONS` (and its own segment),
        or `SELF`: its own segment only. A token of reach `SELF` stands in a question.
    """

    example_id: Int[Array | np.ndarray, "*B T"]
    piece_id: Int[Array | np.ndarray, "*B T"]
    visibility: Int[Array | np.ndarray, "*B T"]


def attends(
    q: TokenLabels, kv: TokenLabels, q_index: Array | np.ndarray, kv_index: Array | np.ndarray
) -> Bool[Array, ...]:
    """Elementwise, on labels that broadcast against each other: whether the query sees the key.

    Same example, not after, and (same segment, or reach `ALL`, or `QUESTIONS` from a question). The indices are
    places in the row, not positions for RoPE. Padding neither sees nor is seen.
    """
    needed = jnp.where(q.visibility == SELF, QUESTIONS, ALL)  # only a question sees what is open to questions
    same = (q.example_id == kv.example_id) & (q.example_id != PADDING)
    return same & (kv_index <= q_index) & ((q.piece_id == kv.piece_id) | (kv.visibility >= needed))


def dense_mask(
    q: TokenLabels, kv: TokenLabels, q_index: Int[Array | np.ndarray, "*B Q"], kv_index: Int[Array | np.ndarray, "*B K"]
) -> Bool[Array, "*B Q K"]:
    """Who sees whom (`sees`), every query against every key: dense, for short rows and single blocks."""
    rows = TokenLabels(*(jnp.asarray(x)[..., :, None] for x in q))
    columns = TokenLabels(*(jnp.asarray(x)[..., None, :] for x in kv))
    return attends(rows, columns, q_index[..., :, None], kv_index[..., None, :])
