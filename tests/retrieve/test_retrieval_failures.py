"""What went wrong in other systems: each has a test, named in docs/retrieval.md. Here are those of no other file."""

from __future__ import annotations

import re
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from brewjax.retrieve import device_rows
from brewjax.retrieve.index import Index, IndexConfig
from pallas_kernels.search import AXIS, BINS
from tests.retrieve.conftest import D, vectors

ROOT = Path(__file__).parents[2]


def best(rows: np.ndarray, query: np.ndarray, k: int) -> list[int]:
    return np.argsort(-rows @ query, kind="stable")[:k].tolist()


def test_every_one_of_the_twenty_has_a_test():
    page = (ROOT / "docs" / "retrieval.md").read_text()
    rows = re.findall(r"^\| (\d+)\. .*\| (.*) \|$", page, re.MULTILINE)
    assert [int(number) for number, _ in rows] == list(range(1, 21))
    defined = {
        name for path in (ROOT / "tests").rglob("*.py") for name in re.findall(r"def (test_\w+)", path.read_text())
    }
    for number, tests in rows:
        names = re.findall(r"`(test_\w+)`", tests)
        assert names, number
        assert {*names} <= defined, number


@pytest.mark.parametrize("order", ["together", "one bin"])
def test_items_in_the_order_of_clusters_lose_nothing(index, monkeypatch, order):
    """As on a TPU: where near items share a bin it drops some, notices, and searches again, with the filter too."""
    fallbacks, search = [], device_rows.jitted_top_k

    def as_on_a_tpu(*args, certain=False, **settings):
        fallbacks.append(certain)
        return search(*args, **settings, certain=certain, implementation="tpu-interpreted")

    monkeypatch.setattr(device_rows, "jitted_top_k", as_on_a_tpu)
    monkeypatch.setattr(device_rows, "GATHERED_SHARE", 0.0)
    count = 8 * BINS
    near = np.arange(16) if order == "together" else np.arange(16) % 8 * BINS + np.arange(16) // 8
    rows = vectors(count) * 0.01
    rows[near] = vectors(1, 1) + vectors(16, 2) * 0.001
    bits = np.where(np.arange(count) % 2, 2, 4).astype(np.int32)
    index.upsert(list(range(count)), rows, bits)
    queries = np.repeat(vectors(1, 1), 2, 0)
    every, even = index.search(queries, 8, required=[0, 4])
    assert any(fallbacks) == (order == "one bin")
    assert every.ids == best(rows, queries[0], 8)
    assert even.ids == [2 * n for n in best(rows[::2], queries[0], 8)]


def test_an_update_does_not_copy_the_index():
    mesh = jax.make_mesh((1,), (AXIS,))
    rows = device_rows._empty(64, mesh)
    while len(rows.vectors) < 8 * BINS:
        rows = device_rows._grow(rows, mesh)
    slots, bits = jnp.arange(4, dtype=jnp.int32), jnp.ones(4, jnp.int32)
    for values in (jnp.ones((4, 64)), None):  # an upsert and a delete
        compiled = device_rows._write.lower(rows, slots, bits, values, mesh).compile()
        memory = compiled.memory_analysis()
        assert memory.alias_size_in_bytes >= rows.vectors.nbytes + rows.attributes.nbytes
        assert memory.temp_size_in_bytes < rows.vectors.nbytes / 100


def test_a_filter_holds_for_fresh_rows_and_after_a_restart(tmp_path):
    rows, bits = vectors(300), np.where(np.arange(300) % 3, 2, 4).astype(np.int32)
    index = Index.create(tmp_path / "index", IndexConfig(dimensions=D))
    index.upsert(list(range(200)), rows[:200], bits[:200])
    index.snapshot()
    index.upsert(list(range(200, 300)), rows[200:], bits[200:])
    index.upsert([0], rows[:1], np.array([8], np.int32))  # the bits of an item change with it
    expected = [3 * n for n in best(rows[::3], rows[5], 100) if n]
    for _ in range(2):
        assert index.search(rows[5:6], 100, required=4)[0].ids == expected
        assert index.search(rows[5:6], 100, banned=6)[0].ids == [0]
        index.close()
        index = Index(tmp_path / "index")
    index.close()


@pytest.mark.parametrize("share", [0.0, 2.0])
def test_a_filter_of_few_finds_every_one_of_them(index, monkeypatch, share):
    """However few match, and however far they are from the query, all k of them come back, or all that match."""
    monkeypatch.setattr(device_rows, "GATHERED_SHARE", share)
    rows = vectors(3000)
    rows[::20] -= 10 * rows[7]  # what the filter admits is what the query likes least
    bits = np.where(np.arange(3000) % 20, 2, 4).astype(np.int32)
    index.upsert(list(range(3000)), rows, bits)
    for k in (16, 322):
        (hits,) = index.search(rows[7:8], k, required=4)
        assert hits.ids == [20 * n for n in best(rows[::20], rows[7], k)]


def test_equal_vectors_come_in_the_order_in_which_they_were_added(index):
    index.upsert([5, 3, 9, 1], np.ones((4, D)))
    index.upsert([7], np.full((1, D), 2.0))
    index.upsert([3], np.ones((1, D)))  # which keeps its place
    for k in (2, 3, 5):
        assert index.search(np.ones((1, D)), k)[0].ids == [7, 5, 3, 9, 1][:k]
