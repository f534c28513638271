"""Exhaustive search: for each query the k rows with the largest inner products, among those that its own filter admits.

`top_k` is exact, and ties go to the lower row. It sorts nothing of size queries x rows: the k blocks with the largest
maxima hold the k largest scores, so only those blocks are sorted. On a TPU, where even the scores would be more traffic
than the rows, a kernel keeps the best few scores of each bin while the rows pass (the idea of TPU-KNN, arXiv
2206.14286, with more than one kept per bin as in arXiv 2506.04165); `BestRows.exact` says whether anything that it
dropped could have mattered.

Over several devices slots are dealt out like cards: slot s is row s // S of device s % S, so that rows that were added
together, which are often alike, are on different devices. Each device then sends only a little more than its even share
of the k best, and what it kept back is checked against the k-th.

Axis letters: Q queries, N rows, D dimensions; see docs/glossary.md.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jaxtyping import Array, Bool, Float, Int

from pallas_kernels.platform import platform

ALIVE = 1  # the attribute bit of a row that is there
BLOCK = 32  # rows whose maximum is taken first
BINS = 2048  # of the TPU's kernel: row i is in bin i % BINS
KEPT_PER_BIN = 4
AXIS = "rows"  # of the mesh, if there is one


class Rows(NamedTuple):
    """The rows of an index: on one device, where slot s is row s, or sharded over the axis `AXIS` of a mesh.

    Attributes:
      vectors: float32 or bfloat16 [N, D], on each device a multiple of `BINS`.
      attributes: int32 [N]: bit 0 (`ALIVE`) of a row that is there, the other bits as the index likes.
    """

    vectors: Float[Array, "N D"]
    attributes: Int[Array, " N"]


class Filter(NamedTuple):
    """The attribute bits that a row must have, and must not have, for each query; `ALIVE` is always required."""

    required: Int[Array, " Q"]
    banned: Int[Array, " Q"]


class BestRows(NamedTuple):
    """The best rows of each query, best first.

    Attributes:
      scores: float32 inner products; -inf behind the last row that the filter admits.
      rows: slots; -1 where there is none.
      exact: whether these are surely the k best.
    """

    scores: Float[Array, "Q k"]
    rows: Int[Array, "Q k"]
    exact: Bool[Array, " Q"]


class _Best(NamedTuple):
    """The best rows of one device, and for each query a score above which nothing was left behind."""

    scores: Float[Array, "Q k"]
    rows: Int[Array, "Q k"]
    left_behind: Float[Array, " Q"]


def top_k(
    queries: Float[Array, "Q D"],
    rows: Rows,
    filters: Filter,
    k: int,
    implementation: str | None = None,
    mesh: jax.sharding.Mesh | None = None,
    certain: bool = False,
) -> BestRows:
    """Finds the k rows with the largest inner products that each query's filter admits; products are float32 in truth.

    Args:
      queries: one vector per row.
      rows: the vectors to search, and their attribute bits.
      filters: the bits that each query requires and bans.
      k: at most the number of rows.
      implementation: "xla", "tpu", or "tpu-interpreted"; the platform's own by default.
      mesh: the devices that share the rows, by its axis `AXIS`; by default they are on one.
      certain: searches in the way that needs more memory, and whose results are always exact.

    Returns:
      Scores and slots, the best first, and for which queries they are surely the best.

    Raises:
      ValueError: `k` is not 1 to the number of rows.
    """
    if not 0 < k <= len(rows.vectors):
        raise ValueError(f"k is {k}; the index has {len(rows.vectors):,} rows")
    implementation = implementation or ("tpu" if platform() == "tpu" else "xla")
    if implementation == "xla" or certain:
        local = _by_blocks
    else:
        local = functools.partial(_by_bins, interpret=implementation == "tpu-interpreted")
    if mesh is None:
        scores, slots, left_behind = local(queries, rows, filters, k)
    else:
        search = functools.partial(_on_device, local=local, k=k, devices=mesh.shape[AXIS], certain=certain)
        whole, split = jax.P(), jax.P(AXIS)
        search = jax.shard_map(search, mesh=mesh, in_specs=(whole, split, whole), out_specs=whole, check_vma=False)
        scores, slots, left_behind = search(queries, rows, filters)
    return BestRows(scores, slots, (left_behind < scores[:, -1]) | (left_behind == -jnp.inf))


def slots_of(rows: np.ndarray, rows_per_device: int, devices: int) -> np.ndarray:
    """Computes the slots that rows are in.

    Args:
      rows: int [rows], of all devices, those of the first one first.
      rows_per_device: how many each of them has.
      devices: how many there are.

    Returns:
      int [rows].
    """
    return rows % rows_per_device * devices + rows // rows_per_device


def rows_of(slots: np.ndarray, rows_per_device: int, devices: int) -> np.ndarray:
    """Computes the rows of slots, the inverse of `slots_of`.

    Args:
      slots: int [slots].
      rows_per_device: how many rows each device has.
      devices: how many there are.

    Returns:
      int [slots].
    """
    return slots % devices * rows_per_device + slots // devices


def _on_device(
    queries: Array, rows: Rows, filters: Filter, local: Callable[..., _Best], k: int, devices: int, certain: bool
) -> _Best:
    """The best of all devices, from what each of them sends."""
    whole = min(k, len(rows.vectors))
    if devices == 1:
        return local(queries, rows, filters, whole)
    even = k / devices
    # Of slots that are dealt out evenly a device has more than this of the k best once in 10^12 searches.
    quota = whole if certain else min(whole, 8 * math.ceil((even + 8 * math.sqrt(even)) / 8))
    scores, best, left_behind = local(queries, rows, filters, quota)
    if quota < whole:
        left_behind = jnp.maximum(left_behind, scores[:, -1])
    slots = jnp.where(best == -1, -1, best * devices + jax.lax.axis_index(AXIS))
    scores, slots = (jax.lax.all_gather(x, AXIS, axis=1, tiled=True) for x in (scores, slots))
    order = jnp.argsort(slots, -1)  # by which top_k breaks ties
    scores, slots = (jnp.take_along_axis(x, order, 1) for x in (scores, slots))
    missing = max(0, k - scores.shape[1])
    scores, indices = jax.lax.top_k(jnp.pad(scores, ((0, 0), (0, missing)), constant_values=-jnp.inf), k)
    slots = jnp.take_along_axis(jnp.pad(slots, ((0, 0), (0, missing)), constant_values=-1), indices, 1)
    return _Best(scores, slots, jax.lax.pmax(left_behind, AXIS))


def admitted(rows: Rows, filters: Filter) -> Bool[Array, "Q N"]:
    """Whether each query's filter admits each row."""
    required = (filters.required | ALIVE)[:, None]
    return ((rows.attributes & required) == required) & ((rows.attributes & filters.banned[:, None]) == 0)


def _scores(queries: Array, vectors: Array) -> Float[Array, "Q N"]:
    return jax.lax.dot_general(
        queries,
        vectors.astype(queries.dtype),
        (((1,), (1,)), ((), ())),
        precision=jax.lax.Precision.HIGHEST,
        preferred_element_type=jnp.float32,
    )


def _by_blocks(queries: Array, rows: Rows, filters: Filter, k: int) -> _Best:
    scores = jnp.where(admitted(rows, filters), _scores(queries, rows.vectors), -jnp.inf)
    Q, N = scores.shape
    padded = jnp.pad(scores, ((0, 0), (0, -N % BLOCK)), constant_values=-jnp.inf).reshape(Q, -1, BLOCK)
    blocks = min(k, padded.shape[1])
    # A block that is not among the k best has k maxima before it, in the order of scores and then of rows.
    _, best = jax.lax.top_k(padded.max(-1), blocks)
    best = jnp.sort(best, -1)  # so that positions, by which top_k breaks ties, are in the order of rows
    candidates = jnp.take_along_axis(padded, best[..., None], 1).reshape(Q, -1)
    values, positions = jax.lax.top_k(candidates, k)
    best_rows = jnp.take_along_axis(best, positions // BLOCK, 1) * BLOCK + positions % BLOCK
    return _Best(values, jnp.where(values == -jnp.inf, -1, best_rows), jnp.full(Q, -jnp.inf))


def _by_bins(queries: Array, rows: Rows, filters: Filter, k: int, interpret: Any) -> _Best:
    if k > KEPT_PER_BIN * BINS:
        return _by_blocks(queries, rows, filters, k)
    values, steps = _scan(queries, rows, filters, interpret)
    Q = len(queries)
    values, steps = jnp.moveaxis(values, 0, 1), jnp.moveaxis(steps, 0, 1)  # [Q, KEPT_PER_BIN, BINS]
    positions = steps * BINS + jnp.arange(BINS, dtype=jnp.int32)
    # In the order of rows, so that ties are broken as everywhere.
    flat_rows, flat_values = positions.reshape(Q, -1), values.reshape(Q, -1)
    order = jnp.argsort(flat_rows, -1)
    flat_rows, flat_values = (jnp.take_along_axis(x, order, 1) for x in (flat_rows, flat_values))
    best, indices = jax.lax.top_k(flat_values, k)
    best_rows = jnp.take_along_axis(flat_rows, indices, 1)
    # Whatever a bin dropped is at most the last score that it kept.
    return _Best(best, jnp.where(best == -jnp.inf, -1, best_rows), values[:, -1].max(-1))


def _kernel(q, required, banned, vectors, attributes, values, steps):
    step = pl.program_id(0)

    @pl.when(step == 0)
    def _() -> None:
        values[...] = jnp.full(values.shape, -jnp.inf, jnp.float32)
        steps[...] = jnp.zeros(steps.shape, jnp.int32)

    score = jax.lax.dot_general(
        q[...], vectors[...].astype(q.dtype), (((1,), (1,)), ((), ())),
        precision=jax.lax.Precision.HIGHEST, preferred_element_type=jnp.float32,
    )  # fmt: skip
    bits = attributes[...]
    is_admitted = ((bits & required[...]) == required[...]) & ((bits & banned[...]) == 0)
    score = jnp.where(is_admitted, score, -jnp.inf)
    index = jnp.full(score.shape, step, jnp.int32)
    for n in range(KEPT_PER_BIN):  # insertion into the bin's sorted list; the earlier row stays ahead at a tie
        bin_score, bin_index = values[n], steps[n]
        better = score > bin_score
        values[n], steps[n] = jnp.where(better, score, bin_score), jnp.where(better, index, bin_index)
        score, index = jnp.where(better, bin_score, score), jnp.where(better, bin_index, index)


def _scan(queries: Array, rows: Rows, filters: Filter, interpret: Any) -> tuple[Array, Array]:
    """float32 and int32 [KEPT_PER_BIN, Q, BINS]: the best scores of each bin, and the scan step of each."""
    (Q, D), N = queries.shape, len(rows.vectors)
    if N % BINS:
        raise ValueError(f"{N:,} rows; the kernel takes a multiple of {BINS}")
    whole = lambda *shape: pl.BlockSpec(shape, lambda step: (0,) * len(shape))  # noqa: E731
    out_shape = [jax.ShapeDtypeStruct((KEPT_PER_BIN, Q, BINS), dtype) for dtype in (jnp.float32, jnp.int32)]
    return pl.pallas_call(
        _kernel,
        name="search_top_k",
        grid=(N // BINS,),
        in_specs=[
            whole(Q, D),
            whole(Q, 1),
            whole(Q, 1),
            pl.BlockSpec((BINS, D), lambda step: (step, 0)),
            pl.BlockSpec((1, BINS), lambda step: (0, step)),
        ],
        out_specs=[whole(KEPT_PER_BIN, Q, BINS)] * 2,
        out_shape=out_shape,
        interpret=interpret,
        compiler_params=pltpu.CompilerParams(dimension_semantics=("arbitrary",), vmem_limit_bytes=100 << 20),
    )(queries, (filters.required | ALIVE)[:, None], filters.banned[:, None], rows.vectors, rows.attributes[None])


jitted_top_k = functools.partial(jax.jit, static_argnames=("k", "implementation", "mesh", "certain"))(top_k)
