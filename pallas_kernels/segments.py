"""`Segments`: the one definition of who sees whom. Every attention kernel here is held against `visible`."""

from __future__ import annotations

from typing import NamedTuple

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Int

SELF, QUESTIONS, ALL = 0, 1, 2
PADDING = 0  # the `example` of a token that is not there
MASKED = -1e30  # the score of a key that is not seen; finite, for a query that sees none gives zeros and not NaN
UNSEEN = MASKED / 2  # where a query's running maximum begins: above MASKED, whose weight is then exp(MASKED / 2) = 0


class Segments(NamedTuple):
    """Labels on the tokens of packed rows.

    Attributes:
      example: which packed example a token belongs to, from 1; `PADDING` for none.
      segment: which piece of that example (center, an event, a question); within a row, never decreasing
        inside an example.
      reach: who may look at the token: `ALL` later tokens of its example, `QUESTIONS` (and its own segment),
        or `SELF`: its own segment only. A token of reach `SELF` stands in a question.
    """

    example: Int[Array | np.ndarray, "*B T"]
    segment: Int[Array | np.ndarray, "*B T"]
    reach: Int[Array | np.ndarray, "*B T"]


def sees(q: Segments, kv: Segments, q_index: Array | np.ndarray, kv_index: Array | np.ndarray) -> Bool[Array, ...]:
    """Elementwise, on labels that broadcast against each other: whether the query sees the key.

    Same example, not after, and (same segment, or reach `ALL`, or `QUESTIONS` from a question). The indices are
    places in the row, not positions for RoPE. Padding neither sees nor is seen.
    """
    needed = jnp.where(q.reach == SELF, QUESTIONS, ALL)  # only a question sees what is open to questions
    same = (q.example == kv.example) & (q.example != PADDING)
    return same & (kv_index <= q_index) & ((q.segment == kv.segment) | (kv.reach >= needed))


def visible(
    q: Segments, kv: Segments, q_index: Int[Array | np.ndarray, "*B Q"], kv_index: Int[Array | np.ndarray, "*B K"]
) -> Bool[Array, "*B Q K"]:
    """Who sees whom (`sees`), every query against every key: dense, for short rows and single blocks."""
    rows = Segments(*(jnp.asarray(x)[..., :, None] for x in q))
    columns = Segments(*(jnp.asarray(x)[..., None, :] for x in kv))
    return sees(rows, columns, q_index[..., :, None], kv_index[..., None, :])
