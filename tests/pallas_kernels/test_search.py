"""Exhaustive search against a sort of all scores: filters, ties, too few rows, the certificate of the TPU's kernel."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pallas_kernels.search import ALIVE, BINS, BestRows, Filter, Rows, admitted, jitted_top_k
from tests.pallas_kernels.tpu import compile_for

N, D, Q = 2 * BINS, 16, 3


def definition(queries: np.ndarray, rows: Rows, filters: Filter, k: int) -> tuple[np.ndarray, np.ndarray]:
    """Scores and rows by a stable sort of everything, in float64."""
    scores = queries.astype(np.float64) @ np.asarray(rows.vectors, np.float64).T
    scores = np.where(np.asarray(admitted(rows, filters)), scores, -np.inf)
    order = np.argsort(-scores, axis=1, kind="stable")[:, :k]
    best = np.take_along_axis(scores, order, 1)
    return best, np.where(best == -np.inf, -1, order)


def problem(seed: int, kinds: int, times: int = 1) -> tuple[np.ndarray, Rows, Filter]:
    """Small whole numbers, so that products are exact and ties are many; `times` N rows."""
    random = np.random.default_rng(seed)
    vectors = random.integers(-kinds, kinds + 1, (times * N, D)).astype(np.float32)
    attributes = random.integers(0, 16, times * N).astype(np.int32)
    filters = Filter(*(jnp.asarray(random.integers(0, 16, Q) & mask, jnp.int32) for mask in (6, 8)))
    queries = random.integers(-3, 4, (Q, D)).astype(np.float32)
    return queries, Rows(jnp.asarray(vectors), jnp.asarray(attributes)), filters


def check(best: BestRows, queries: np.ndarray, rows: Rows, filters: Filter, k: int) -> None:
    scores, indices = definition(queries, rows, filters, k)
    exact = np.asarray(best.exact)
    np.testing.assert_array_equal(np.asarray(best.scores)[exact], scores[exact])
    np.testing.assert_array_equal(np.asarray(best.rows)[exact], indices[exact])


@settings(max_examples=15, deadline=None)
@given(st.integers(0, 1000), st.sampled_from([1, 5]), st.sampled_from([1, 7, 100]))
def test_blocks_find_what_a_sort_finds(seed, kinds, k):
    queries, rows, filters = problem(seed, kinds)
    best = jitted_top_k(queries, rows, filters, k=k, implementation="xla")
    assert np.asarray(best.exact).all()
    check(best, queries, rows, filters, k)


@settings(max_examples=8, deadline=None)
@given(st.integers(0, 1000), st.sampled_from([7, 300]))
def test_what_the_kernel_calls_exact_is_exact(seed, k):
    queries, rows, filters = problem(seed, 50)
    best = jitted_top_k(queries, rows, filters, k=k, implementation="tpu-interpreted")
    check(best, queries, rows, filters, k)
    if k == 7:
        assert np.asarray(best.exact).any()


def test_the_kernel_knows_when_a_bin_dropped_too_much():
    queries = np.ones((1, D), np.float32)
    vectors = np.zeros((8 * BINS, D), np.float32)
    vectors[::BINS] = np.arange(1, 9, dtype=np.float32)[:, None]  # the eight best rows are of one bin
    rows = Rows(jnp.asarray(vectors), jnp.full(8 * BINS, ALIVE, jnp.int32))
    filters = Filter(jnp.zeros(1, jnp.int32), jnp.zeros(1, jnp.int32))
    few, many = (jitted_top_k(queries, rows, filters, k=k, implementation="tpu-interpreted") for k in (3, 8))
    assert np.asarray(few.exact).all()
    check(few, queries, rows, filters, 3)
    assert not np.asarray(many.exact).any()


@pytest.mark.parametrize("implementation", ["xla", "tpu-interpreted"])
def test_where_fewer_rows_are_admitted_there_are_fewer(implementation):
    queries, rows, _ = problem(0, 5)
    rows = rows._replace(attributes=jnp.zeros(N, jnp.int32).at[jnp.array([5, 9])].set(ALIVE))
    filters = Filter(jnp.zeros(Q, jnp.int32), jnp.zeros(Q, jnp.int32))
    best = jitted_top_k(queries, rows, filters, k=4, implementation=implementation)
    assert {*np.asarray(best.rows)[:, :2].ravel().tolist()} == {5, 9}
    assert (np.asarray(best.rows)[:, 2:] == -1).all()
    assert (np.asarray(best.scores)[:, 2:] == -np.inf).all()


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_the_kernel_compiles_for_a_tpu_and_keeps_no_scores(dtype):
    shape = functools.partial(jax.ShapeDtypeStruct)
    rows = Rows(shape((64 * BINS, 256), dtype), shape((64 * BINS,), jnp.int32))
    filters = Filter(shape((8,), jnp.int32), shape((8,), jnp.int32))
    search = lambda *inputs: jitted_top_k(*inputs, k=100, implementation="tpu")  # noqa: E731
    memory = compile_for("v5e", search, shape((8, 256), jnp.float32), rows, filters).memory_analysis()
    assert memory.temp_size_in_bytes < 8 * 64 * BINS  # a byte for each query and row would be more
