"""`Segments`: the one definition of who sees whom. Every attention kernel here is held against `visible`."""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Int

SELF, QUESTIONS, ALL = 0, 1, 2
PADDING = 0  # the `example` of a token that is not there


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


def visible(
    q: Segments, kv: Segments, q_index: Int[Array, "*B Q"], kv_index: Int[Array, "*B K"]
) -> Bool[Array, "*B Q K"]:
    """Who sees whom: same example, not after, and (same segment, or reach `ALL`, or `QUESTIONS` from a question).

    The indices are places in the row, not positions for RoPE. Padding neither sees nor is seen.
    """
    rows = lambda x: jnp.asarray(x)[..., :, None]  # noqa: E731
    columns = lambda x: jnp.asarray(x)[..., None, :]  # noqa: E731
    reaches = (
        (rows(q.segment) == columns(kv.segment))
        | (columns(kv.reach) == ALL)
        | ((columns(kv.reach) == QUESTIONS) & (rows(q.reach) == SELF))
    )
    same = (rows(q.example) == columns(kv.example)) & (rows(q.example) != PADDING)
    return same & (columns(kv_index) <= rows(q_index)) & reaches


def may_see(segments: Segments, block: int) -> Bool[Array, "*B N N"]:
    """Which (query block, key block) pairs can hold a visible pair, from O(blocks) facts; T divides by `block`.

    Never false for a pair that holds one. Tight where examples and segments are contiguous.
    """
    blocked = jax.tree.map(lambda x: jnp.asarray(x).reshape(*x.shape[:-1], -1, block), segments)
    big = jnp.iinfo(jnp.int32).max
    real = blocked.example != PADDING

    def bounds(x: Array) -> tuple[Array, Array]:
        return jnp.min(jnp.where(real, x, big), -1), jnp.max(jnp.where(real, x, -1), -1)

    def overlap(bounds: tuple[Array, Array]) -> Array:
        low, high = bounds
        return (low[..., None, :] <= high[..., :, None]) & (high[..., None, :] >= low[..., :, None])

    has = lambda reach: jnp.any(real & (blocked.reach == reach), -1)  # noqa: E731
    reaches = (
        overlap(bounds(blocked.segment))
        | has(ALL)[..., None, :]
        | (has(QUESTIONS)[..., None, :] & has(SELF)[..., :, None])
    )
    count = blocked.example.shape[-2]
    causal = jnp.arange(count)[None, :] <= jnp.arange(count)[:, None]
    return overlap(bounds(blocked.example)) & reaches & causal
