"""The TPU compiler on a machine without a TPU: `libtpu` compiles for abstract devices."""

from __future__ import annotations

import functools
import os
from collections.abc import Callable
from typing import Any

# Read when libtpu is first loaded: let several processes (pytest-xdist) load it, and do not look for a cloud machine.
os.environ.setdefault("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")
os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")

import jax
from jax.experimental import topologies

CHIPS = ("v5e", "v5p", "v6e", "tpu7x")


@functools.cache
def devices(chip: str, side: int = 1) -> list[jax.Device]:
    """The devices of side x side chips on one host, to shard over and compile for, not to run on.

    One per chip, but two on tpu7x.
    """
    shape = f"{side}x{side}" + ("x1" if chip in ("v4", "v5p", "tpu7x") else "")
    topology = topologies.get_topology_desc(
        platform="tpu", topology_name=f"{chip}:{shape}", chips_per_host_bounds=(side, side, 1)
    )
    return topology.devices


def compile_for(chip: str, function: Callable, *arguments: Any) -> jax.stages.Compiled:
    """`function` compiled for one device of that chip; arguments are pytrees of `jax.ShapeDtypeStruct` or arrays.

    Arguments that carry a sharding (over `devices`) keep it.
    """
    default_sharding = jax.NamedSharding(jax.make_mesh((1,), ("one",), devices=devices(chip)[:1]), jax.P())

    def place(x: Any) -> jax.ShapeDtypeStruct:
        sharding = x.sharding if isinstance(x, jax.ShapeDtypeStruct) else None
        return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding or default_sharding)

    placed = jax.tree.map(place, arguments)
    mesh = jax.tree.leaves(placed)[0].sharding.mesh  # in context, for it says which platform is compiled for
    with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
        return jax.jit(function).lower(*placed).compile()
