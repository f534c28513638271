"""Exhaustive search over several devices finds what it finds on one."""

from __future__ import annotations

import functools
import itertools
import os
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from pallas_kernels.search import AXIS, BINS, Filter, Rows, jitted_top_k, slots_of
from tests.pallas_kernels.test_search import Q, check, problem
from tests.pallas_kernels.tpu import compile_for, devices

DEVICES = 4


def test_it_is_what_one_device_finds():
    """In a process of its own, which has several devices."""
    environment = os.environ | {"JAX_NUM_CPU_DEVICES": str(DEVICES)}
    command = [sys.executable, "-m", "tests.pallas_kernels.test_search_sharded"]
    subprocess.run(command, env=environment, cwd=Path(__file__).parents[2], check=True)


def main() -> None:
    mesh = jax.make_mesh((DEVICES,), (AXIS,))
    search = functools.partial(jitted_top_k, mesh=mesh)
    for seed, kinds, k in itertools.product(range(3), (1, 50), (1, 7, 300)):
        queries, rows, filters = problem(seed, kinds, DEVICES // 2)
        dealt = deal(rows, mesh)
        certain = search(queries, dealt, filters, k=k, certain=True)
        assert np.asarray(certain.exact).all()
        check(certain, queries, rows, filters, k)
        for implementation in ("xla", "tpu-interpreted"):
            best = search(queries, dealt, filters, k=k, implementation=implementation)
            check(best, queries, rows, filters, k)
            if kinds == 50 and k == 300 and implementation == "xla":
                assert np.asarray(best.exact).all()  # an even share and a little more is enough
    # All that is admitted is on one device, more than it sends; and more than there is.
    queries, rows, _ = problem(0, 50, DEVICES // 2)
    some = (np.arange(len(rows.vectors)) % DEVICES == 1).astype(np.int32)
    rows = rows._replace(attributes=jnp.asarray(some))
    filters = Filter(jnp.zeros(Q, jnp.int32), jnp.zeros(Q, jnp.int32))
    assert not np.asarray(search(queries, deal(rows, mesh), filters, k=1000).exact).any()
    for k in (1000, some.sum() + 100):
        best = search(queries, deal(rows, mesh), filters, k=int(k), certain=True)
        check(best, queries, rows, filters, int(k))
        assert (np.asarray(best.rows)[:, some.sum() :] == -1).all()


def deal(rows: Rows, mesh: jax.sharding.Mesh) -> Rows:
    """The rows, which are in the order of slots, as the devices hold them."""
    count = len(rows.vectors)
    slots = slots_of(np.arange(count), count // DEVICES, DEVICES)
    return jax.device_put(Rows(rows.vectors[slots], rows.attributes[slots]), jax.NamedSharding(mesh, jax.P(AXIS)))


def test_no_scores_are_kept_where_a_hundred_million_rows_are_searched():
    """On sixteen chips; what they send each other is a share of k, and not k."""
    mesh = jax.make_mesh((16,), (AXIS,), devices=devices("v5e", 4))
    whole, split = (jax.NamedSharding(mesh, spec) for spec in (jax.P(), jax.P(AXIS)))
    count = 16 * BINS * (100_000_000 // (16 * BINS))
    rows = Rows(shape((count, 256), jnp.bfloat16, split), shape((count,), jnp.int32, split))
    filters = Filter(*(shape((32,), jnp.int32, whole) for _ in range(2)))
    search = lambda *inputs: jitted_top_k(*inputs, k=2000, implementation="tpu", mesh=mesh)  # noqa: E731
    compiled = compile_for("v5e", search, shape((32, 256), jnp.float32, whole), rows, filters)
    memory = compiled.memory_analysis()
    index_bytes = memory.argument_size_in_bytes
    assert index_bytes > 3.2e9
    assert memory.temp_size_in_bytes < 0.01 * index_bytes
    assert f"[32,{count // 16}]" not in compiled.as_text()  # no [queries, items]


def shape(sizes: tuple[int, ...], dtype: jnp.dtype, sharding: jax.NamedSharding) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(sizes, dtype, sharding=sharding)


if __name__ == "__main__":
    main()
